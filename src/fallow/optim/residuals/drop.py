"""GaLore's rule (arXiv 2403.03507): what the basis does not hold is dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fallow.optim.bases.basis import Basis
from fallow.optim.residuals.residual import Move, Residual
from fallow.optim.site import Site


@dataclass(frozen=True)
class Drop(Residual):
    """W <- W - lr scale P N"""

    name: ClassVar[str] = "drop"
    moves_alone: ClassVar[bool] = False
    looks: ClassVar[bool] = False

    def move(
        self, site: Site, basis: Basis, gradient: Tensor, projected: Tensor, direction: Tensor, correction: float
    ) -> Move:
        return Move(lift=direction.mul_(site.group["scale"]))
