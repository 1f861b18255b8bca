"""What a residual rule is: what becomes of the part of the gradient outside the basis, G - P R.

It says how the weight moves, as three terms that are written into W without a further matrix of its size:

    W <- (1 - lr wd) W - lr ( P lift + source o along + dense )
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.core.errors import ConfigError
from fallow.optim.bases.basis import Basis
from fallow.optim.site import Site


@dataclass
class Move:
    """`lift` (r, n) goes through the basis; `source` (d, n) times `along`, (n,) or a scalar; `dense` (d, n) as is."""

    lift: Tensor | None = None
    source: Tensor | None = None
    along: Tensor | float | None = None
    dense: Tensor | None = None


@dataclass(frozen=True)
class Residual:
    """`moves_alone`: whether it moves a matrix without a basis (rank 0). `remembers`: whether it changes what is
    projected, so that the gradient alone does not tell R.
    """

    name: ClassVar[str] = ""
    moves_alone: ClassVar[bool] = True
    remembers: ClassVar[bool] = False
    looks: ClassVar[bool] = True  # at the gradient, beside what the basis holds of it

    def begin(self, site: Site) -> None:
        """Make its states, of their final shapes."""

    def restart(self, site: Site) -> None:
        """Forget what belongs to moments that start anew."""

    def check(self, basis: Basis) -> None:
        """ConfigError where the mathematics does not hold with this basis."""

    def incoming(self, site: Site, gradient: Tensor) -> Tensor:
        """(d, n) what is projected in place of the gradient."""
        return gradient

    def move(
        self, site: Site, basis: Basis, gradient: Tensor, projected: Tensor, direction: Tensor, correction: float
    ) -> Move:
        """The move for what `incoming` gave, R = Pᵀ G (r, n) and the inner rule's N (r, n); both may be overwritten.

        N is `correction` times what the rule gives without making up for its states' start.
        """
        raise AssertionError(self.name)

    def alone(self, site: Site, gradient: Tensor) -> Move:
        """The move of a matrix of which the basis holds nothing."""
        return Move()


def needs_orthonormal(residual: Residual, basis: Basis) -> None:
    """ConfigError where PᵀP = I does not hold, without which G - P R is not what is left over."""
    if not basis.orthonormal:
        raise ConfigError(
            f"residual='{residual.name}' needs a basis with orthonormal columns, which '{basis.name}' is not; "
            "take residual='apollo' or 'drop', or another basis"
        )


def needs_side(residual: Residual, basis: Basis) -> None:
    """ConfigError where R has no index of the long side to scale by."""
    if not basis.sided or basis.whole:
        raise ConfigError(
            f"residual='{residual.name}' scales along one side of a matrix, which basis='{basis.name}' has none of; "
            "take 'coordinates', or residual='sign'"
        )


def begin_dense(site: Site, key: str, form: str = "fp32") -> None:
    """A state of the parameter's shape, laid out as it is."""
    kind = torch.bfloat16 if form == "bf16" and site.work == torch.float32 else site.work
    site.state[key] = torch.zeros_like(site.data, dtype=kind)
