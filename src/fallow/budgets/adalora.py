"""AdaLoRA: every weight starts with more rank than is left in the end, and triplets that matter least are zeroed.

"AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512. For each number w of A, B
and g of AdaLoRA's form, W' = W + s B diag(g) A, with M weights of `first` times `rank` triplets:

    each step        I = |w dL/dw|       mean <- b1 mean + (1 - b1) I      spread <- b2 spread + (1 - b2) |I - mean|
    of a triplet     S = (mean spread)(g_k) + average of (mean spread) over B_k + the same over A_k
    every `every` steps of begin < t <= end     all but the b(t) best triplets of the model have their g zeroed;
                     b(t) = M rank + (M first rank - M rank) (1 - (t - begin) / (end - begin))^3
    from end on      those that are left are trained on

A zeroed g is trained on and may return, until `end`. `fallow.trim` cuts in the end what is zero.

    fallow.attach(model, "adalora", rank=8, budget="adalora")      rank: the mean in the end

Departures: exactly b(t) triplets stay, equal scores of the first ones, where PEFT zeroes all that do not exceed the
score of the last. I is taken with the weights before the optimizer's step, as in the paper; PEFT takes those after it.
After `end` the zeroed g have no gradient. The two means are as large as the adapter, twice, and are no part of its
file: `state_dict()` holds them, and without it a resumed run gathers them anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fallow.budgets.pruning import Pruning
from fallow.core.budgeting import Budget
from fallow.core.delta import Delta, number, whole
from fallow.core.errors import ConfigError


@dataclass
class AdaLoRARanks(Budget):
    """`first`: how many times the mean rank of the end there is at first. `begin`, `end`: between which steps, or
    shares of the run, rank is taken. `every`: steps between two decisions. `beta1`, `beta2`: of the two means.
    """

    name: ClassVar[str] = "adalora"

    first: float = 1.5
    begin: int | float = 0.1
    end: int | float = 0.7
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        number("first", self.first, 1.0)
        for name in ("begin", "end"):
            value = getattr(self, name)
            whole(name, value, 0) if isinstance(value, int) else number(name, value, most=1.0)
        if type(self.begin) is type(self.end) and self.begin >= self.end:
            raise ConfigError(f"begin={self.begin} must be before end={self.end}")
        whole("every", self.every)
        number("beta1", self.beta1, most=1.0)
        number("beta2", self.beta2, most=1.0)
        self._mean = 0

    def ranks(self, shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, int]:
        """At first, none above what its weight can have."""
        self._mean = rank
        return {name: min(math.ceil(self.first * rank), *shape) for name, shape in shapes.items()}

    def follow(self, deltas: Mapping[str, Delta]) -> Pruning:
        return Pruning(self, deltas, self._mean)

    def bounds(self, total: int | None) -> tuple[int, int]:
        """The last step before rank is taken, and the last in which it is. ConfigError where they hang on an unknown
        total, or are none within it.
        """
        if total is None and (isinstance(self.begin, float) or isinstance(self.end, float)):
            raise ConfigError(
                f"begin={self.begin}, end={self.end}: shares of a run whose length is not known; give whole steps, or "
                "tell it once: fallow.core.schedule.resolve(model, total)"
            )
        begin, end = (round(at * (total or 0)) if isinstance(at, float) else at for at in (self.begin, self.end))
        if begin >= end or (total is not None and end > total):
            raise ConfigError(f"begin={self.begin} and end={self.end} are the steps {begin} and {end} of {total}")
        return begin, end
