"""SLTrain: every weight is low rank plus a sparse matrix on a fixed random support. For pretraining, and as a Delta.

"SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining", arXiv 2406.02214.

    pretraining   W  = s B A + S          B (out, r), A (r, in), s = alpha / r; S holds K = floor(density * out * in)
    fine-tuning   W' = W + s B A + S      values at fixed places, all else is zero

    names = sltrain(model, rank=128)      # Linear layers whose path holds "attn", "attention" or "mlp" are replaced
    method "sltrain"                      # the Delta: ours, not the paper's

Pretraining starts at W = S: B zero, A and the values uniform in +-1 / sqrt(in), the bias in +-1 / sqrt(out) as in the
official code. `start="compress"`, as in the paper's motivation, starts from the layer's weight: s B A is its truncation
to rank r (each factor takes the root of the singular values), S what that leaves at the support. The Delta starts as
the identity: B and the values zero.

The places are drawn for each layer from (seed, name), alike on all ranks, in memory of the order of K; they take 1 to 2
bytes each where the official code keeps 8. Parameters may be float32 under autocast or bf16 inputs; the official code
trains in bf16 alone, where small updates vanish late in training. Its per-layer updates and 8-bit states are any
optimizer's that has them; its `trainable_scaling` is not offered.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.coding import unpack
from fallow.core.delta import Delta, MethodOptions, Site, fits_rank, number, one_of, whole
from fallow.core.low_rank_sparse import compose, entries, keep, places
from fallow.deltas.sltrain_linear import SLTrainLinear, sltrain

__all__ = ["SLTrain", "SLTrainLinear", "sltrain"]


class SLTrain(Delta):
    name = "sltrain"
    low: Tensor
    counts: Tensor | None

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`rank`: r. `alpha`: None for the rank; s = alpha / rank. `density`: the share of W that S holds. `support`:
        "uniform", or "rows" for as many in each row.
        """

        rank: int = 8
        alpha: float | None = None
        density: float = 0.03
        support: str = "uniform"

        def check(self) -> None:
            whole("rank", self.rank)
            if self.alpha is not None:
                number("alpha", self.alpha, open_below=True)
            number("density", self.density, most=1.0, open_below=True)
            one_of("support", self.support, ("uniform", "rows"))

    def setup(self, site: Site) -> None:
        rank, shape = self.o.rank, self.view.shape
        fits_rank(site, rank)
        count = entries(shape, self.o.density)
        keep(self, places(shape, count, self.o.support, site.generator("support")), shape, persistent=False)
        bound = 1.0 if self.view.kind == "embedding" else 1 / math.sqrt(shape[1])  # a look-up reads one entry of a row
        self.A = nn.Parameter(torch.empty(rank, shape[1]).uniform_(-bound, bound))
        self.B, self.values = nn.Parameter(torch.zeros(shape[0], rank)), nn.Parameter(torch.zeros(count))

    @property
    def index(self) -> Tensor:
        """(K,) the places of S: flat, sorted, in W as (out, in)."""
        out, inner = self.view.shape
        return unpack(self.low, self.counts, out * inner)

    def _to(self, w: Tensor | None, sign: float = 1.0) -> Tensor:
        s = 1.0 if self.o.alpha is None else self.o.alpha / self.o.rank
        return compose(self.B, self.A, self.values if sign > 0 else -self.values, self.index, sign * s, w)

    def delta_weight(self) -> Tensor:
        return self._to(None)

    def transform(self, w: Tensor) -> Tensor:
        """One matrix for W', and one product with x; the engine makes it again in the backward."""
        return self._to(w)

    def inverse(self, w: Tensor) -> Tensor:
        return self._to(w, -1.0)

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        return int(options.rank) * (shape[0] + shape[1]) + entries(shape, options.density)
