"""Things that happen at steps of a training run: now re-selection; later growth, freezing, re-sampling.

A `Schedule` knows at which steps an action is due and how many were made, so a resumed run does not repeat it. The
selective optimizers advance theirs inside `step()`. Whatever is not an optimizer attaches its schedule to the model,
and a bare loop calls `fallow.step(model)` after `optimizer.step()`; the Hugging Face Trainer takes `fallow.Callback`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Protocol

from torch import nn

from fallow.core.errors import ConfigError


class Schedule:
    """Tells when given steps are reached, and runs `action(step)` right after them where one is given.

    `at` lists steps (whole numbers from 1) or shares of the run (numbers between 0 and 1), which need `total`, the
    number of steps of the run: given here or later to `resolve`. `name` is the argument's name in error messages.
    """

    def __init__(
        self,
        at: Iterable[int | float] | int | float,
        action: Callable[[int], None] | None = None,
        total: int | None = None,
        name: str = "at",
    ) -> None:
        self.name, self.action, self.total, self.steps = name, action, total, 0
        self.at: list[int | float] = [at] if isinstance(at, int | float) else list(at)
        for moment in self.at:
            whole = isinstance(moment, int) and not isinstance(moment, bool)
            share = isinstance(moment, float) and 0 < moment < 1
            if not share and not (whole and moment >= 1):
                raise ConfigError(
                    f"{name}={self.at}: {moment!r} must be a step (a whole number from 1) or a share of the run in "
                    "(0, 1)"
                )
        if total is not None:
            self.resolve(total)

    def resolve(self, total: int) -> None:
        """Say how many steps the run has, so that shares become steps. ConfigError where a moment is beyond its end."""
        if isinstance(total, bool) or not isinstance(total, int) or total < 1:
            raise ConfigError(f"total_steps={total!r} must be a whole number of at least 1")
        for moment in self.at:
            if isinstance(moment, int) and moment > total:
                raise ConfigError(
                    f"{self.name}={self.at}: step {moment} is beyond the run of {total} steps; give a step up to "
                    f"{total}, or a share such as 0.5"
                )
        self.total = total

    @property
    def due(self) -> list[int]:
        """The steps at which the action runs, ascending."""
        return sorted({self._step_of(moment) for moment in self.at})

    def _step_of(self, moment: int | float) -> int:
        if isinstance(moment, int):
            return moment
        if self.total is None:
            raise ConfigError(f"{self.name}={moment} is a share of the run; give total_steps=, or a step instead")
        return max(1, round(moment * self.total))

    def check(self) -> None:
        """ConfigError where a share of the run is asked for and the length of the run is not known."""
        for moment in self.at:
            self._step_of(moment)

    def advance(self) -> bool:
        """Count one step; if this is one of those asked for, run the action and say so."""
        due = bool(self.at) and self.steps + 1 in self.due
        self.steps += 1
        if due and self.action is not None:
            self.action(self.steps)
        return due


class Attached(Protocol):
    """What can be attached to a model: a Schedule, or something else that counts steps."""

    steps: int

    def resolve(self, total: int) -> None: ...
    def advance(self) -> bool: ...


_ATTACHED: weakref.WeakKeyDictionary[nn.Module, list[Attached]] = weakref.WeakKeyDictionary()
CARRIED = "_fallow_schedules"  # in the dictionary of a module


def attach(model: nn.Module, schedule: Attached) -> None:
    """Let `step(model)` advance this schedule. It is this model's alone: a copy has none."""
    _ATTACHED.setdefault(model, []).append(schedule)


def carry(part: nn.Module, schedule: Attached) -> None:
    """Let `step(model)` of every model that holds this part advance the schedule, which goes where the part goes.

    A copy of the part has a copy of the schedule, which must therefore be one that can be copied and pickled.
    """
    part.__dict__.setdefault(CARRIED, []).append(schedule)


def step(model: nn.Module) -> int:
    """Tell everything attached to the model that an optimizer step was made; returns how many actions ran.

    Call it after `optimizer.step()` in a bare loop. SaRA and the other selective optimizers need no such call.
    """
    return sum(schedule.advance() for schedule in attached(model))


def resolve(model: nn.Module, total: int) -> None:
    """Tell everything attached to the model how many steps the run has."""
    for schedule in attached(model):
        schedule.resolve(total)


def resume(model: nn.Module, steps: int) -> None:
    """Tell everything attached to the model how many steps were made before; nothing is done for these again."""
    for schedule in attached(model):
        schedule.steps = steps


def attached(model: nn.Module) -> list[Attached]:
    """What is attached to the model, or to the one inside that PEFT, DDP or torch.compile has wrapped, or is carried
    by a part of it.
    """
    found: list[Attached] = []
    for module in model.modules():
        found += _ATTACHED.get(module, ())
        found += module.__dict__.get(CARRIED, ())
    return found
