"""Orthogonal: neither factor is zero, and yet their product is, so that both learn from the first step.

PEFT's `init_lora_weights="orthogonal"`. Of a random orthogonal Q (r, r), every other row goes to A and the rest to B:

    A = Q[0::2]ᵀ X (r, in)      B = Y Q[1::2] (out, r)      X, Y normal with a deviation of 0.1

so B A = Y Q[1::2] Q[0::2]ᵀ X = 0 but for rounding, and nothing is subtracted. That holds for all ranks together: a
method that uses some of them (DyLoRA), or cuts them, wants subtract=True. PEFT asks for an even rank; here A has the
one row more of an odd one (and all of rank 1, which leaves B zero).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fallow.core.delta import Site, one_of
from fallow.core.starting import Pair, Start


@dataclass(frozen=True)
class Orthogonal(Start):
    """`subtract`: keep both factors and subtract their product, so that parts of the ranks start as the base too."""

    name: ClassVar[str] = "orthogonal"
    subtract: bool = False

    def __post_init__(self) -> None:
        one_of("subtract", self.subtract, (True, False))

    def pair(self, site: Site, rank: int, scale: float) -> Pair:
        out, inner = site.shape
        q = torch.linalg.qr(torch.randn(rank, rank, dtype=site.dtype))[0]
        a = (torch.randn(inner, rank - rank // 2, dtype=site.dtype) @ q[0::2]).T / 10
        b = torch.randn(rank // 2, out, dtype=site.dtype).T @ q[1::2] / 10
        return Pair(b, a, kept=not self.subtract)
