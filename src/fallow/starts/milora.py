"""MiLoRA: the adapter takes over the least singular directions of the weight; the leading ones stay frozen.

"MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning", arXiv 2406.09044.

    U, S, Vᵀ the r least triples of W      B0 = U sqrt(S / s) (out, r)      A0 = sqrt(S / s) Vᵀ (r, in)

and W - s B0 A0 stays frozen. For weights with both sides above 256 they are found by eight inverse iterations from a
random start, which moves what is split, never the output: |U S Vᵀ| is within 2 % of the least. A weight of lower rank
has directions of value zero, in which both factors would be zero for ever; they start as LoRA's do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fallow.core.bases import near_smallest, smallest
from fallow.core.delta import Site, one_of
from fallow.core.linalg import EXACT_BELOW
from fallow.core.start_factors import balanced
from fallow.core.starting import Pair, Start


@dataclass(frozen=True)
class MiLoRA(Start):
    """`exact`: decompose large weights too, which takes ten times as long and more."""

    name: ClassVar[str] = "milora"
    exact: bool = False

    def __post_init__(self) -> None:
        one_of("exact", self.exact, (True, False))

    def pair(self, site: Site, rank: int, scale: float) -> Pair:
        weight = site.weight()
        largest = torch.linalg.vector_norm(weight)
        if not self.exact and min(site.shape) > EXACT_BELOW and 4 * rank <= min(site.shape):
            return balanced(site, near_smallest(weight, rank, site.generator(self.name)), scale, largest)
        p, q = smallest(weight, rank)
        if weight.shape[0] <= weight.shape[1]:  # P = U, Q = S Vᵀ
            s = q.norm(dim=1)
            u, vt = p, q / _above_zero(s).unsqueeze(1)
        else:
            s = p.norm(dim=0)
            u, vt = p / _above_zero(s), q
        return balanced(site, (u, s, vt), scale, largest)


def _above_zero(s: torch.Tensor) -> torch.Tensor:
    return s.clamp_min(torch.finfo(s.dtype).tiny)
