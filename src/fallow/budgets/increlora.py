"""IncreLoRA: every weight starts at rank 1, and rank is added during training where it is worth most.

"IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning", arXiv 2308.12043. With M
weights D = s B diag(g) A (out, in) and G = dL/dD:

    each step     I = sum |D * G| / sqrt(out in)      mean <- b1 mean + (1 - b1) I
                                                      spread <- b2 spread + (1 - b2) |I - mean|
    at step t > begin, t a multiple of `every`, until sum r = M rank:
                  the `top` weights of the largest mean * spread get `step` more ranks

    fallow.attach(model, "adalora", rank=4, budget="increlora")     the full method; rank: the mean in the end
    fallow.attach(model, "lora", rank=4, budget="increlora")        fresh A and zero B at each growth

In AdaLoRA's form the next `step` triplets of each weight are in reserve: g = 1e-5 held, A and B trained, so that they
know a direction when they are needed. All that a weight may need is laid out beforehand, `ceiling`, and `stage` says
what takes part. So nothing changes its shape: optimizers of any kind, DistributedDataParallel and checkpoints are as
without a budget; moments of what was there stay, those of what comes are zero. The price is memory for the ceiling,
2 rank or rank + 8 by default, and hardly time. LoRA and SoRA grow for real, at no price, but for what
`fallow.core.regrowth` cannot do: several processes, and optimizers with states of other shapes.

New ranks start anew, warming up over `warmup` steps to the full learning rate; where the optimizer has a schedule and
the length of the run is known they then fall to zero linearly at its end, as the paper's. See `fallow.core.pacing`.

Departures: s stays; the official s = alpha / (r + 1e-5) makes D of a weight jump when it grows (`compat_scale` scales g
so). The last growth takes what is left, where the official code passes the budget by. Equal scores go to the weight
that comes first. Each I counts as a share of the step's sum over all weights, so that loss scales, and gradients that
shrink over the run, do not count; `absolute` takes it as it is. Of an accumulation every pass counts, as a sum of their
I, and of several processes the mean. Growth comes after the optimizer's step, not before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fallow.budgets.growing import Growing
from fallow.core.budgeting import Budget
from fallow.core.delta import Delta, number, one_of, whole
from fallow.core.errors import ConfigError


@dataclass
class IncreLoRA(Budget):
    """`first`: rank at the start. `step`: ranks of one growth; None for half the mean rank, which the paper has.
    `top`: how many weights grow at a time, or which share of them. `begin`: the last step, or share of the run, without
    growth. `every`: steps between two growths; None spreads them evenly until `end`, a share of the run. `warmup`:
    steps of new ranks until they learn at the full rate; None for `every`. `beta1`, `beta2`: of the two means. `score`:
    "exact", as above, or "gates", the sum over ranks of |<B_k, dL/dB_k>|, which is at hand. `score_every`: steps from
    one score to the next. `reserve`: whether ranks learn before they are needed. `ceiling`: the largest rank of a
    weight in AdaLoRA's form.
    """

    name: ClassVar[str] = "increlora"

    first: int = 1
    step: int | None = None
    top: int | float = 0.05
    begin: int | float = 0.1
    end: float = 0.6
    every: int | None = None
    warmup: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    score: Literal["exact", "gates"] = "exact"
    score_every: int = 1
    absolute: bool = False
    reserve: bool = True
    ceiling: int | None = None
    compat_scale: bool = False

    def __post_init__(self) -> None:
        whole("first", self.first)
        whole("score_every", self.score_every)
        for name in ("step", "every", "ceiling"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name))
        if self.warmup is not None:
            whole("warmup", self.warmup, 0)
        for name in ("top", "begin"):
            share = isinstance(getattr(self, name), float)
            number(name, getattr(self, name), most=1.0, open_below=name == "top") if share else whole(
                name, getattr(self, name), int(name == "top")
            )
        number("end", self.end, most=1.0, open_below=True)
        if isinstance(self.begin, float) and self.begin >= self.end and self.every is None:
            raise ConfigError(f"begin={self.begin} must be before end={self.end}; both are shares of the run")
        number("beta1", self.beta1, most=1.0)
        number("beta2", self.beta2, most=1.0)
        one_of("score", self.score, ("exact", "gates"))
        for name in ("absolute", "reserve", "compat_scale"):
            one_of(name, getattr(self, name), (True, False))
        self._mean = 0

    def ranks(self, shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, int]:
        """The ceilings, none above what its weight can have."""
        if rank < self.first:
            raise ConfigError(f"rank={rank} is the mean rank in the end, below first={self.first} of the start")
        ceiling = max(2 * rank, rank + 8) if self.ceiling is None else self.ceiling
        if ceiling < rank:
            raise ConfigError(f"ceiling={ceiling} is below the mean rank of {rank} that is to be reached; give more")
        self._mean = rank
        return {name: min(ceiling, *shape) for name, shape in shapes.items()}

    def follow(self, deltas: Mapping[str, Delta]) -> Growing:
        return Growing(self, deltas, self._mean)

    def growth(self, rank: int) -> int:
        """Ranks of one growth."""
        return max(1, round(rank / 2)) if self.step is None else self.step

    def at_once(self, weights: int) -> int:
        """Weights that grow together."""
        return min(weights, self.top) if isinstance(self.top, int) else max(1, round(self.top * weights))

    def due(self, weights: int, rank: int, total: int | None) -> tuple[int, int]:
        """The last step without growth, and the steps between two. ConfigError where they hang on an unknown total, or
        the run is too short for all growths.
        """
        if total is None and (self.every is None or isinstance(self.begin, float)):
            raise ConfigError(
                f"begin={self.begin}, every={self.every}: shares of a run whose length is not known; give whole steps, "
                "or tell it once: fallow.core.schedule.resolve(model, total)"
            )
        begin = self.begin if isinstance(self.begin, int) else round(self.begin * (total or 0))
        rounds = math.ceil((rank - self.first) * weights / (self.at_once(weights) * self.growth(rank)))
        every = self.every or max(1, int((self.end * (total or 0) - begin) / max(1, rounds)))
        last = (begin // every + rounds) * every
        if total is not None and rounds and last > total:
            raise ConfigError(
                f"{rounds} growths of {self.at_once(weights)} weights, one every {every} steps from {begin} on, end at "
                f"step {last} of a run of {total}; raise top= or step=, or lower begin= or every="
            )
        return begin, every
