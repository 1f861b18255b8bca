"""One weight whose rank can grow: within what was laid out for it, by stages, or for real.

`ages(name)`: of each rank the step in which that tensor of it began to be trained; 0 from the start, None not yet.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from fallow.core.delta import Delta
from fallow.core.distributed import ranks
from fallow.core.errors import ConfigError
from fallow.core.regrowth import resized
from fallow.core.sensitivity import Observed

HELD = 1e-5  # g of triplets in reserve
DIMENSION = {"A": 0, "B": 1, "gate": 0}


class Growable:
    """`score` (2,): means of sensitivity and uncertainty. `most`: the largest rank it can have."""

    score: Tensor
    most: int

    def __init__(self, name: str, delta: Delta, exact: bool) -> None:
        self.name = name
        self.delta: Any = delta
        self.observed = Observed(delta) if exact else None
        self.sum: Tensor | None = None

    def parameters(self) -> dict[str, tuple[nn.Parameter, int]]:
        held = self.delta._parameters
        return {
            name: (cast(nn.Parameter, held[name]), dim) for name, dim in DIMENSION.items() if held.get(name) is not None
        }

    def gather(self, held: set[int]) -> None:
        """Take the cheap score of this step's gradients: the sum over ranks of |<B_k, dL/dB_k>|, which is |g_k dL/dg_k|
        where there are gates.
        """
        param = cast(nn.Parameter, self.delta._parameters.get("gate", self.delta.B))
        if id(param) in held and param.grad is not None:
            each = param.detach() * param.grad
            self.sum = (each if each.dim() == 1 else each.sum(0)).abs().sum().float()

    def observe(self, on: bool) -> None:
        """Whether the passes of the next step are scored."""
        if self.observed is not None:
            self.observed.on = on

    def taken(self) -> Tensor:
        """I of the passes since this was asked last, 0 where there were none."""
        found, self.sum = (self.observed.taken(), None) if self.observed is not None else (self.sum, None)
        size = math.sqrt(self.delta.view.shape[0] * self.delta.view.shape[1])
        return self.score.new_zeros(()) if found is None else found / size

    def finish(self) -> None:
        """No more growth: nothing is in reserve, nothing is observed."""
        if self.observed is not None:
            self.observed.stop()
            self.observed = None

    @property
    def rank(self) -> int:
        raise ConfigError(f"{type(self).__name__} does not write rank")

    def ages(self, name: str) -> list[int | None]:
        raise ConfigError(f"{type(self).__name__} does not write ages(name)")

    def runs(self, name: str) -> list[tuple[int, int, int | None]]:
        """(first, one after the last, age) of neighbours of one age, but for those that were there from the start."""
        found: list[tuple[int, int, int | None]] = []
        for i, born in enumerate(self.ages(name)):
            if found and found[-1][1:] == (i, born):
                found[-1] = (found[-1][0], i + 1, born)
            elif born != 0:
                found.append((i, i + 1, born))
        return found

    def grow(self, count: int, step: int) -> None:
        raise ConfigError(f"{type(self).__name__} does not write grow(count, step)")

    def restore(self, born: list[int | None], score: Tensor) -> None:
        raise ConfigError(f"{type(self).__name__} does not write restore(born, score)")

    @torch.no_grad()
    def shrink(self, count: int, factor: float) -> None:
        """The first ranks count `factor` times what they did."""
        tensor = self.delta._parameters.get("gate")
        param = cast(nn.Parameter, self.delta.B) if tensor is None else tensor
        param.narrow(param.dim() - 1, 0, count).mul_(factor)


class Staged(Growable):
    """AdaLoRA's form: all triplets are there, `stage` says which take part."""

    def __init__(self, name: str, delta: Any, first: int, reserve: int, exact: bool) -> None:
        super().__init__(name, delta, exact)
        self.reserve = reserve
        self._read: tuple[Any, ...] = ()
        self._runs: dict[str, list[tuple[int, int, int | None]]] = {}
        with torch.no_grad():
            if float(delta.gate.detach().abs().sum()):
                raise ConfigError(f"'{name}' does not start from g = 0, as budget='increlora' needs; leave start= out")
            delta.stage.zero_()
            delta.stage[:first] = 2
            self._set_aside(0)

    @property
    def score(self) -> Tensor:  # type: ignore[override]
        return cast(Tensor, self.delta.score)

    @property
    def most(self) -> int:  # type: ignore[override]
        return int(self.delta.stage.shape[0])

    def lists(self) -> tuple[list[int], list[list[int]]]:
        """`stage` and `born`, read from their device again only where they were written or exchanged."""
        held = (cast(Tensor, self.delta.stage), cast(Tensor, self.delta.born))
        seen = [(id(tensor), tensor._version) for tensor in held]
        if not self._read or self._read[0] != seen:
            self._read = (seen, held, held[0].tolist(), held[1].tolist())  # held, so that no other gets their ids
            self._runs = {name: Growable.runs(self, name) for name in DIMENSION}
        return self._read[2], self._read[3]

    def runs(self, name: str) -> list[tuple[int, int, int | None]]:
        self.lists()
        return self._runs[name]

    @property
    def rank(self) -> int:
        return sum(stage == 2 for stage in self.lists()[0])

    def ages(self, name: str) -> list[int | None]:
        stage, born = self.lists()
        least, row = (2, 1) if name == "gate" else (1, 0)
        return [at if there >= least else None for there, at in zip(stage, born[row], strict=True)]

    @torch.no_grad()
    def grow(self, count: int, step: int) -> None:
        """The reserve comes first, then fresh triplets, whose values were kept as they were drawn."""
        stage, _ = self.lists()
        waiting = sorted((i for i, at in enumerate(stage) if at < 2), key=lambda i: -stage[i])[:count]
        for i in waiting:
            if stage[i] == 0:
                self.delta.born[0, i] = step
            self.delta.stage[i], self.delta.born[1, i] = 2, step
        self._set_aside(step)

    def _set_aside(self, step: int) -> None:
        """Have as many in reserve as the next growth takes."""
        stage, _ = self.lists()
        there = [i for i, at in enumerate(stage) if at == 1]
        for i in [i for i, at in enumerate(stage) if at == 0][: max(0, self.reserve - len(there))]:
            self.delta.stage[i], self.delta.born[0, i], self.delta.gate[i] = 1, step, HELD

    @torch.no_grad()
    def finish(self) -> None:
        super().finish()
        for i, at in enumerate(self.lists()[0]):
            if at == 1:
                self.delta.stage[i], self.delta.gate[i] = 0, 0.0

    def restore(self, born: list[int | None], score: Tensor) -> None:
        """Its own tensors tell."""


class Resized(Growable):
    """LoRA and its kin: a growth adds a fresh row of A and a zero column of B."""

    def __init__(self, name: str, delta: Any, first: int, exact: bool) -> None:
        super().__init__(name, delta, exact)
        if ranks() > 1:
            raise ConfigError(
                f"'{delta.name}' grows by tensors of another shape, which several processes cannot train; attach "
                "'adalora' with budget='increlora', where all is laid out beforehand"
            )
        self.most = int(delta.o.rank)
        resized(delta, first)
        self.born: list[int | None] = [0] * first
        self.score = torch.zeros(2, device=delta.B.device)

    @property
    def rank(self) -> int:
        return int(self.delta.A.shape[0])

    def ages(self, name: str) -> list[int | None]:
        """Those of a rank that others have changed are not known; they are as from the start."""
        now = int(self.delta.A.shape[0])
        return list(self.born) if len(self.born) == now else [0] * now

    def grow(self, count: int, step: int) -> None:
        self.born = [*self.ages("A"), *[step] * count]
        resized(self.delta, self.rank + count)

    def restore(self, born: list[int | None], score: Tensor) -> None:
        resized(self.delta, len(born))
        self.born, self.score = list(born), score.to(self.score)
