"""Rules that keep what the basis did not hold, for a later step, at the price of a buffer of the weight's size.

    feedback   A = G + E      R = Pᵀ A      E <- A - P R               DCT-AdamW's error feedback (arXiv 2505.17967)
    momentum   B = M + G      R = Pᵀ B      M <- B - (1 - mu) P R      Trion's (ibid.) and Dion's momentum

Nothing is lost: sum of P_t R_t + E_T = sum of G_t. The buffer is float32, or `form="bf16"` with dithered rounding,
whose mean over steps is exact (the official 8 and 4 bits lose positions or levels; they are not reproduced).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fallow.core.errors import ConfigError
from fallow.core.small_floats import to_bfloat16
from fallow.optim.bases.basis import Basis
from fallow.optim.parts import number, one_of
from fallow.optim.residuals.residual import Move, Residual, begin_dense, needs_orthonormal
from fallow.optim.site import Site


@dataclass(frozen=True)
class Feedback(Residual):
    name: ClassVar[str] = "feedback"
    moves_alone: ClassVar[bool] = False
    remembers: ClassVar[bool] = True
    form: str = "fp32"

    @property
    def taken(self) -> float:
        """The share of P R that leaves the buffer."""
        return 1.0

    def __post_init__(self) -> None:
        one_of(f"{self.name}: form", self.form, ("fp32", "bf16"))

    def check(self, basis: Basis) -> None:
        needs_orthonormal(self, basis)
        if basis.whole:
            raise ConfigError(f"residual='{self.name}' keeps what a basis leaves, and a block leaves whole tensors")

    def begin(self, site: Site) -> None:
        begin_dense(site, "held", self.form)

    def incoming(self, site: Site, gradient: Tensor) -> Tensor:
        held = site.matrix(site.state["held"])
        return held.add_(gradient) if held.dtype == site.work else held.to(site.work).add_(gradient)

    def move(
        self, site: Site, basis: Basis, gradient: Tensor, projected: Tensor, direction: Tensor, correction: float
    ) -> Move:
        basis.subtract(site, gradient, projected.mul_(self.taken) if self.taken != 1 else projected)
        held = site.matrix(site.state["held"])
        if held.dtype != site.work:
            held.copy_(to_bfloat16(gradient, site.state["age"]))
        return Move(lift=direction.mul_(site.group["scale"]))


@dataclass(frozen=True)
class Momentum(Feedback):
    name: ClassVar[str] = "momentum"
    momentum: float = 0.95

    @property
    def taken(self) -> float:
        return 1 - self.momentum

    def __post_init__(self) -> None:
        super().__post_init__()
        number("momentum: momentum", self.momentum, 0, 1)
