"""CoLoRA's ranks: a layer gets numbers in proportion to what its weights contributed to learning the task.

"Contribution-based Low-Rank Adaptation with Pre-training Model for Real Image Restoration", arXiv 2408.01099. c_i is
the mean of |integrated gradients| (FAIG) over the weights of layer i (d, k), on the path from the pretrained network to
one tuned on the task, ĉ_i = c_i / max c:

    delta_i = clip(alpha ĉ_i^beta, floor, 1)      alpha: such that sum delta_i d k = budget
    r_i     = delta_i d k / (d + k), rounded down; the rest one by one, to the layer furthest below its share

No rank that fits is left over, and the budget is never exceeded. Layers that contributed nothing get nothing; where
none did, all count alike. Where a pair would be as large as the weight, r (d + k) >= d k, the whole weight is to be
trained: `plan` names those layers. `ranks` gives them the largest pair that is smaller than the weight, since an
adapter of pairs is what it is for.

Only the abstract, the figures and a summary of the paper could be read: this clip, the mean in c_i and the rounding are
ours, chosen to fit what is known (alpha and beta scale a ratio per layer; 7 % of the weights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fallow.budgets.places import found_at
from fallow.core.budgeting import Budget
from fallow.core.delta import number, whole
from fallow.core.errors import ConfigError, DataError
from fallow.core.start_factors import check_statistics
from fallow.core.statistics import Statistics

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Plan:
    """`ranks`: of each layer, 0 where it is frozen. `dense`: those whose whole weight is trained, at rank ceil(d k / (d
    + k)). `trained`: how many numbers that is, of the `budget`.
    """

    ranks: dict[str, int]
    dense: frozenset[str]
    trained: int
    budget: int


@dataclass(frozen=True)
class CoLoRARanks(Budget):
    """`statistics`: of `fallow.probe(model, batches, want={"contribution"}, tuned=...)`, or several of them, one for
    each task, whose ĉ_i are averaged. `share`: of the weights' numbers that is trained, the paper's being 0.07; None
    for as many as `rank` in every layer would be. `sharpness`: beta. `floor`: the least share of any layer. `least`:
    its least rank.
    """

    name: ClassVar[str] = "colora"
    needs: ClassVar[str] = "statistics with the contributions of layers, budget=fallow.CoLoRARanks(statistics)"

    statistics: Statistics | Sequence[Statistics]
    share: float | None = None
    sharpness: float = 1.0
    floor: float = 0.0
    least: int = 0

    def __post_init__(self) -> None:
        for one in self._tasks():
            check_statistics("statistics", one, "contribution")
        if self.share is not None:
            number("share", self.share, most=1.0, open_below=True)
        number("sharpness", self.sharpness, open_below=True)
        number("floor", self.floor, most=1.0)
        whole("least", self.least, 0)

    def ranks(self, shapes: Shapes, rank: int) -> dict[str, int]:
        plan = self.plan(shapes, rank)
        return {
            name: min(r, d * k // (d + k))
            for (name, r), (d, k) in zip(plan.ranks.items(), shapes.values(), strict=True)
        }

    def plan(self, shapes: Shapes, rank: int = 8) -> Plan:
        """What is trained in each layer of this (out, in). ConfigError where `floor` or `least` alone exceed the
        budget."""
        scores, whole_of = self.scores(shapes), {name: d * k for name, (d, k) in shapes.items()}
        if self.share is None:
            budget = sum(min(rank * (d + k), d * k) for d, k in shapes.values())
        else:
            budget = int(self.share * sum(whole_of.values()))
        shares = self._shares(scores, shapes, budget)
        full = {name: -(-whole_of[name] // sum(shape)) for name, shape in shapes.items()}  # the rank that is dense
        wanted = {name: shares[name] * whole_of[name] / sum(shape) for name, shape in shapes.items()}
        ranks = {name: max(min(int(wanted[name]), full[name]), min(self.least, full[name])) for name in shapes}

        def cost(name: str, r: int) -> int:
            return min(r * sum(shapes[name]), whole_of[name])

        trained = sum(cost(name, r) for name, r in ranks.items())
        growing = [name for name in shapes if shares[name] > 0 and ranks[name] < full[name]]
        while growing:
            name = max(growing, key=lambda name: wanted[name] - ranks[name])  # ties: the earlier layer
            more = cost(name, ranks[name] + 1) - cost(name, ranks[name])
            if trained + more <= budget:
                ranks[name], trained = ranks[name] + 1, trained + more
            else:
                growing.remove(name)
            if ranks[name] == full[name] and name in growing:
                growing.remove(name)
        return Plan(ranks, frozenset(name for name, r in ranks.items() if r == full[name]), trained, budget)

    def scores(self, shapes: Shapes) -> dict[str, float]:
        """ĉ_i, the mean over the tasks; 1 everywhere where nothing contributed."""
        mean = dict.fromkeys(shapes, 0.0)
        tasks = self._tasks()
        for one in tasks:
            found = {name: layer.contribution or 0.0 for name, layer in found_at(one, shapes, "contribution").items()}
            for name, value in found.items():
                if not 0 <= value < float("inf"):
                    raise DataError(f"the contribution of '{name}' is {value}, which is none; probe it again")
            largest = max(found.values(), default=0.0)
            for name, value in found.items():
                mean[name] += value / largest / len(tasks) if largest else 0.0
        return mean if any(mean.values()) else dict.fromkeys(shapes, 1.0)

    def _tasks(self) -> Sequence[Statistics]:
        if isinstance(self.statistics, list | tuple):
            if not self.statistics:
                raise ConfigError("statistics=[] names no task; give those of one or more")
            return self.statistics
        return [self.statistics]  # type: ignore[list-item]

    def _shares(self, scores: Mapping[str, float], shapes: Shapes, budget: int) -> dict[str, float]:
        """delta_i"""
        raised = {name: score**self.sharpness for name, score in scores.items()}
        lowest = {name: max(self.floor, min(1.0, self.least * (d + k) / (d * k))) for name, (d, k) in shapes.items()}

        def at(alpha: float) -> dict[str, float]:
            return {name: min(max(alpha * raised[name], lowest[name]), 1.0) for name in shapes}

        def spent(alpha: float) -> float:
            return sum(delta * shapes[name][0] * shapes[name][1] for name, delta in at(alpha).items())

        if spent(0.0) > budget:
            raise ConfigError(
                f"floor={self.floor} and least={self.least} alone train {spent(0.0):,.0f} numbers of a budget of "
                f"{budget:,}; lower them, or raise the share"
            )
        low, high = 0.0, 1 / min(value for value in raised.values() if value > 0)
        if spent(high) <= budget:
            return at(high)
        while low < (middle := (low + high) / 2) < high:
            low, high = (middle, high) if spent(middle) <= budget else (low, middle)
        return at(low)
