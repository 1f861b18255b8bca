"""Trion: Muon's update of r columns of a cosine basis, with what is left kept in the momentum.

"Trion: FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of LLMs", arXiv 2505.17967 (ICLR 2026).

    B = M + G      b = r rows of C B (d, n)      M <- B - (1 - mu) P b      O = polar(b)
    W <- (1 - lr wd) W - lr sqrt(out / in) P O                              states: M, as large as W

The polar factor is that of an (r, n) matrix, so its cost falls with r. Everything that is no projected matrix takes
AdamW at `plain_scale` times the rate. Departure: the polar factor comes from Polar Express (`core.linalg`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fallow.optim.lowrank import LowRank


class Trion(LowRank):
    """A `LowRank` with the paper's defaults; see there for the other options.

    `momentum`: mu. `adjust`: the size of an update, dion | kj | kimi | none (`optim.inner.polar`). The default
    `plain_scale` makes AdamW's rate the official 3e-4 at lr=0.02.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.02,
        rank: int | float | None = 256,
        *,
        momentum: float = 0.95,
        adjust: str = "dion",
        basis: Any = None,
        refresh_every: int = 1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        plain_scale: float = 0.015,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            rank,
            basis={"name": "dct", "norm": 1} if basis is None else basis,
            inner={"name": "polar", "momentum": 0.0, "adjust": adjust},
            residual={"name": "momentum", "momentum": momentum},
            plain_inner="adamw",
            refresh_every=refresh_every,
            betas=betas,
            eps=eps,
            plain_scale=plain_scale,
            **options,
        )
