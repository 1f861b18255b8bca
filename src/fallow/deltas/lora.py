"""LoRA: a trained product of two thin matrices is added to each frozen matrix.

"LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; `scaling="rslora"`: "A Rank Stabilization
Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732.

    W' = W + s B A      A (r, in), uniform in +-1 / sqrt(in); B (out, r), zero; s = alpha / r, or alpha / sqrt(r)

An embedding starts the other way round, A zero and B normal, as the paper's code has it: a row of a table would
otherwise start at 1 / sqrt(rows), which hardly learns.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from fallow.core.budgeting import at_rank
from fallow.core.delta import Site, fits_rank, number, one_of, whole
from fallow.core.errors import ConfigError
from fallow.core.factor_pair import FactorPair, PairOptions


@dataclasses.dataclass(kw_only=True)
class FactorOptions(PairOptions):
    """`rank`: r. `alpha`: None for the rank, so that s = 1 (sqrt(r) for "rslora"). `scaling`: "standard" alpha / rank,
    or "rslora" alpha / sqrt(rank), with which gradients keep their size at high ranks.
    """

    rank: int = 8
    alpha: float | None = None
    scaling: str = "standard"

    def check(self) -> None:
        super().check()
        whole("rank", self.rank)
        if self.alpha is not None:
            number("alpha", self.alpha, open_below=True)
        one_of("scaling", self.scaling, ("standard", "rslora"))


class LoRA(FactorPair):
    name = "lora"

    @dataclasses.dataclass(kw_only=True)
    class Options(FactorOptions):
        """`dropout`: on the layer's input."""

        dropout: float = 0.0

        def check(self) -> None:
            super().check()
            number("dropout", self.dropout, most=1.0)
            if self.dropout == 1.0:
                raise ConfigError("dropout=1.0 drops the whole input, so nothing is trained; give less than 1")

    def setup(self, site: Site) -> None:
        if site.fresh:  # files of other programs hold ranks above the layer's, which do no harm
            fits_rank(site, self.o.rank)
        self.keep_pair(*self.start(self.o.rank))

    def start(self, rank: int) -> tuple[Tensor, Tensor]:
        """Fresh A (rank, in) and B (out, rank), whose product is zero."""
        out, inner = self.view.shape
        if self.view.kind == "embedding":
            return torch.zeros(rank, inner), torch.randn(out, rank)
        return torch.empty(rank, inner).uniform_(-1, 1) / math.sqrt(inner), torch.zeros(out, rank)

    @property
    def scaling(self) -> float:
        """s"""
        return self.scaling_at(self.A.shape[0])

    def scaling_at(self, rank: int) -> float:
        """s of this rank."""
        alpha = rank if self.o.alpha is None else self.o.alpha
        return float(alpha / (math.sqrt(rank) if self.o.scaling == "rslora" else rank))

    def factors(self) -> tuple[Tensor, Tensor]:
        s = self.scaling
        return self.with_start(self.B if s == 1.0 else self.B * s, self.A, s)

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        return int(options.rank) * (shape[0] + shape[1])

    def importance(self) -> Tensor:
        """The norm of each rank's part of D: s |B_k| |A_k|, or what it has changed since its start."""
        return self.scaling * self.learned()

    @torch.no_grad()
    def resize(self, rank: int) -> None:
        """Alpha follows, so that s, and with it what is kept, stays as it is."""
        whole("rank", rank)
        keep = self.importance().topk(min(rank, self.A.shape[0])).indices.sort().values
        self.o = at_rank(self.o, rank)
        self.resize_pair(keep, *self.start(max(0, rank - len(keep))))
