"""What a residual rule is: what becomes of the part of the gradient outside the basis, G - P R.

It says how the weight moves, as three terms that are written into W without a further matrix of its size:

    W <- (1 - lr wd) W - lr ( P lift + source o along + dense )
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fallow.core.errors import ConfigError
from fallow.optim.bases.basis import Basis
from fallow.optim.site import Site


@dataclass
class Move:
    """`lift` (r, n) goes through the basis; `source` (d, n) times `along` (n,) or a scalar; `dense` (d, n) as it is."""

    lift: Tensor | None = None
    source: Tensor | None = None
    along: Tensor | None = None
    dense: Tensor | None = None


@dataclass(frozen=True)
class Residual:
    """`powers`: its states and their shapes' kind; see `shapes`."""

    name: ClassVar[str] = ""
    moves_alone: ClassVar[bool] = True  # whether a matrix without any basis (rank 0) is trained

    def shapes(self, site: Site) -> Mapping[str, tuple[int, ...]]:
        """The shapes of its states."""
        return {}

    def check(self, basis: Basis) -> None:
        """ConfigError where the mathematics does not hold with this basis."""

    def incoming(self, site: Site, gradient: Tensor) -> Tensor:
        """(d, n) what is projected in place of the gradient."""
        return gradient

    def move(
        self, site: Site, basis: Basis, gradient: Tensor, projected: Tensor, direction: Tensor, correction: float
    ) -> Move:
        """The move for G (d, n), R = Pᵀ G (r, n) and the inner rule's N (r, n), which may be overwritten.

        N is `correction` times what the rule gives without making up for its states' start.
        """
        raise NotImplementedError(self.name)


def needs_orthonormal(residual: Residual, basis: Basis) -> None:
    if not basis.orthonormal:
        raise ConfigError(
            f"residual='{residual.name}' needs a basis with orthonormal columns, which '{basis.name}' is not; "
            "take residual='apollo', or another basis"
        )
