"""A basis on each side: R = Pᵀ G Q (r, r), W <- W - lr P N Qᵀ, moments of r² numbers.

Written in GradNormLoRP (arXiv 2412.19616), and `proj_type="full"` of GaLore's code, whose bases are SVD's as here: P by
the Gram matrix of the projected side, and Q (n, r) an orthonormal basis of Gᵀ P, which spans what P's partners span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.core.subspaces import by_gram
from fallow.optim import moments
from fallow.optim.bases.basis import Basis, Turn
from fallow.optim.site import Site


@dataclass(frozen=True)
class TwoSided(Basis):
    """P (d, r) and Q (n, r), kept as one state (d + n, r)."""

    name: ClassVar[str] = "two-sided"
    sided: ClassVar[bool] = False
    shares: ClassVar[bool] = False
    columnwise: ClassVar[bool] = False

    def width(self, rank: int | float, d: int, n: int) -> int:
        return min(super().width(rank, d, n), n)

    def seen(self, rank: int, d: int, n: int) -> tuple[int, ...]:
        return (rank, rank)

    def begin(self, site: Site) -> None:
        moments.begin_basis(site, (site.d + site.n, site.rank or 0))

    def choose(self, sites: Sequence[Site], gradients: Sequence[Tensor], seeds: Sequence[int]) -> list[Turn]:
        stacked = torch.stack([*gradients])
        left = by_gram(stacked, sites[0].rank or 0)
        right = torch.linalg.qr(stacked.mT @ left).Q
        turns: list[Turn] = []
        for site, p, q in zip(sites, left, right, strict=True):
            former = self._pair(site)
            turns.append((p.mT @ former[0], q.mT @ former[1]) if site.state["chosen"] else None)
            moments.write_basis(site, torch.cat((p, q)))
        return turns

    def _pair(self, site: Site) -> tuple[Tensor, Tensor]:
        p, q = moments.read_basis(site).split((site.d, site.n))
        return p, q

    def project(self, site: Site, gradient: Tensor) -> Tensor:
        p, q = self._pair(site)
        return p.mT @ gradient @ q

    def subtract(self, site: Site, weight: Tensor, change: Tensor) -> None:
        p, q = self._pair(site)
        weight.addmm_(p, change @ q.mT, alpha=-1)

    def leftover(self, site: Site, gradient: Tensor, projected: Tensor) -> Tensor:
        p, q = self._pair(site)
        return torch.addmm(gradient, p, projected @ q.mT, alpha=-1)

    def turn(self, turn: Turn, moment: Tensor, power: int) -> Tensor:
        left, right = turn if power == 1 else (one.square() for one in turn)
        return left @ moment @ right.mT

    def overlap(self, turn: Turn) -> Tensor:
        left, right = (super(TwoSided, self).overlap(one) for one in turn)
        return left * right
