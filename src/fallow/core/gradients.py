"""Whether every adapted weight takes part in the training, whichever host holds it.

Each adapted weight is looked at until it has had a gradient: right before any torch optimizer's step, by torch's hook,
and in `fallow.step(model)`. Weights of an adapter that the optimizer trains and that have no gradient, while others of
it have one, or while what is trained beside it has (such as a new head), are an error: their modules did not run, or
their weights are read past them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fallow.core import schedule
from fallow.core.delta import Delta
from fallow.core.errors import ConfigError, TrainingError
from fallow.core.weakly import Weakly

SHOWN = 5  # names that an error tells of
_WATCHING: weakref.WeakSet[Watch] = weakref.WeakSet()


def watch(sites: Mapping[str, nn.Module], expected: bool = True) -> None:
    """Look for the gradients of an adapter's parts; `expected=False`: only where `check_gradients` asks."""
    if sites:
        schedule.carry(next(iter(sites.values())), Watch(sites, expected))


class Watch:
    """Of one adapter: its parts by the names of their weights. To `fallow.step` a Schedule."""

    def __init__(self, sites: Mapping[str, nn.Module], expected: bool) -> None:
        self.sites, self.unseen = Weakly(sites), Weakly(sites if expected else {})
        self.steps = 0
        self._begin()

    def _begin(self) -> None:
        _hook_all_optimizers()
        _WATCHING.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def resolve(self, total: int) -> None:
        """The length of the run plays no part."""

    def advance(self) -> bool:
        self.steps += 1
        self.look()
        return False

    def look(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """TrainingError where weights that the optimizer trains have no gradient while others have one."""
        if next(self.unseen.items(), None) is None:
            return
        within = None
        if optimizer is not None:
            within = {id(param) for group in optimizer.param_groups for param in group["params"]}
        got, lacking = seen(self.unseen.items(), within)
        if lacking and (got or _others_have_one(optimizer)):
            raise TrainingError(told(lacking, len(got)))
        for name in got:  # without any they are cleared already; the next look may come before that
            self.unseen.discard(name)


def _others_have_one(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether the optimizer has a gradient of what belongs to no adapter; a step may be told of without any."""
    if optimizer is None:
        return False
    parts = [part for held in _WATCHING for part in held.sites.values()]
    params = [part.all_parameters() if isinstance(part, Delta) else part.parameters() for part in parts]
    adapters = {id(param) for some in params for param in some}
    trained = (param for group in optimizer.param_groups for param in group["params"] if param.grad is not None)
    return any(id(param) not in adapters for param in trained)


def seen(sites: Iterable[tuple[str, nn.Module]], within: set[int] | None = None) -> tuple[list[str], list[str]]:
    """The names of the trained parts that have a gradient, and of those, `within` these Parameters, that have none."""
    got, lacking = [], []
    for name, part in sites:
        params = [param for param in part.parameters() if param.requires_grad and param.numel()]
        if not params and isinstance(part, Delta):
            params = [param for param in part.all_parameters() if param.requires_grad]
        if any(param.grad is not None for param in params):
            got.append(name)
        elif any(within is None or id(param) in within for param in params):
            lacking.append(name)
    return got, lacking


def told(lacking: list[str], got: int) -> str:
    more = f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
    if not lacking:
        return "no adapted weight is trained; activate the adapter first, and leave its parameters trainable"
    return (
        f"{len(lacking)} of {got + len(lacking)} adapted weights received no gradient: "
        f"{', '.join(map(repr, lacking[:SHOWN]))}{more}. Their modules did not run in this pass, or their weights are "
        "read past them: exclude them from the targets, or give expect_gradients=False where some are not meant to run "
        "always"
    )


def check_gradients(model: nn.Module) -> int:
    """Call it after a backward: how many adapted weights received a gradient, which all that are trained must have.

    TrainingError names those without: their modules did not run, or whoever calls them reads `.weight` past them.
    ConfigError where the model has no adapter.
    """
    watches = [held for held in schedule.attached(model) if isinstance(held, Watch)]
    if not watches:
        raise ConfigError(
            f"{type(model).__name__} has no adapter; fallow.attach(model, 'lora') or get_peft_model adds one"
        )
    got, lacking = seen([site for held in watches for site in held.sites.items()])
    if lacking or not got:
        raise TrainingError(told(lacking, len(got)))
    return len(got)


@cache
def _hook_all_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for held in list(_WATCHING):
        held.look(optimizer)
