"""EVA's ranks: each rank goes to the direction that explains most of the variance of its layer's inputs.

"Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv 2410.07170. Of N layers, mean rank r:

    ratio_ij   share of the variance that direction j of layer i explains, j = 1 ... q_i
    q_i        min(round(rho r), out, in)
    r_i        how many of the N r largest of all ratios are layer i's: 0 <= r_i <= q_i, sum r_i = N r

Ties go to the earlier layer, so that of layers that share an input the first never has the lower rank (the codes swap
ranks for that). An input that does not vary has no share, not NaN, which breaks the codes' order. Where layers are so
small that sum q_i < N r, all get their q_i. s = alpha / r is the same in all layers, as with PEFT's
adjust_scaling_factors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fallow.budgets.places import found_at
from fallow.core.budgeting import Budget
from fallow.core.delta import number, whole
from fallow.core.errors import ConfigError, DataError
from fallow.core.start_factors import check_statistics
from fallow.core.statistics import Statistics


@dataclass(frozen=True)
class EVARanks(Budget):
    """`statistics`: of `fallow.probe(model, batches, want={"activation"})`. `rho`: how much more than the mean a layer
    may get; 1 gives all the same, and the paper sees no change above 2. `least`: what every layer gets in any case.
    """

    name: ClassVar[str] = "eva"
    needs: ClassVar[str] = "statistics with the components of inputs, budget=fallow.EVARanks(statistics)"

    statistics: Statistics
    rho: float = 2.0
    least: int = 0

    def __post_init__(self) -> None:
        check_statistics("statistics", self.statistics, "activation")
        number("rho", self.rho, 1.0)
        whole("least", self.least, 0)

    def ranks(self, shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, int]:
        if self.least > rank:
            raise ConfigError(f"least={self.least} is above the mean rank={rank}; lower it")
        pooled: list[tuple[bool, float, str]] = []
        for name, found in found_at(self.statistics, shapes, "activation").items():
            most, activation = min(round(self.rho * rank), *shapes[name]), found.activation
            assert activation is not None
            if len(activation.ratios) < most:
                raise DataError(
                    f"rho={self.rho} and rank={rank} ask for {most} directions of the inputs of '{name}', and these "
                    f"statistics have {len(activation.ratios)}; give fallow.probe more components, or a lower rho"
                )
            ratios = activation.ratios[:most].nan_to_num(0.0).tolist()
            pooled += [(j < self.least, ratio, name) for j, ratio in enumerate(ratios)]
        pooled.sort(key=lambda one: one[:2], reverse=True)  # stable: ties stay in the order of the layers
        chosen = Counter(name for *_, name in pooled[: rank * len(shapes)])
        return {name: chosen[name] for name in shapes}
