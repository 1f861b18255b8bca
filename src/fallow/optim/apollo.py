"""APOLLO: gradients scaled as Adam would scale a small random projection of them.

"APOLLO: SGD-like Memory, AdamW-level Performance", arXiv 2412.05270 (MLSys 2025).

    R = Pᵀ G (r, n), P (d, r) Gaussian, from a seed      s_j = ||AdamW(R)_j|| / ||R_j|| for each column j
    W <- W - lr sqrt(scale) s o G,   its norm growing by at most 1.01 a step       states 2 r n, and two numbers

APOLLO-Mini has rank 1 and one s for the matrix: states of 2 n numbers. Departure: P is drawn again from its seed in
every step, where the official code keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fallow.optim.lowrank import LowRank


class APOLLO(LowRank):
    """A `LowRank` with the paper's defaults for pretraining; see there for the other options.

    `level`: channel | tensor. `front`: apply sqrt(scale) before the limiter, as the official `scale_front`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.01,
        rank: int | float | None = 256,
        *,
        level: str = "channel",
        front: bool = False,
        basis: Any = "gaussian",
        refresh_every: int = 200,
        scale: float = 1.0,
        eps: float = 1e-6,
        **options: Any,
    ) -> None:
        residual = {"name": "apollo", "level": level, "front": front}
        more: dict[str, Any] = {"basis": basis, "refresh_every": refresh_every, "scale": scale, "eps": eps}
        super().__init__(params, lr, rank, residual=residual, **more, **options)


class APOLLOMini(APOLLO):
    """APOLLO with rank 1, one scale for each matrix and `scale` 128."""

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.01,
        rank: int | float | None = 1,
        *,
        level: str = "tensor",
        scale: float = 128.0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, rank, level=level, scale=scale, **options)
