"""FRUGAL's rules (arXiv 2411.07837): what the basis does not hold moves the weight by a rule without states.

    sign   W <- W - lr ( a P N + c sign(G - P R) )
    sgd    W <- W - lr ( a P N + c (G - P R) )      as one product and one pass: P (a N - c R) + c G

sign() makes a full step of whatever is not zero, so entries of G - P R below `noise` times the largest |G| count as
zero: the official code moves nearly every entry by lr where only rounding is left. sign(G - P R) is not orthogonal to a
dense P; with coordinates, entries and blocks it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.optim.bases.basis import Basis
from fallow.optim.parts import number
from fallow.optim.residuals.residual import Move, Residual, needs_orthonormal
from fallow.optim.site import Site

NOISE = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@dataclass(frozen=True)
class Sign(Residual):
    """`share`: c. `noise`: None for 1e-6 of float32 gradients, 1e-2 of bfloat16 ones."""

    name: ClassVar[str] = "sign"
    share: float = 1.0
    noise: float | None = None

    def __post_init__(self) -> None:
        number("sign: share", self.share, 0)
        if self.noise is not None:
            number("sign: noise", self.noise, 0, 1)

    def check(self, basis: Basis) -> None:
        needs_orthonormal(self, basis)

    def move(
        self, site: Site, basis: Basis, gradient: Tensor, projected: Tensor, direction: Tensor, correction: float
    ) -> Move:
        rest = basis.leftover(site, gradient, projected)
        noise = self.noise if self.noise is not None else NOISE[site.param.dtype]
        if rest.numel():  # of the largest entry that this rank holds
            rest.masked_fill_(rest.abs() <= noise * gradient.abs().amax(), 0.0)
        return Move(lift=direction.mul_(site.group["scale"]), dense=rest.sign_().mul_(self.share))

    def alone(self, site: Site, gradient: Tensor) -> Move:
        return Move(dense=gradient.sign().mul_(self.share))


@dataclass(frozen=True)
class SGD(Residual):
    """`share`: c."""

    name: ClassVar[str] = "sgd"
    share: float = 1.0

    def __post_init__(self) -> None:
        number("sgd: share", self.share, 0)

    def check(self, basis: Basis) -> None:
        needs_orthonormal(self, basis)

    def move(
        self, site: Site, basis: Basis, gradient: Tensor, projected: Tensor, direction: Tensor, correction: float
    ) -> Move:
        lift = direction.mul_(site.group["scale"]).sub_(projected, alpha=self.share)
        return Move(lift=lift, source=gradient, along=self.share)

    def alone(self, site: Site, gradient: Tensor) -> Move:
        return Move(source=gradient, along=self.share)
