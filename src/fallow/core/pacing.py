"""Ranks that an optimizer moves more slowly than the others, or not at all, whichever optimizer it is.

    p <- before + f (after - before)      for rows or columns of a Parameter, after each step of the optimizer

For rules whose step is proportional to the learning rate (AdamW with its weight decay, SGD, Lion ...) that is a
learning rate of f times the group's, without a group of its own: schedules of the rate go on knowing the groups that
they began with. f = 0 keeps the values bit for bit, against momentum and weight decay too.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fallow.core import accompany

Pace = tuple[int, int, float]  # the first rank, the one after the last, f


class Paced(Protocol):
    """Asked before each step of an optimizer; `group`: its settings for that Parameter, `state`: its state for it."""

    def gathered(self, held: set[int]) -> None:
        """All gradients of this step are there; `held`: the ids of the Parameters that the optimizer trains."""

    def parameters(self) -> Iterable[tuple[nn.Parameter, int]]:
        """What it follows, and which of its dimensions holds the ranks. Others' optimizers are not told of."""

    def paces(self, param: nn.Parameter, group: Mapping[str, Any], state: Mapping[str, Any]) -> list[Pace]:
        """Ranks with another pace than 1."""


_OWNERS: weakref.WeakSet[Any] = weakref.WeakSet()
_KEPT: dict[int, list[tuple[Tensor, Tensor, float]]] = {}  # by optimizer, between the two hooks of one step


def keep_pace(owner: Paced) -> None:
    """From now on, in every step of every optimizer, for as long as `owner` lives."""
    accompany.hook_optimizers()  # first, so that gradients of penalties are there
    _OWNERS.add(owner)
    _hook_all_optimizers()


def adam_catches_up(steps: int, group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """f with which Adam's step for moments that began `steps` steps ago is that of an Adam which began with them.

    Moments of new ranks start at zero in a state that has counted t steps; its correction for t, sqrt(1 - b2^t) /
    (1 - b1^t), is too weak for them, by up to 6.5 times where b2 is 0.999. 1 for rules without such moments.
    """
    if "exp_avg_sq" not in state or "betas" not in group or "step" not in state:
        return 1.0
    count = state["step"]
    on_device = isinstance(count, Tensor) and count.device.type != "cpu"
    before = math.inf if on_device else float(count)  # a count on another device is not waited for: it is large
    first, second = group["betas"]
    if not (0 < first < 1 and 0 < second < 1):
        return 1.0

    def correction(count: float) -> float:
        return math.sqrt(1 - second**count) / (1 - first**count)

    return correction(steps) / (1.0 if on_device else correction(max(before + 1, steps)))


@cache
def _hook_all_optimizers() -> None:
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


@torch.no_grad()
def _before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    groups = {id(param): group for group in optimizer.param_groups for param in group["params"]}
    kept = []
    for owner in list(_OWNERS):
        mine = [(param, dim) for param, dim in owner.parameters() if id(param) in groups]
        if mine:
            owner.gathered(groups.keys())
        for param, dim in mine:
            for first, last, pace in owner.paces(param, groups[id(param)], optimizer.state.get(param, {})):
                part = param.data.narrow(dim, first, last - first)
                kept.append((part, part.clone(), pace))
    _KEPT[id(optimizer)] = kept


@torch.no_grad()
def _after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for part, before, pace in _KEPT.pop(id(optimizer), ()):
        part.copy_(before if pace == 0 else torch.lerp(before, part, pace))
