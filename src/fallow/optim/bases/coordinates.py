"""Some coordinates as the basis: FRUGAL's splits (arXiv 2411.07837) into a part with states and one without.

    coordinates   r whole rows of the projected side, drawn by chance: columns of W with side="right", rows with "left"
    entries       single entries anywhere in the matrix, drawn by chance; `rank` is how many, or their share
    block         whole tensors: a share of a group's matrices has states, all others none at all

Projecting is gathering, so what is left over is exact: zero at the coordinates chosen, the gradient everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.optim import moments
from fallow.optim.bases.basis import Basis, Turn
from fallow.optim.bases.chosen import Chosen, at_random
from fallow.optim.parts import number, one_of
from fallow.optim.site import Site


@dataclass(frozen=True)
class Coordinates(Chosen):
    name: ClassVar[str] = "coordinates"
    follows: ClassVar[bool] = False

    def width(self, rank: int | float, d: int, n: int) -> int:
        return rank if isinstance(rank, int) else math.floor(rank * d)

    def pick(self, site: Site, gradient: Tensor, seed: int) -> Tensor:
        return at_random(site.d, site.rank or 0, seed, gradient.device)

    def matrix(self, site: Site) -> Tensor:
        eye = torch.zeros(site.d, site.rank or 0, dtype=site.work, device=site.param.device)
        return eye.scatter_(0, site.state["index"].long().unsqueeze(0), 1.0)

    def project(self, site: Site, gradient: Tensor) -> Tensor:
        return gradient.index_select(0, site.state["index"])

    def subtract(self, site: Site, weight: Tensor, change: Tensor) -> None:
        weight.index_add_(0, site.state["index"], change, alpha=-1)

    def leftover(self, site: Site, gradient: Tensor, projected: Tensor) -> Tensor:
        return gradient.index_fill(0, site.state["index"].long(), 0.0)


@dataclass(frozen=True)
class Entries(Chosen):
    name: ClassVar[str] = "entries"
    follows: ClassVar[bool] = False
    sided: ClassVar[bool] = False
    columnwise: ClassVar[bool] = False

    def width(self, rank: int | float, d: int, n: int) -> int:
        return rank if isinstance(rank, int) else math.floor(rank * d * n)

    def most(self, d: int, n: int) -> int:
        return d * n

    def seen(self, rank: int, d: int, n: int) -> tuple[int, ...]:
        return (rank,)

    def pick(self, site: Site, gradient: Tensor, seed: int) -> Tensor:
        return at_random(gradient.numel(), site.rank or 0, seed, gradient.device)

    def _places(self, site: Site) -> tuple[Tensor, Tensor]:
        index = site.state["index"].long()
        return index // site.n, index % site.n

    def project(self, site: Site, gradient: Tensor) -> Tensor:
        return gradient[self._places(site)]

    def subtract(self, site: Site, weight: Tensor, change: Tensor) -> None:
        weight.index_put_(self._places(site), change.neg(), accumulate=True)

    def leftover(self, site: Site, gradient: Tensor, projected: Tensor) -> Tensor:
        return gradient.index_put(self._places(site), gradient.new_zeros(()))


ORDERS = ("random", "ascending", "descending", "mirror")


@dataclass(frozen=True)
class Block(Basis):
    """round(N rank) of a group's N matrices have states at a time; `rank` is a share. All change in the same step.

    `order`: random, a window that moves through the group (ascending, descending), or one from both ends (mirror).
    `together`: so many matrices that follow one another count as one, such as those of a layer.
    """

    name: ClassVar[str] = "block"
    follows: ClassVar[bool] = False
    decomposes: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    order: str = "random"
    together: int = 1

    def __post_init__(self) -> None:
        one_of("block: order", self.order, ORDERS)
        number("block: together", self.together, 1)

    def width(self, rank: int | float, d: int, n: int) -> int:
        return d if rank >= 1 else int(rank > 0)

    def begin(self, site: Site) -> None:
        site.state["active"] = False

    def active(self, count: int, share: float, window: int, seed: int) -> set[int]:
        """Which of `count` matrices have states in this window, the 0th being the first."""
        units = -(-count // self.together)
        most = min(units, max(1, round(units * share)))
        if self.order == "random":
            generator = torch.Generator().manual_seed((seed * 1_000_003 + window) % (1 << 63))
            chosen = torch.randperm(units, generator=generator)[:most].tolist()
        elif self.order == "mirror":
            front, back = -(-most // 2), most // 2
            chosen = [(window * front + i) % units for i in range(front)]
            chosen += [(-1 - window * back - i) % units for i in range(back)]
        else:
            chosen = [(window * most + i) % units for i in range(most)]
            if self.order == "descending":
                chosen = [units - 1 - unit for unit in chosen]
        return {unit * self.together + i for unit in chosen for i in range(self.together)}

    def choose(self, sites: Sequence[Site], gradients: Sequence[Tensor], seeds: Sequence[int]) -> list[Turn]:
        for site in sites:
            group, state, inner = site.group, site.state, site.inner
            window = group["steps"] // group["refresh_every"]
            now = site.place in self.active(site.peers, group["rank"], window, group["seed"])
            if now and not state["active"]:
                moments.begin(site, inner.shapes(tuple(site.data.shape)))
                state["age"] = 0
            elif now and group["moments"] == "reset":
                moments.zero(site)
                state["age"] = 0
            elif not now:
                moments.drop(site)
            state["active"] = now
        return [None] * len(sites)
