"""The passes of `fallow.probe`: each batch once, and what it gives to whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fallow.core.errors import ConfigError, DataError
from fallow.core.probing.batches import (
    Loss,
    forward,
    label_tokens,
    loss_of,
    masks_of,
    moved,
    samples,
)
from fallow.core.probing.borrowing import borrowed
from fallow.core.probing.contribution import Contribution
from fallow.core.probing.files import Place, read_state, write_state
from fallow.core.probing.gradients import Gradients
from fallow.core.probing.inputs import Inputs
from fallow.core.probing.layers import Layer
from fallow.core.probing.options import OF_GRADIENTS, OF_INPUTS, Options
from fallow.core.probing.source import EMPTY, Source, digest_of


@dataclass(frozen=True)
class Keeping:
    """Where the state of a run is kept, and what it is known by. `digests`: of all batches, where they are known."""

    path: Path
    key: str
    digests: Sequence[str] | None


class Run:
    """One run over the batches; afterwards `inputs`, `gradients`, `contribution` hold the sums of this rank."""

    def __init__(
        self, model: nn.Module, layers: list[Layer], want: frozenset[str], loss: Loss | None, options: Options
    ) -> None:
        self.model, self.want, self.loss, self.options = model, want, loss, options
        self.device = layers[0].parameter.device
        self.inputs = Inputs(layers, want & OF_INPUTS, options)
        self.gradients = Gradients(layers if want & OF_GRADIENTS else [], want & OF_GRADIENTS, options)
        self.contribution: Contribution | None = None
        if "contribution" in want and options.tuned is not None:
            self.contribution = Contribution(model, layers, options.tuned, options.points)
        self.place = Place()

    def __call__(self, source: Source, keeping: Keeping | None, step: Callable[[int, int], None]) -> None:
        """Go through the batches; `step(turn, done)` after each. DataError where there are none."""
        if keeping is not None:
            held = read_state(keeping.path, keeping.key, self.inputs, self.gradients, self.contribution)
            self.place = held or self.place
        trained = {id(p): p for p in self.gradients.parameters}
        trained |= {} if self.contribution is None else {id(p): p for p in self.contribution.parameters}
        with borrowed(self.model, list(trained.values()), self.options.train), ExitStack() as hooks:
            hooks.callback(self.gradients.leave)
            hooks.callback(self.inputs.leave)
            self.gradients.watch()
            self.inputs.watch()
            for turn in range(self.place.turn, self.options.passes):
                if turn and self._ready(turn):
                    break
                self._turn(turn, source, keeping, step)
        if not self.place.batches:
            raise DataError(EMPTY)

    def _ready(self, turn: int) -> bool:
        """Before a pass after the first, in which only components are gathered."""
        self.inputs.active = frozenset({"activation"})
        return self.inputs.settled()

    def _turn(self, turn: int, source: Source, keeping: Keeping | None, step: Callable[[int, int], None]) -> None:
        skipped = self.place.done if self.place.turn == turn else 0
        self.place.turn, self.place.done = turn, skipped
        for number, batch in enumerate(source):
            if keeping is not None and keeping.digests is not None:
                _same(keeping.digests, number, batch)
            if number < skipped:
                continue
            self.one(moved(batch, self.device), first=turn == 0)
            self.place.done += 1
            self.place.batches += turn == 0
            step(turn, self.place.done)
            if self.inputs.active == {"activation"} and not self._others(turn) and self.inputs.settled():
                break
            every = self.options.save_every
            if keeping is not None and every and self.place.done % every == 0:
                write_state(keeping.path, keeping.key, self.place, self.inputs, self.gradients, self.contribution)

    def _others(self, turn: int) -> bool:
        """Whether something else than components is gathered in this pass."""
        return turn == 0 and bool(self.want - {"activation", "spectrum"})

    # -- one batch ----------------------------------------------------------------------------------------------------

    def one(self, batch: Any, first: bool = True) -> None:
        """Everything that is asked of a batch; only what is gathered of inputs where it is not the `first` time."""
        options = self.options
        take = (self.want & OF_GRADIENTS) if first else frozenset()
        take -= {"fisher"} if options.per_sample else frozenset()
        self.inputs.begin(masks_of(batch, options.mask) if self.inputs.want else ())
        try:
            if take:
                self._backward(batch, take, label_tokens(batch, options.tokens) if "fisher" in take else 1.0)
            elif self.inputs.want:
                with torch.no_grad():
                    forward(self.model, batch, self.loss)
        finally:
            self.inputs.end()
        if first and "fisher" in self.want and options.per_sample:
            for sample in samples(batch):
                self._backward(sample, frozenset({"fisher"}), label_tokens(sample, options.tokens))
        if first and self.contribution is not None:
            loss = partial(loss_of, loss=self.loss)
            for sample in samples(batch):
                self.contribution.add(self.model, loss, sample, options.loss_scale)

    def _backward(self, batch: Any, take: frozenset[str], counts: float) -> None:
        self.gradients.begin(take, counts)
        with torch.enable_grad():
            value = loss_of(self.model, batch, self.loss)
        self.inputs.end()
        if not value.requires_grad:
            raise ConfigError(
                "the loss does not depend on any of the weights that are probed, or was made without gradients "
                "(torch.no_grad, .item()); look at loss= and at the targets"
            )
        (value * self.options.loss_scale).backward()
        self.gradients.end()


def _same(digests: Sequence[str], number: int, batch: Any) -> None:
    if number >= len(digests) or digests[number] != digest_of(batch):
        raise DataError(
            f"batch {number} is another one than when the batches were read through for the cache: they are shuffled, "
            "or drawn anew each time; give them in one order (shuffle=False, a seed), or data='a name' for them"
        )
