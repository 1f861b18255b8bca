"""What a basis is: P (d, r) for each matrix, how it is chosen, and what is done with it.

A basis that is a dense matrix needs `spaces` alone, its rule of choice. One that is not (a set of rows, whole tensors)
has its own `choose`, `project`, `subtract`, `leftover` and `turn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fallow.optim import moments
from fallow.optim.site import Site

BLOCK = 1024  # columns of P K that exist at once, where products are taken in less precision than the weight's
Turn = Any  # what maps a moment of the old basis into the new one


@dataclass(frozen=True)
class Basis:
    """The dense kind; others override.

    `orthonormal`: PᵀP = I. `follows`: chosen from the gradient, of which a zero one tells nothing. `decomposes`: by a
    decomposition, which a gradient that is not finite must not reach. `sided`: lies along one side of the matrix, and R
    is (r, n). `columnwise`: columns of W can be treated apart. `whole`: holds all of a tensor, or nothing.
    `shares`: can be chosen of gradients of which each rank holds a slice.
    """

    name: ClassVar[str] = ""
    orthonormal: ClassVar[bool] = True
    follows: ClassVar[bool] = True
    decomposes: ClassVar[bool] = True
    sided: ClassVar[bool] = True
    columnwise: ClassVar[bool] = True
    whole: ClassVar[bool] = False
    shares: ClassVar[bool] = True

    def width(self, rank: int | float, d: int, n: int) -> int:
        """Columns for a rank, or for a share of the side."""
        return rank if isinstance(rank, int) else round(rank * d)

    def most(self, d: int, n: int) -> int:
        """The width from which on nothing is left to project."""
        return d

    def seen(self, rank: int, d: int, n: int) -> tuple[int, ...]:
        """The shape of what the inner rule sees."""
        return (rank, n)

    def begin(self, site: Site) -> None:
        """Make its state, of its final shapes."""
        moments.begin_basis(site, (site.d, site.rank or 0))

    def spaces(self, sites: Sequence[Site], gradients: Tensor, former: Tensor | None, seeds: Sequence[int]) -> Tensor:
        """(b, d, r) new bases for gradients (b, d, n); `former` (b, d, r): those until now, if there are any."""
        raise AssertionError(f"basis '{self.name}' has no rule of choice")

    def choose(self, sites: Sequence[Site], gradients: Sequence[Tensor], seeds: Sequence[int]) -> list[Turn]:
        """Choose anew for sites of one shape; for each what `turn` takes, None where there was no basis before."""
        known = [site.state["chosen"] for site in sites]
        former = torch.stack([self.matrix(site) for site in sites])
        together = torch.stack([*gradients]) if len(sites) > 1 else gradients[0].unsqueeze(0)  # a large one as it lies
        new = self.spaces(sites, together, former if all(known) else None, seeds)
        turned = new.mT @ former
        # A column and its negative are one direction; of the two, the one that its moments are nearer to.
        signs = torch.where(turned.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(new.dtype)
        new, turned = new * signs.unsqueeze(-2), turned * signs.unsqueeze(-1)
        turns = [one if held else None for held, one in zip(known, turned, strict=True)]
        for site, basis in zip(sites, new, strict=True):
            moments.write_basis(site, basis)
        return turns

    def matrix(self, site: Site) -> Tensor:
        """(d, r)"""
        return moments.read_basis(site)

    def project(self, site: Site, gradient: Tensor) -> Tensor:
        """(r, n) Pᵀ G, a new tensor."""
        if site.products == torch.bfloat16:
            return (self.matrix(site).bfloat16().mT @ gradient.bfloat16()).to(site.work)
        return self.matrix(site).mT @ gradient

    def subtract(self, site: Site, weight: Tensor, change: Tensor) -> None:
        """W (d, k) -= P K (r, k), in place, without forming P K."""
        if site.products == torch.bfloat16:
            basis, change = self.matrix(site).bfloat16(), change.bfloat16()
            for part, own in zip(weight.split(BLOCK, -1), change.split(BLOCK, -1), strict=True):
                if part.stride(-1) == 1:
                    part.sub_(basis @ own)
                else:  # a transposed weight is subtracted from in the order of its memory
                    part.mT.sub_(own.mT @ basis.mT)
            return
        weight.addmm_(self.matrix(site), change, alpha=-1)

    def leftover(self, site: Site, gradient: Tensor, projected: Tensor) -> Tensor:
        """(d, n) G - P R, a new tensor."""
        return torch.addmm(gradient, self.matrix(site), projected, alpha=-1)

    def turn(self, turn: Turn, moment: Tensor, power: int) -> Tensor:
        """A moment (r, ...) in the new basis: Q M with Q = P_newᵀ P_old; second moments by the squares of Q."""
        return (turn if power == 1 else turn.square()) @ moment

    def overlap(self, turn: Turn) -> Tensor:
        """0-dim, the share of the new space that lies in the old one."""
        return turn.square().sum() / max(1, turn.shape[0])
