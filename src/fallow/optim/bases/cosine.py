"""Columns of one fixed cosine basis, chosen for each gradient: DCT-AdamW and Trion (arXiv 2505.17967).

    C_d        the orthonormal DCT-II matrix (d, d) of `core.transforms`, rows = frequencies
    S = C_d G  (d, n), by a fast transform or a product; the r rows with the largest norm are chosen, R = those rows
    P = C_d[index]ᵀ

For norm=2 that is the best choice within the basis: ||G - P R||² = ||G||² - sum of the chosen rows' ||S_j||², at most
(1 - r / d) ||G||². No decomposition, no basis to keep: r numbers a matrix, and one C_d for each size d in use (d²
numbers, shared by all matrices).

Departures: norm=2 by default, where the official code has 1, since it holds more; the numbers are sorted, so a
frequency keeps its moments; there is a C_d for each size, where the code has one for the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fallow.core.transforms import dct, dct_matrix
from fallow.optim.bases.basis import Turn
from fallow.optim.bases.chosen import Chosen, matched
from fallow.optim.parts import one_of
from fallow.optim.site import Site

_MATRICES: WeakValueDictionary[tuple[int, torch.dtype, torch.device], Tensor] = WeakValueDictionary()


def shared_matrix(site: Site) -> Tensor:
    """C_d (d, d), one for all sites of a size; it lives as long as one of them."""
    if site.shared is None:
        key = (site.d, site.work, site.param.device)
        site.shared = _MATRICES.get(key)
        if site.shared is None:
            site.shared = _MATRICES[key] = dct_matrix(*key)
    return site.shared


@dataclass(frozen=True)
class Cosine(Chosen):
    """`norm`: of the rows, 1 or 2. `transform`: fft | matmul; auto takes the product on accelerators."""

    name: ClassVar[str] = "dct"
    norm: int = 2
    transform: str = "auto"

    def __post_init__(self) -> None:
        one_of("dct: norm", str(self.norm), ("1", "2"))
        one_of("dct: transform", self.transform, ("auto", "fft", "matmul"))

    def choose(self, sites: Sequence[Site], gradients: Sequence[Tensor], seeds: Sequence[int]) -> list[Turn]:
        turns: list[Turn] = []
        for site, gradient in zip(sites, gradients, strict=True):
            spectrum = self._spectrum(site, gradient)
            score = site.total(spectrum.abs().pow_(self.norm).sum(1))  # in the order of the norms
            old = site.state["index"]
            new = score.topk(old.numel(), sorted=False)[1].to(old.dtype).sort()[0]
            if site.state["chosen"]:
                new = torch.where(score.sum() > 0, new, old)  # a zero gradient tells nothing; no wait for the device
                turns.append(matched(old, new))
            else:
                turns.append(None)
            site.state["index"] = new
            site.fresh = spectrum.index_select(0, new)
        return turns

    def _spectrum(self, site: Site, gradient: Tensor) -> Tensor:
        fast = self.transform == "fft" or (self.transform == "auto" and gradient.device.type == "cpu")
        return dct(gradient, 0) if fast else shared_matrix(site) @ gradient

    def matrix(self, site: Site) -> Tensor:
        return shared_matrix(site).index_select(0, site.state["index"]).mT

    def project(self, site: Site, gradient: Tensor) -> Tensor:
        if site.fresh is not None:  # made when the basis was chosen, from this very gradient
            found, site.fresh = site.fresh, None
            return found
        return super().project(site, gradient)
