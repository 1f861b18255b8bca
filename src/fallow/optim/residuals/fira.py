"""Fira's rule (arXiv 2410.01623): the rest of the gradient, scaled as the inner rule scales what the basis holds.

    phi_i = ||psi(R)_i|| / (||R_i|| + 1e-8)      one factor for each index i of the long side; level="matrix": one alone
    S     = phi o (G - P R)                      kept from growing by more than `limit` a step in Frobenius norm
    W <- W - lr c ( a P psi(R) + S )             c the bias correction of Adam, psi the uncorrected direction

No matrix of the weight's size is made: phi o (P R) = P (phi o R), so W takes one product and one elementwise pass, and
||S||² = sum phi_i² (||G_i||² - ||R_i||²) as P has orthonormal columns.

`exact=False`: as the official code, which forms G - a P R and so leaves (1 - a) of what the basis holds in S.
Departures: the limiter starts anew from a norm of zero, where the official one lets S grow by `limit` from 1e-8
(thousands of steps after a first gradient of zero); phi is held below `ceiling` times its median, if asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.optim.bases.basis import Basis
from fallow.optim.parts import number, one_of
from fallow.optim.residuals.limiter import GUARD, limited, norms
from fallow.optim.residuals.residual import Move, Residual, needs_orthonormal, needs_side
from fallow.optim.site import Site


@dataclass(frozen=True)
class Fira(Residual):
    """`limit`: the largest growth of ||S|| in a step; None for no limit. `level`: column | matrix."""

    name: ClassVar[str] = "fira"
    moves_alone: ClassVar[bool] = False
    limit: float | None = 1.01
    level: str = "column"
    exact: bool = True
    ceiling: float | None = None

    def __post_init__(self) -> None:
        if self.limit is not None:
            number("fira: limit", self.limit, 1.0, closed=False)
        if self.ceiling is not None:
            number("fira: ceiling", self.ceiling, 1.0, closed=False)
        one_of("fira: level", self.level, ("column", "matrix"))

    def check(self, basis: Basis) -> None:
        needs_orthonormal(self, basis)
        needs_side(self, basis)

    def begin(self, site: Site) -> None:
        site.state["norm"] = torch.zeros((), dtype=site.work, device=site.param.device)

    def restart(self, site: Site) -> None:
        site.state["norm"].zero_()

    def move(
        self, site: Site, basis: Basis, gradient: Tensor, projected: Tensor, direction: Tensor, correction: float
    ) -> Move:
        scale = site.group["scale"]
        # (n,), or 0-dim for the level "matrix"
        dims = (0,) if self.level == "column" else (0, 1)
        inside = norms(site, projected, dims)
        phi = norms(site, direction, dims) / (inside + GUARD)  # times `correction`
        if self.ceiling is not None:
            phi = torch.minimum(phi, phi.median() * self.ceiling)
        share = 1.0 if self.exact else scale
        if self.limit is not None:
            whole = norms(site, gradient, dims).square()
            outside = (whole - share * (2 - share) * inside.square()).clamp_min(0)
            square = (phi.square() * outside).sum()
            norm = (site.total(square) if phi.ndim else square).sqrt() / correction
            phi = phi * limited(norm, site.state["norm"], self.limit)
        lift = direction.mul_(scale).sub_(projected.mul_(phi), alpha=share)
        return Move(lift=lift, source=gradient, along=phi)
