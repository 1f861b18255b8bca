"""The optimizer in the backward pass: a weight is updated as soon as its gradient is complete.

    hook of W:   g = (dL/dW).flat[index] (+ penalty);  v = rule(v, g);  W.flat[index] = v;  drop g

So compact gradients too live for one layer only. The price: nothing can look at all gradients before the update, so
there is no clipping, no accumulation and no loss scaling, and the rule must be one that treats each tensor by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from fallow.core.compact import Slot
from fallow.core.distributed import ranks
from fallow.core.errors import ConfigError
from fallow.core.update import Update


class Drawing(Protocol):
    """A penalty that may choose slots first and act on them one by one; see `fallow.objectives.nuclear`."""

    def draw(self, slots: Sequence[Slot]) -> list[Slot]: ...
    def add_to(self, slots: Sequence[Slot]) -> None: ...


class InBackward:
    """Called with each slot whose gradient is complete; `finish()` is the step.

    `refusal()` says why the weights may not change now, if so.
    """

    def __init__(
        self, update: Update, slots: Callable[[], Sequence[Slot]], penalty: Drawing | None, refusal: Callable[[], str]
    ) -> None:
        self.update, self.slots, self.penalty, self.refusal = update, slots, penalty, refusal
        self.done: set[str] = set()
        self.drawn: dict[str, Slot] | None = None

    @torch.no_grad()
    def __call__(self, slot: Slot) -> None:
        if reason := self.refusal():
            raise ConfigError(reason)
        if slot.part is None and ranks() > 1:  # which met after the optimizer was made
            raise ConfigError(_untogether(ranks()))
        if slot.name in self.done:
            raise ConfigError(
                f"'{slot.name}' got a second gradient before step(), after in_backward=True had used the first: under "
                "re-entrant gradient checkpointing (give use_reentrant=False) or under gradient accumulation (take one "
                "backward pass a step, or in_backward=False)"
            )
        drawn = self._draw()
        if self.penalty is not None and slot.name in drawn:
            slot.refresh()
            self.penalty.add_to([slot])
        self.done.add(slot.name)
        self.update.apply([slot])
        slot.proxy.grad = None

    @torch.no_grad()
    def finish(self) -> None:
        """Update the drawn slots that got no gradient of the task's, and be ready for the next pass."""
        for name, slot in self._draw().items():
            if name not in self.done and self.penalty is not None:
                slot.refresh()
                self.penalty.add_to([slot])
                self.update.apply([slot])
                slot.proxy.grad = None
        self.restart()

    def restart(self) -> None:
        """Be ready for the next pass, whatever this one has come to."""
        self.done.clear()
        self.drawn = None

    def _draw(self) -> dict[str, Slot]:
        if self.drawn is None:
            self.drawn = {} if self.penalty is None else {s.name: s for s in self.penalty.draw(self.slots())}
        return self.drawn


def _untogether(count: int) -> str:
    return (
        f"in_backward=True uses each gradient before the {count} processes could take its mean; give "
        "in_backward=False, or shard the model with fully_shard"
    )


def check_in_backward(slots: Iterable[Slot], update: Update) -> None:
    """ConfigError where updates in the backward pass would be wrong."""
    slots = list(slots)
    if ranks() > 1 and any(slot.part is None for slot in slots):
        raise ConfigError(_untogether(ranks()))
    if not update.per_tensor:
        raise ConfigError(
            f"in_backward=True needs a rule that treats each tensor by itself, which {type(update.rule).__name__} is "
            "not known to do; take AdamW or another rule of torch.optim, or in_backward=False"
        )
    if several := [slot.name for slot in slots if len(slot.params) > 1]:
        raise ConfigError(
            f"in_backward=True cannot tell when the gradient of '{several[0]}' is complete: several Parameters "
            "share its storage; tie the whole Parameter, or give in_backward=False"
        )
