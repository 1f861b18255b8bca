"""PEGO: a group of LoRAs kept orthogonal to the base weight and to each other, for domains not seen in training.

"Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain Generalization"
(arXiv 2407.15085). N modules of rank r, W (out, in), A_i (r, in), B_i (out, r), scale 1:

    W' = W + sum_i B_i A_i      one LoRA of rank N r, but for the objective's term:
    loss = l (sum_i |W (B_i A_i)ᵀ|_1 + sum_(i<j) |B_i A_i (B_j A_j)ᵀ|_1)     l: orthogonality; (out, out)

The norms are sums of absolute entries. `side="output"`: of Wᵀ B_i A_i, (in, in). `norm="fro2"`: of squares. No such one
is made whole: of one L Rᵀ a tile at a time is made, summed and turned into gradients, which alone are kept for the
backward; squares need r x r ones only.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fallow.core.delta import Site, number, one_of, whole
from fallow.core.errors import ConfigError
from fallow.core.factor_pair import FactorPair, PairOptions
from fallow.objectives.orthogonality import overlap, overlaps


class PEGO(FactorPair):
    """Sums over all entries grow with out²: for other sizes than a ViT-B's 768 change `orthogonality` inversely."""

    name = "pego"

    @dataclasses.dataclass(kw_only=True)
    class Options(PairOptions):
        """`rank`: r, of each module. `group`: N modules. `orthogonality`: what both terms count in the objective.
        `side`: products over the "input", (out, out), or over the "output", (in, in), see above. `norm`: "l1", sums of
        absolute entries, or "fro2", of squares.
        """

        rank: int = 4
        group: int = 4
        orthogonality: float = 1e-3
        side: Literal["input", "output"] = "input"
        norm: Literal["l1", "fro2"] = "l1"

        def check(self) -> None:
            super().check()
            whole("rank", self.rank)
            whole("group", self.group)
            number("orthogonality", self.orthogonality)
            one_of("side", self.side, ("input", "output"))
            one_of("norm", self.norm, ("l1", "fro2"))

    def setup(self, site: Site) -> None:
        (out, width), total = site.shape, self.o.group * self.o.rank
        if total > min(site.shape):
            raise ConfigError(
                f"group={self.o.group} times rank={self.o.rank} is above what '{site.name}' of {site.shape} can have; "
                f"give at most {min(site.shape)} in all"
            )
        a = torch.empty(total, width)  # the modules' factors, one below (B: beside) the other
        nn.init.kaiming_uniform_(a, math.sqrt(5))
        self.keep_pair(a, torch.zeros(out, total))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.with_start(self.B, self.A)

    def loss(self) -> Tensor | None:
        if not self.o.orthogonality:
            return None
        return cast(Tensor, self.o.orthogonality * overlap(self, self.o.group, self.o.side, self.o.norm))

    def penalties(self) -> tuple[Tensor, Tensor]:
        """The sums for W and for pairs of modules, before they are weighed: differentiable scalars of A's dtype."""
        b, a = self.factors()
        return overlaps(self, a, b, self.o.group, self.o.side, self.o.norm)

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        """N r (in + out)"""
        return int(options.group * options.rank * sum(shape))
