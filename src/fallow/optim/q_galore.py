"""Q-GaLore: GaLore with quantised projectors, moments and weights, refreshed only while the space still moves.

"Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients", arXiv 2407.08296.

    P in 4 bits, moments in 8; where a new space holds more than `lazy` of the old one, its gap doubles
    W in 8 bits, if asked for: decoded for as long as its layer computes, moved in float32, coded up or down by chance

Departures: P is kept as 4-bit NormalFloat, whose levels fit its entries, in place of a zero-point code that saturates
where a group does not straddle 0; spaces are compared by ||P_oldᵀ P_new||_F² / r, not by the cosine of one singular
vector, which a flipped sign defeats. An int8 weight has one scale a row, which follows its largest entry, and not one
for each 256 entries with a zero point. By default weights stay in their own dtype, bfloat16 ones rounded by chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn

from fallow.core.delta import one_of
from fallow.core.errors import ConfigError
from fallow.core.quantized import exchange, layers_of
from fallow.optim.galore import GaLore
from fallow.optim.site import Site


class QGaLore(GaLore):
    """A `LowRank` with the paper's defaults; see there for the other options.

    `weights`: None, or "int8": the projected weights of linear layers and two-dimensional convolutions of the model,
    which `params` must then be, are kept so, in place, from now on. They have no float copy; names, shapes and classes
    stay. Files want `fallow.core.quantized.dense_state(model)`. ConfigError where there are none; the model is then as
    it was.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.01,
        rank: int | float | None = 128,
        *,
        lazy: float | None = 0.4,
        state_dtype: str = "8bit",
        basis_dtype: str | None = "nf4",
        weights: Literal["int8"] | None = None,
        **options: Any,
    ) -> None:
        one_of("weights", weights, (None, "int8"))
        kinds = {"lazy": lazy, "state_dtype": state_dtype, "basis_dtype": basis_dtype}
        told = {"rounding": "stochastic", **kinds, **options}
        if weights is not None:
            if not isinstance(params, nn.Module):
                raise ConfigError(
                    f"weights={weights!r} exchanges the weights of layers; give the model itself as params"
                )
            apart = {"mode", "accumulate", "max_norm"}
            seen = GaLore(params, lr, rank, **{name: value for name, value in told.items() if name not in apart})
            _code(params, seen.sites())
        super().__init__(params, lr, rank, **told)


def _code(model: nn.Module, sites: Sequence[Site]) -> None:
    """Keep those that are projected as int8, where their layers can compute with codes."""
    projected = {id(site.param) for site in sites if site.rank is not None and not site.group["basis"].whole}
    found = [owner.weight for _, owner in layers_of(model) if id(owner.weight) in projected]
    if not found:
        raise ConfigError(
            f"weights='int8': {type(model).__name__} has no linear layer or convolution whose weight is projected; "
            "lower rank=, or leave weights out"
        )
    for weight in found:
        exchange(model, cast(nn.Parameter, weight), "int8")
