"""GaLore: Adam's moments of a low-rank projection of each gradient.

"GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv 2403.03507 (ICML 2024).

    every `refresh_every` steps   P (d, r) = the leading left singular vectors of G (d, n), d the shorter side
    every step                    R = Pᵀ G,  N = AdamW(R),  W <- W - lr scale P N        states r n + r n, and P r d

Departures: the vectors come from a randomised range finder and then from warm power steps (basis="svd" is the paper's);
columns of a new basis are turned towards the old ones, whose moments they take over (the sign of a singular vector is
arbitrary); eps is added as in the paper and torch (eps_mode="galore": as the official code, to the uncorrected root).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fallow.optim.lowrank import LowRank


class GaLore(LowRank):
    """A `LowRank` with the paper's defaults for pretraining; see there for the other options.

    `lr` is that of plain tensors, projected ones move at `scale` times it. For fine-tuning: rank 4 to 64, and a rate
    like AdamW's.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.01,
        rank: int | float | None = 128,
        *,
        refresh_every: int = 200,
        scale: float = 0.25,
        eps: float = 1e-6,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, rank, refresh_every=refresh_every, scale=scale, eps=eps, **options)
