"""LoRA-GA: the first update of B A points along the gradient of the whole weight, as near as a rank of 2 r can come.

"LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000.

    g = dL/dW ~ U S Vᵀ, 2 r triples      A0 = c V_Iᵀ (r, in)      B0 = c U_J (out, r)      I, J disjoint, 2 r in all

and W - s B0 A0 stays frozen. One step of SGD at rate l then moves s B A by -l s² c² U S Vᵀ, the best rank-2r part of -l
g, where factors that share their directions reach rank r alone. c = out^(1/4) / sqrt(gamma) keeps the sizes of outputs
and gradients in every layer alike where s = alpha / sqrt(r), so scaling="rslora" is the paper's.

A gradient of lower rank than 2 r (few classes, few tokens) leaves places over. They take directions orthogonal to all
of it, which add nothing to the first update; where a side has none left, zeros in one factor and not in the other. A
zero gradient gives LoRA's own start, with a warning. The decomposition is a randomised one for large layers (official:
4 r columns, 4 iterations; so here), of the gradient or of what a sketch tells of it.

PEFT's version differs: B holds singular values too, A is not scaled, and `random` gives both factors one set.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.core.delta import Site, number, one_of
from fallow.core.errors import DataError
from fallow.core.linalg import Triples, low_rank
from fallow.core.start_factors import check_statistics, complement, plain
from fallow.core.starting import Pair, Start
from fallow.core.statistics import Statistics

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
TINY = 1e-15  # the largest entry of a gradient whose squares get lost in float32
SCALES = ("stable", "unit", "gd", "weightS")


@dataclass(frozen=True)
class LoRAGA(Start):
    """`statistics`: of `fallow.probe(model, batches, want={"gradient"})`. `direction`: which of the 2 r directions are
    A's: the first r ("ArB2r"), the last ("A2rBr"), every other from the second ("ArBr"), or r at "random". `scale`: c
    as above ("stable"), 1 ("unit"), 1 / s ("gd"), or the mean of sqrt(sigma_i(W) / s) over i <= r ("weightS"). `gamma`:
    the larger, the gentler; 16 to 64. `norm_clip`: no entry of s B0 A0 may exceed the largest of W. `exact`: decompose
    large gradients too.
    """

    name: ClassVar[str] = "lora-ga"
    needs: ClassVar[str] = "statistics with the gradient, start=fallow.LoRAGA(statistics)"

    statistics: Statistics
    direction: str = "ArB2r"
    scale: str = "stable"
    gamma: float = 16.0
    norm_clip: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        check_statistics("statistics", self.statistics, "gradient")
        one_of("direction", self.direction, DIRECTIONS)
        one_of("scale", self.scale, SCALES)
        number("gamma", self.gamma, open_below=True)
        one_of("norm_clip", self.norm_clip, (True, False))
        one_of("exact", self.exact, (True, False))

    def pair(self, site: Site, rank: int, scale: float) -> Pair:
        u, _, vt = self.directions(site, 2 * rank)
        if not len(vt):
            warnings.warn(f"the gradient of '{site.name}' is zero, so it starts as LoRA does", stacklevel=2)
            return plain(site, rank)
        chosen, others = self.split(site, rank)
        a, b = _rows(vt, chosen, site.generator("A")), _rows(u.T, others, site.generator("B")).T
        size = self.size(site, rank, scale)
        a, b = size * a, size * b.roll(_zeros(b.T), 1)  # no rank may have both its factors zero
        return Pair(*self.clipped(site, b, a, scale)) if self.norm_clip else Pair(b, a)

    def directions(self, site: Site, count: int) -> Triples:
        """U (out, k), S (k,), Vᵀ (k, in) of the gradient: k = `count`, or its rank where that is less."""
        found = self.statistics.at(site, "gradient")
        if sketch := found.gradient_sketch:
            if sketch.columns.shape[1] < min(count, *site.shape):
                raise DataError(
                    f"the gradient of '{site.name}' was sketched with {sketch.columns.shape[1]} columns, of which "
                    f"{count} directions do not follow; gather it with {2 * count}, or without a sketch"
                )
            u, s, vt = sketch.leading(count)
        else:
            assert found.gradient is not None
            g = found.gradient.to(site.device, site.dtype)
            if (peak := float(torch.linalg.vector_norm(g, float("inf")))) < TINY:
                g = g / (peak or 1.0)
            generator = site.generator(self.name)
            u, s, vt = low_rank(g, count, oversampling=count, steps=4, generator=generator, exact=self.exact)
        rank = int((s > s[0] * math.sqrt(max(site.shape)) * torch.finfo(torch.float32).eps).sum())
        return tuple(part.to(site.device, site.dtype) for part in (u[:, :rank], s[:rank], vt[:rank]))  # type: ignore[return-value]

    def split(self, site: Site, rank: int) -> tuple[list[int], list[int]]:
        """Which of the 2 r directions are A's, and which B's."""
        if self.direction == "random":
            order = torch.randperm(2 * rank, generator=site.generator("split")).tolist()
            return sorted(order[:rank]), sorted(order[rank:])
        first, last = list(range(rank)), list(range(rank, 2 * rank))
        every = list(range(1, 2 * rank, 2)), list(range(0, 2 * rank, 2))
        return {"ArB2r": (first, last), "A2rBr": (last, first), "ArBr": every}[self.direction]

    def size(self, site: Site, rank: int, scale: float) -> float:
        """c"""
        if self.scale == "weightS":
            sigma = low_rank(site.weight(), rank, steps=4, generator=site.generator("W"), exact=self.exact)[1]
            return float((sigma / scale).sqrt().mean())
        return {"stable": site.shape[0] ** 0.25 / self.gamma**0.5, "unit": 1.0, "gd": 1 / scale}[self.scale]

    def clipped(self, site: Site, b: Tensor, a: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """B and A, each times sqrt(rho) where rho = max |W| / max |s B A| is below 1."""
        most, largest = site.weight().abs().max(), (b @ a).abs().max() * scale
        root = torch.where(most > 0, (most / largest).clamp_max(1.0), 1.0).sqrt()  # a zero W has no size to keep to
        return b * root, a * root


def _rows(directions: Tensor, chosen: list[int], generator: torch.Generator) -> Tensor:
    """(r, n): those chosen of the orthonormal `directions` (k, n); for the ones that are not there, rows orthogonal to
    all of them, then, where there are none left, zeros.
    """
    known = directions[[i for i in chosen if i < len(directions)]]
    lacking = len(chosen) - len(known)
    if not lacking:
        return known
    more = complement(directions, min(lacking, directions.shape[1] - len(directions)), generator)
    return torch.cat([known, more, known.new_zeros(lacking - len(more), known.shape[1])])


def _zeros(rows: Tensor) -> int:
    """How many of the rows are zero."""
    return int((rows == 0).all(1).sum())
