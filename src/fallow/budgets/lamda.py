"""LaMDA++: layers whose weights have a flat spectrum get more rank, those of a steep one less; without any data.

"LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation", arXiv 2406.12832. With the
singular values s_1 >= s_2 >= ... of each weight, E(q) = sum_(j<=q) s_j² / sum_j s_j², r the mean rank:

    r_i = clamp(min{q: E_i(q) >= e}, least, most)       e: the largest for which sum r_i <= N r

What e leaves over goes, one rank at a time, to the layer with the least E_i(r_i). The paper's text could not be read in
full, and LaMDA++ is not in its code: the direction and this rule are ours, see `fallow.core.spectra`. A core (r, r) has
r_i² numbers, so uneven ranks of one sum hold more of them than even ones; `budget="params"` bounds sum r_i² by N r²
instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fallow.budgets.places import found_at
from fallow.core.budgeting import Budget
from fallow.core.delta import one_of, whole
from fallow.core.spectra import ranks_by_energy
from fallow.core.start_factors import check_statistics
from fallow.core.statistics import Statistics


@dataclass(frozen=True)
class LaMDARanks(Budget):
    """`statistics`: of `fallow.probe(model, [], want={"spectrum"})`, which needs no batches. `least`, `most`: of any
    layer; half and twice the mean where they are None. `budget`: "rank" bounds the sum of ranks, "params" that of their
    squares.
    """

    name: ClassVar[str] = "lamda"
    needs: ClassVar[str] = "statistics with the spectra of weights, budget=fallow.LaMDARanks(statistics)"

    statistics: Statistics
    least: int | None = None
    most: int | None = None
    budget: Literal["rank", "params"] = "rank"

    def __post_init__(self) -> None:
        check_statistics("statistics", self.statistics, "spectrum")
        for name in ("least", "most"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name))
        one_of("budget", self.budget, ("rank", "params"))

    def ranks(self, shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, int]:
        most = 2 * rank if self.most is None else self.most
        found = found_at(self.statistics, shapes, "spectrum")
        held = {name: _energies(one.spectrum, most) for name, one in found.items() if one.spectrum is not None}
        return ranks_by_energy(held, rank, self.least, most, self.budget)


def _energies(values: Tensor, most: int) -> Tensor:
    """E(1), ..., E(most) of all singular values (k,), float64; 1 throughout for a zero matrix."""
    held = values.double().square().cumsum(0)
    return held[:most] / held[-1] if held[-1] > 0 else torch.ones_like(held[:most])
