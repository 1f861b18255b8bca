"""FRUGAL: a share of the gradient gets Adam's states, all the rest moves by its sign.

"FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training", arXiv 2411.07837 (ICML 2025).

    basis="block"         whole matrices have states, others none, changing every `refresh_every` steps
    basis="coordinates"   columns with side="right", rows with "left"; "entries" single ones, "svd", "random" spaces
    W <- (1 - lr wd) W - lr ( scale P AdamW(Pᵀ G) + scale share sign(G - P Pᵀ G) )        states 2 rank |W|

and states start anew at each change. Departures, beside those of `optim.residuals.free`: a block's counter is the
group's, so a matrix without gradients does not shift the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fallow.core.errors import ConfigError
from fallow.optim.lowrank import LowRank


class FRUGAL(LowRank):
    """A `LowRank` with the paper's defaults for pretraining; see there for the other options.

    `rank`: the share with states, the paper's rho, 0 for none. `share`: of the rate that what has no states moves at,
    1 for pretraining, 0.1 for fine-tuning. `free`: sign | sgd, their rule, or None to leave it where it is.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        rank: int | float | None = 0.25,
        *,
        basis: Any = None,
        free: str | None = "sign",
        share: float = 1.0,
        refresh_every: int = 200,
        moments: str = "reset",
        scale: float = 1.0,
        **options: Any,
    ) -> None:
        if free not in ("sign", "sgd", None):
            raise ConfigError(f"free={free!r} must be sign, sgd or None")
        residual = "drop" if free is None else {"name": free, "share": float(share * scale)}
        basis = {"name": "block", "order": "descending"} if basis is None else basis
        more: dict[str, Any] = {
            "basis": basis,
            "residual": residual,
            "refresh_every": refresh_every,
            "moments": moments,
        }
        super().__init__(params, lr, rank, scale=scale, **more, **options)
