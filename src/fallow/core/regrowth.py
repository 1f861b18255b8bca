"""Another rank for a Delta that optimizers are training: their states grow and shrink along.

`Delta.resize` makes new Parameters. Here these take the places of the old ones in every optimizer that has made a step
since this module was imported, or is given: what it keeps for each number (moments, momentum) stays with the ranks that
stay, bit for bit, and is zero for new ones; what it keeps for the whole Parameter (a step count) goes on.

Rules that keep something else (factored moments, 8-bit codes, bases, pairs) are refused before anything is changed, and
so are runs of several processes: DistributedDataParallel has laid out its buckets for the Parameters it was given.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from fallow.core.delta import Delta, whole
from fallow.core.distributed import ranks
from fallow.core.errors import ConfigError

_SEEN: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def _remember(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _SEEN.add(optimizer)


register_optimizer_step_pre_hook(_remember)


def kept_ranks(delta: Delta, rank: int) -> Tensor:
    """Which ranks `delta.resize(rank)` keeps, ascending."""
    worth = delta.importance()
    return worth.topk(min(rank, len(worth))).indices.sort().values


@torch.no_grad()
def resized(delta: Delta, rank: int, optimizers: Iterable[Optimizer] = ()) -> None:
    """Give a Delta this rank, and the optimizers that train it their states for it.

    ConfigError where the method has no ranks or an optimizer's state cannot follow; nothing is changed then.
    """
    whole("rank", rank)
    before = dict(delta.named_parameters(recurse=False))
    keep = kept_ranks(delta, rank)
    holders = [each for each in {*_SEEN, *optimizers} if _held(each, before.values())]
    if holders and ranks() > 1:
        raise ConfigError(
            f"'{delta.name}' at '{delta.site_name}' cannot change its shape while several processes train it; cut "
            "after training, or grow within what was laid out beforehand (method 'adalora')"
        )
    for optimizer in holders:
        for name, param in before.items():
            _check(optimizer, param, f"{delta.site_name}.{name}")
    delta.resize(rank)
    after = dict(delta.named_parameters(recurse=False))
    for optimizer in holders:
        for name, param in before.items():
            if name in after:
                _exchange(optimizer, param, after[name], keep)
        _settle(optimizer, before, after)


def _held(optimizer: Optimizer, params: Iterable[Tensor]) -> bool:
    wanted = {id(param) for param in params}
    return any(id(param) in wanted for group in optimizer.param_groups for param in group["params"])


def _check(optimizer: Optimizer, param: Tensor, name: str) -> None:
    if type(optimizer).__module__.startswith("fallow."):
        raise ConfigError(
            f"{type(optimizer).__name__} keeps to the Parameters that it was made with, so '{name}' cannot change its "
            "rank under it; grow method 'adalora', or change the rank after training"
        )
    for key, value in optimizer.state.get(param, {}).items():
        plain = type(value) is Tensor and (value.shape == param.shape or value.numel() == 1)
        if not plain and not isinstance(value, int | float | bool | None):
            kind = (
                f"a {type(value).__name__} of {tuple(value.shape)}"
                if isinstance(value, Tensor)
                else type(value).__name__
            )
            raise ConfigError(
                f"{type(optimizer).__name__} keeps '{key}', {kind}, for '{name}' of {tuple(param.shape)}, which cannot "
                "follow another rank; use AdamW, Adam or SGD, or change the rank after training"
            )


def _exchange(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, keep: Tensor) -> None:
    """Let `new` stand where `old` stood."""
    if old is new:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if param is old else param for param in group["params"]]
    if old in optimizer.state:
        held = optimizer.state.pop(old)
        optimizer.state[new] = {
            key: along(value, old, new, keep) if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in held.items()
        }


def along(value: Tensor, old: Tensor, new: Tensor, keep: Tensor) -> Tensor:
    """A tensor of the shape of `old` in that of `new`: of the dimension in which they differ `keep`, and then zeros."""
    if old.shape == new.shape:
        return value
    (dim,) = (d for d in range(old.dim()) if old.shape[d] != new.shape[d])
    kept = value.index_select(dim, keep.to(value.device))
    shape = list(new.shape)
    shape[dim] -= kept.shape[dim]
    return torch.cat([kept, kept.new_zeros(shape)], dim)


def _settle(optimizer: Optimizer, before: dict[str, nn.Parameter], after: dict[str, nn.Parameter]) -> None:
    """Parameters that are no more leave the optimizer; those that are new come in beside the last of the others."""
    gone = {id(param) for name, param in before.items() if name not in after}
    last: dict[str, Any] | None = None
    own = {id(param) for param in after.values()}
    for group in optimizer.param_groups:
        for param in group["params"]:
            if id(param) in gone:
                optimizer.state.pop(param, None)
            if id(param) in own or id(param) in gone:
                last = group
        group["params"] = [param for param in group["params"] if id(param) not in gone]
    if last is not None:
        last["params"] += [param for name, param in after.items() if name not in before]
