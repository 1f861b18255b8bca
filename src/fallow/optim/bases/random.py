"""Bases drawn by chance, which no gradient is needed for.

random     orthonormal columns of a Gaussian matrix (FRUGAL's `random`)
gaussian   entries N(0, 1/r), of which the seed alone is kept and P is drawn again in every step (APOLLO, arXiv
           2412.05270, whose code keeps the matrix): Pᵀ keeps norms about as they are, PᵀP = I does not hold
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.optim.bases.basis import Basis, Turn
from fallow.optim.site import Site


def gaussian(rows: int, columns: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns) of N(0, 1), the same whenever the seed is."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=dtype, device=device)


@dataclass(frozen=True)
class Random(Basis):
    name: ClassVar[str] = "random"
    follows: ClassVar[bool] = False
    decomposes: ClassVar[bool] = False

    def spaces(self, sites: Sequence[Site], gradients: Tensor, former: Tensor | None, seeds: Sequence[int]) -> Tensor:
        d, r = sites[0].d, sites[0].rank or 0
        return torch.linalg.qr(torch.stack([gaussian(d, r, one, gradients.dtype, gradients.device) for one in seeds]))[
            0
        ]


@dataclass(frozen=True)
class Gaussian(Basis):
    name: ClassVar[str] = "gaussian"
    orthonormal: ClassVar[bool] = False
    follows: ClassVar[bool] = False
    decomposes: ClassVar[bool] = False

    def begin(self, site: Site) -> None:
        site.state["seed"] = 0

    def choose(self, sites: Sequence[Site], gradients: Sequence[Tensor], seeds: Sequence[int]) -> list[Turn]:
        known = [site.state["chosen"] for site in sites]
        for site, seed in zip(sites, seeds, strict=True):
            site.state["seed"] = seed
        return [True if held else None for held in known]

    def matrix(self, site: Site) -> Tensor:
        rank = site.rank or 1
        return gaussian(site.d, rank, site.state["seed"], site.work, site.param.device).div_(rank**0.5)
