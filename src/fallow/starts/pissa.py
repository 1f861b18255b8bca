"""PiSSA: the adapter takes over the leading singular directions of the weight, and trains them.

"PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", arXiv 2404.02948.

    W ~ U S Vᵀ, the r leading triples      B0 = U sqrt(S / s) (out, r)      A0 = sqrt(S / s) Vᵀ (r, in)

and W - s B0 A0 = W - U S Vᵀ stays frozen. For weights with both sides above 256 the triples are those of a randomised
range finder (16 more columns than the rank, four power iterations). That moves what is split, never the output: in
place of the least |W - U S Vᵀ| it leaves 0.4 % more of a random W, and 0.01 % more where singular values fall as 1 / i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fallow.core.delta import Site, one_of
from fallow.core.linalg import low_rank
from fallow.core.start_factors import balanced
from fallow.core.starting import Pair, Start


@dataclass(frozen=True)
class PiSSA(Start):
    """`exact`: decompose large weights too, which takes min(out, in) / r times as long."""

    name: ClassVar[str] = "pissa"
    exact: bool = False

    def __post_init__(self) -> None:
        one_of("exact", self.exact, (True, False))

    def pair(self, site: Site, rank: int, scale: float) -> Pair:
        triples = low_rank(site.weight(), rank, steps=4, generator=site.generator(self.name), exact=self.exact)
        return balanced(site, triples, scale)
