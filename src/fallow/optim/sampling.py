"""Which of several things are drawn in interval 0, 1, 2, ...: without replacement, by weights, from a seed alone.

    random   the k with the largest log p + Gumbel noise, drawn anew for each interval
    cyclic   the same order over all of them, cut into parts: every one once in a cycle

The noise comes from (seed, number of the interval or cycle), so nothing needs to be kept and all ranks draw alike.
With a budget in place of k, things are taken in their order as long as they fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from fallow.core.delta import one_of, whole
from fallow.core.errors import ConfigError

Order = Literal["random", "cyclic"]


class Drawing:
    """Of `names` with `sizes` (numbers each). ConfigError, by name, for what cannot be drawn."""

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        active: int,
        budget: int | None,
        weights: Sequence[float] | None,
        order: Order,
        seed: int,
    ) -> None:
        one_of("order", order, get_args(Order))
        whole("active", active, most=len(names))
        whole("seed", seed, least=0)
        if budget is not None:
            whole("budget", budget)
            if max(sizes) > budget:
                largest = names[sizes.index(max(sizes))]
                raise ConfigError(
                    f"budget={budget} is below the {max(sizes)} parameters of '{largest}', which could never be trained"
                )
        self.names, self.sizes, self.active, self.budget = list(names), list(sizes), active, budget
        self.order, self.seed = order, seed
        self.weights = _checked(weights, names)

    def draw(self, interval: int) -> list[str]:
        """The names of an interval, in the order in which they were given."""
        if self.order == "random":
            return self._named(self._taken(self._ranked(interval)))
        cycle = 0
        while True:
            rest = self._ranked(cycle)
            while rest:
                taken = self._taken(rest)
                if interval == 0:
                    return self._named(taken)
                rest, interval = [index for index in rest if index not in taken], interval - 1
            cycle += 1

    def _ranked(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        uniform = torch.rand(len(self.names), dtype=torch.float64, generator=generator)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
        keys = torch.tensor([math.log(weight) for weight in self.weights], dtype=torch.float64) + gumbel
        return keys.argsort(descending=True).tolist()

    def _taken(self, ranked: list[int]) -> list[int]:
        if self.budget is None:
            return ranked[: self.active]
        taken, left = [], self.budget
        for index in ranked:
            if self.sizes[index] <= left:
                taken.append(index)
                left -= self.sizes[index]
        return taken

    def _named(self, taken: list[int]) -> list[str]:
        return [self.names[index] for index in sorted(taken)]


def _checked(weights: Sequence[float] | None, names: Sequence[str]) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    values = [float(weight) for weight in weights]
    if len(values) != len(names) or not all(0 < value < math.inf for value in values):
        raise ConfigError(
            f"weights={values} must be {len(names)} finite numbers above 0, one for each of {names[0]} to {names[-1]}"
        )
    return values
