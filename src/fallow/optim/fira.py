"""Fira: GaLore's memory with updates of full rank.

"Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", arXiv 2410.01623.

    N = psi(R), R = Pᵀ G (r, n)      phi_i = ||N_i|| / ||R_i|| for each column i      S = phi o (G - P R)
    W <- W - lr ( scale P N + S ),   ||S|| growing by at most 1.01 a step             states GaLore's, and one number

Departures stand in `optim.residuals.fira`; residual={"name": "fira", "exact": False} is the official residual, with
which the paper's numbers were made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fallow.optim.lowrank import LowRank
from fallow.optim.residuals.residual import Residual


class Fira(LowRank):
    """A `LowRank` with the paper's defaults for pretraining; see there for the other options.

    For fine-tuning: scale 1, and a rate like AdamW's.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.01,
        rank: int | float | None = 128,
        *,
        residual: str | Mapping[str, Any] | Residual = "fira",
        refresh_every: int = 200,
        scale: float = 0.25,
        eps: float = 1e-6,
        **options: Any,
    ) -> None:
        more: dict[str, Any] = {"residual": residual, "refresh_every": refresh_every, "scale": scale, "eps": eps}
        super().__init__(params, lr, rank, **more, **options)
