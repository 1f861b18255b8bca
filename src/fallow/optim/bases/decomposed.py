"""Bases from decompositions of the gradient: the space that holds most of it.

    svd    the leading left singular vectors, exact: GaLore's own choice
    rsvd   a randomised range finder, hundreds of times faster at a thousandth less of the gradient
    warm   `rsvd` at first, then one block power step from the former basis, qr(G Gᵀ P): the default
    gram   eigenvectors of G Gᵀ, exact where singular values span less than three decades

A zero gradient (LoRA's A in the first step, an expert not called) chooses nothing; the choice is tried again in the
next step. One with a NaN or an infinity raises TrainingError before anything changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.core.subspaces import OVERSAMPLING, by_gram, exact, power_step, randomised
from fallow.optim.bases.basis import Basis
from fallow.optim.parts import number
from fallow.optim.site import Site


@dataclass(frozen=True)
class SVD(Basis):
    name: ClassVar[str] = "svd"

    def spaces(self, sites: Sequence[Site], gradients: Tensor, former: Tensor | None, seeds: Sequence[int]) -> Tensor:
        if sites[0].part is not None:  # no rank has the whole gradient
            return by_gram(gradients, sites[0].rank or 0, sites[0].total)
        return exact(gradients, sites[0].rank or 0)


@dataclass(frozen=True)
class Gram(Basis):
    name: ClassVar[str] = "gram"

    def spaces(self, sites: Sequence[Site], gradients: Tensor, former: Tensor | None, seeds: Sequence[int]) -> Tensor:
        return by_gram(gradients, sites[0].rank or 0, sites[0].total)


@dataclass(frozen=True)
class Randomised(Basis):
    """`steps`: power iterations; `oversampling`: columns carried above the rank."""

    name: ClassVar[str] = "rsvd"
    steps: int = 2
    oversampling: int = OVERSAMPLING

    def __post_init__(self) -> None:
        number(f"{self.name}: steps", self.steps, 0)
        number(f"{self.name}: oversampling", self.oversampling, 0)

    def spaces(self, sites: Sequence[Site], gradients: Tensor, former: Tensor | None, seeds: Sequence[int]) -> Tensor:
        site, rank, d, n = sites[0], sites[0].rank or 0, sites[0].d, sites[0].whole_n
        width = min(rank + self.oversampling, d, n)
        drawn = [_gaussian(n, width, seed, gradients) for seed in seeds]
        probes = torch.stack([probe.narrow(0, site.start, site.n) for probe in drawn])
        found = randomised(gradients, min(rank, n), probes, self.steps, site.total)
        return found if rank <= n else _completed(found, rank)


@dataclass(frozen=True)
class Warm(Randomised):
    name: ClassVar[str] = "warm"

    def spaces(self, sites: Sequence[Site], gradients: Tensor, former: Tensor | None, seeds: Sequence[int]) -> Tensor:
        if former is None:
            return super().spaces(sites, gradients, former, seeds)
        return power_step(gradients, former, sites[0].total)


def _gaussian(rows: int, columns: int, seed: int, like: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=like.dtype, device=like.device)


def _completed(basis: Tensor, rank: int) -> Tensor:
    """Orthonormal columns up to `rank`, where the long side was projected and the gradient has fewer directions."""
    more = rank - basis.shape[-1]
    eye = torch.eye(basis.shape[-2], more, dtype=basis.dtype, device=basis.device).expand(*basis.shape[:-1], more)
    return torch.linalg.qr(torch.cat([basis, eye], -1))[0]
