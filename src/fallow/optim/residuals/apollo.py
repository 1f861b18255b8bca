"""APOLLO's rule (arXiv 2412.05270): the gradient itself moves the weight, scaled as the inner rule scales R.

    s_j = ||psi(R)_j|| / (||R_j|| + 1e-8)      for each index j of the long side; level="tensor": one for the matrix
    U   = s o G                                kept from growing by more than `limit` a step in Frobenius norm
    W <- W - lr c sqrt(scale) U                c the bias correction of Adam, psi the uncorrected direction

No product back through the basis, which may be any matrix that keeps norms about as they are: a Gaussian one, of which
only the seed is kept. `front`: sqrt(scale) is applied before the limiter, as in the official code's `scale_front`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.optim.bases.basis import Basis
from fallow.optim.parts import number, one_of
from fallow.optim.residuals.limiter import GUARD, limited, norms
from fallow.optim.residuals.residual import Move, Residual, needs_side
from fallow.optim.site import Site


@dataclass(frozen=True)
class Apollo(Residual):
    """`level`: channel | tensor. `limit`: None for no limit."""

    name: ClassVar[str] = "apollo"
    moves_alone: ClassVar[bool] = False
    level: str = "channel"
    limit: float | None = 1.01
    front: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None:
            number("apollo: limit", self.limit, 1.0, closed=False)
        one_of("apollo: level", self.level, ("channel", "tensor"))

    def check(self, basis: Basis) -> None:
        needs_side(self, basis)

    def begin(self, site: Site) -> None:
        site.state["norm"] = torch.zeros((), dtype=site.work, device=site.param.device)

    def restart(self, site: Site) -> None:
        site.state["norm"].zero_()

    def move(
        self, site: Site, basis: Basis, gradient: Tensor, projected: Tensor, direction: Tensor, correction: float
    ) -> Move:
        dims = (0,) if self.level == "channel" else (0, 1)
        inside = norms(site, projected, dims)
        along = norms(site, direction, dims) / (inside + GUARD)  # times `correction`
        root = site.group["scale"] ** 0.5
        along = along * root if self.front else along
        if self.limit is not None:
            square = (along * norms(site, gradient, dims)).square().sum()
            norm = (site.total(square) if along.ndim else square).sqrt() / correction
            along = along * limited(norm, site.state["norm"], self.limit)
        return Move(source=gradient, along=along if self.front else along * root)
