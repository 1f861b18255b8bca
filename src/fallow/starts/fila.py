"""FILA: the adapter takes over what of the weight matters for data to be forgotten and not for data to be kept.

"Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs" (LoKU), arXiv 2408.06621.

    F = F_forget / (e + F_retain), entry by entry, of squared gradients (out, in)    d_i = sqrt(sum_j F_ij)
    diag(d) W ~ U S Vᵀ, r triples     A0 = sqrt(S / s) Vᵀ (r, in)     B0 = diag(1 / d) U sqrt(S / s) (out, r)

which minimises |diag(d) (W - s B A)|, and W - s B0 A0 stays frozen. With a constant d this is PiSSA. Since diag(1 / d)
U = W V diag(1 / S), nothing is divided by d: s B0 A0 = W V Vᵀ, with V the leading right singular vectors of diag(d) W.
Rows below `floor` of the largest d get less of it in proportion, so that those which do not matter for what is to be
forgotten stay in the frozen weight.

Departures: e is `epsilon` times the mean of F_retain, where the paper has 1e-5 whatever the size of the gradients: in a
large model squared gradients are far below that, so that data to be kept would count for nothing. d is divided by its
root mean square, which changes no product. official=True is the paper's: an absolute epsilon, in both places, and d as
it is.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from fallow.core.delta import Site, number, one_of
from fallow.core.linalg import low_rank
from fallow.core.start_factors import balanced, check_statistics, plain
from fallow.core.starting import Pair, Start
from fallow.core.statistics import Statistics


@dataclass(frozen=True)
class FILA(Start):
    """`forget`, `retain`: statistics of `fallow.probe(model, batches, want={"fisher"})` over the two sets. `epsilon`:
    as a share of the mean of F_retain; None for 0.1, and for the absolute 1e-5 where `official`. `floor`: rows with
    less importance than this share of the largest stay in part. `official`: as in the paper, see above. `exact`:
    decompose large weights too.
    """

    name: ClassVar[str] = "fila"
    needs: ClassVar[str] = "statistics with the Fisher of both sets, start=fallow.FILA(forget, retain)"

    forget: Statistics
    retain: Statistics
    epsilon: float | None = None
    floor: float = 1e-4
    official: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        check_statistics("forget", self.forget, "fisher")
        check_statistics("retain", self.retain, "fisher")
        if self.epsilon is not None:
            number("epsilon", self.epsilon, open_below=True)
        number("floor", self.floor, most=1.0)
        one_of("official", self.official, (True, False))
        one_of("exact", self.exact, (True, False))

    def pair(self, site: Site, rank: int, scale: float) -> Pair:
        d = self.importance(site)
        if not bool(d.any()):
            warnings.warn(
                f"nothing of '{site.name}' matters for what is to be forgotten, so it starts as LoRA does", stacklevel=2
            )
            return plain(site, rank)
        weighted = site.weight()
        weighted.mul_(d.to(weighted).unsqueeze(1))
        _, s, vt = low_rank(weighted, rank, steps=4, generator=site.generator(self.name), exact=self.exact)
        del weighted
        reached = self.taken(d).to(vt).unsqueeze(1) * (site.weight() @ vt.T)
        rows = reached / s.clamp_min(torch.finfo(s.dtype).tiny)
        return balanced(site, (rows, s, vt), scale)

    def importance(self, site: Site) -> Tensor:
        """d (out,), float64, on the CPU."""
        forget, retain = (cast(Tensor, found.at(site, "fisher").fisher) for found in (self.forget, self.retain))
        epsilon = self.absolute if self.official else (self.epsilon or 0.1) * float(retain.mean())
        if epsilon:
            d = (retain + epsilon).reciprocal_().mul_(forget).sum(1).double().sqrt()
        else:  # data to be kept that does not reach this layer
            d = forget.sum(1).double().sqrt()
        return d if self.official else d / d.square().mean().sqrt().clamp_min(torch.finfo(d.dtype).tiny)

    def taken(self, d: Tensor) -> Tensor:
        """(out,): the share of each row's part that goes into the adapter."""
        if self.official:
            return d / (d + self.absolute)
        return (d / (self.floor * d.max()).clamp_min(torch.finfo(d.dtype).tiny)).clamp_max(1.0)

    @property
    def absolute(self) -> float:
        return self.epsilon or 1e-5
