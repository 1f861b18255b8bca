"""Keep columns of a trained matrix as they are, bit for bit, while an optimizer moves the others.

A gradient of zero is not enough: momentum and weight decay go on moving it. Torch's hooks around each step of every
optimizer put the columns back. A matrix that is trained no more loses the optimizer's state for it.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class PartlyFrozen(Protocol):
    """`frozen_columns()`: a parameter (n, m) and which of its columns must not move, bool (m,), on its device."""

    def frozen_columns(self) -> tuple[nn.Parameter, Tensor]: ...


_OWNERS: weakref.WeakSet[PartlyFrozen] = weakref.WeakSet()
_KEPT: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}  # by optimizer, between the two hooks of one step


def keep_frozen(owner: PartlyFrozen) -> None:
    """From now on, in every step of every optimizer, for as long as `owner` lives."""
    _OWNERS.add(owner)
    _hook_all_optimizers()


@cache
def _hook_all_optimizers() -> None:
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


def _before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    kept = []
    for owner in list(_OWNERS):
        param, columns = owner.frozen_columns()
        if id(param) not in held:
            continue
        if param.requires_grad:
            local = getattr(param.data, "_local_tensor", param.data)  # of a shard; by rows, so columns are whole
            kept.append((local, columns, local.clone()))
        else:
            optimizer.state.pop(param, None)
    _KEPT[id(optimizer)] = kept


def _after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for param, columns, before in _KEPT.pop(id(optimizer), ()):
        param.copy_(torch.where(columns, before, param))
