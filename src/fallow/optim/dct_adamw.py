"""DCT-AdamW: AdamW's moments in columns of a fixed cosine basis, chosen anew in every step.

"FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of LLMs", arXiv 2505.17967 (ICLR 2026).

    S = C G (d, n), C the orthonormal DCT-II matrix (d, d)      the r rows of S with the largest norm are R
    N = AdamW(R), moments following their frequencies           W <- (1 - lr wd) W - lr Cᵀ[:, index] N

No decomposition and no stored projector: r whole numbers a matrix beside the moments. Departures stand in
`optim.bases.cosine`; moments turn with the basis by default, without which those of one frequency serve another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fallow.optim.lowrank import LowRank


class DCTAdamW(LowRank):
    """A `LowRank` with the paper's defaults; see there for the other options.

    `feedback`: keep what the basis did not hold for the next step, in a buffer of the weight's size. Matrices with a
    side above `largest_side` take AdamW.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        rank: int | float | None = 128,
        *,
        basis: Any = "dct",
        feedback: bool = False,
        refresh_every: int = 1,
        moments: str = "rotate",
        largest_side: int | None = 32000,
        **options: Any,
    ) -> None:
        more: dict[str, Any] = {
            "basis": basis,
            "refresh_every": refresh_every,
            "moments": moments,
            "largest_side": largest_side,
        }
        super().__init__(params, lr, rank, residual="feedback" if feedback else "drop", **more, **options)
