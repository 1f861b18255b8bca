"""EVA: A starts on the directions in which the layer's inputs vary most, B at zero.

"Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv 2410.07170. With v_j, sigma_j the right
singular vectors and the singular values of the inputs X (tokens, in) of the layer in the base model:

    A = [v_1 ... v_r]ᵀ (r, in)      B = 0      whiten: row j is v_j / sqrt(sigma_j)

With B = 0, E|dL/dB|² is proportional to tr(A E[x xᵀ] Aᵀ), which these directions make largest, if they are those of
inputs that were not centred; `fallow.probe` centres them as both official codes do, unless it is told otherwise.

Both codes whiten in place, so that layers that share an input (query, key, value) are divided once for each of them;
here once. A direction in which nothing varies keeps its length 1, as there is nothing to divide by. Where no direction
varies (a constant input) the rows are random ones, orthonormal. The rank of each layer is `fallow.EVARanks`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fallow.core.delta import Site, one_of
from fallow.core.errors import DataError
from fallow.core.start_factors import check_statistics, complement
from fallow.core.starting import Pair, Start
from fallow.core.statistics import Statistics


@dataclass(frozen=True)
class EVA(Start):
    """`statistics`: of `fallow.probe(model, batches, want={"activation"})`. `whiten`: divide each direction by the root
    of its singular value, which the paper finds to help in vision.
    """

    name: ClassVar[str] = "eva"
    needs: ClassVar[str] = "statistics with the components of inputs, start=fallow.EVA(statistics)"

    statistics: Statistics
    whiten: bool = False

    def __post_init__(self) -> None:
        check_statistics("statistics", self.statistics, "activation")
        one_of("whiten", self.whiten, (True, False))

    def pair(self, site: Site, rank: int, scale: float) -> Pair:
        found = self.statistics.at(site, "activation").activation
        assert found is not None
        if rank > len(found.directions):
            raise DataError(
                f"rank={rank} of '{site.name}' is above the {len(found.directions)} directions of its inputs in these "
                "statistics; give fallow.probe more components, or the adapter a lower rank"
            )
        a = found.directions[:rank].to(site.device, site.dtype, copy=True)
        sizes = found.singular[:rank].to(a)
        if not bool(found.ratios.nan_to_num().any()):
            a = complement(a[:0], rank, site.generator(self.name))
        elif self.whiten:
            varies = sizes > torch.finfo(torch.float32).eps * found.singular[0]
            a = a / torch.where(varies, sizes, 1.0).sqrt().unsqueeze(1)
        return Pair(None, a)
