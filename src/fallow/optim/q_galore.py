"""Q-GaLore: GaLore with quantised projectors and moments, refreshed only while the space still moves.

"Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients", arXiv 2407.08296.

    P in 4 bits, moments in 8; where a new space holds more than `lazy` of the old one, its gap doubles

Departures: P is kept as 4-bit NormalFloat, whose levels fit its entries, in place of a zero-point code that saturates
where a group does not straddle 0; spaces are compared by ||P_oldᵀ P_new||_F² / r, not by the cosine of one singular
vector, which a flipped sign defeats. Weights stay in their own dtype: of bfloat16 ones rounding is stochastic, which is
what makes the paper's int8 weights trainable; those themselves are not built.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fallow.optim.galore import GaLore


class QGaLore(GaLore):
    """A `LowRank` with the paper's defaults; see there for the other options."""

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.01,
        rank: int | float | None = 128,
        *,
        lazy: float | None = 0.4,
        state_dtype: str = "8bit",
        basis_dtype: str | None = "nf4",
        **options: Any,
    ) -> None:
        kinds = {"lazy": lazy, "state_dtype": state_dtype, "basis_dtype": basis_dtype}
        super().__init__(params, lr, rank, **{"rounding": "stochastic", **kinds, **options})
