"""LoRA-XS: two frozen factors from the weight's own singular vectors, and a trained r x r core between them.

"LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", arXiv 2405.17604.

    W' = W + s B R A    A = S V^T (r, in) and B = U (out, r) of leading triples of W, frozen; R (r, r); s = alpha / r

R starts at zero; the paper draws it with a deviation of 1e-5, which moves the output for nothing, since the gradient of
R, B^T g A^T, is not zero at zero. The backward keeps r numbers a token: x is not needed where A is frozen.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.delta import Delta, MethodOptions, Site, fits_rank, number, one_of, whole
from fallow.core.errors import ConfigError
from fallow.core.factored import down
from fallow.core.linalg import low_rank
from fallow.core.low_rank_linear import low_rank_linear
from fallow.core.starting import Pair


class LoRAXS(Delta):
    name = "lora-xs"
    any_dtype = True
    A: Tensor
    B: Tensor

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`rank`: r. `alpha`: None for the rank, so that s = 1. `dropout`: on the layer's input. `save_factors`: keep A
        and B, r (in + out) numbers, in the file; if not, they are made of W again, which asks for the very same W:
        where singular values lie close together, a change in its last bits gives other vectors.
        """

        rank: int = 16
        alpha: float | None = None
        dropout: float = 0.0
        save_factors: bool = True

        def check(self) -> None:
            whole("rank", self.rank)
            if self.alpha is not None:
                number("alpha", self.alpha, open_below=True)
            number("dropout", self.dropout, most=0.99)
            one_of("save_factors", self.save_factors, (True, False))

    def setup(self, site: Site) -> None:
        rank, (out, inner) = self.o.rank, site.shape
        fits_rank(site, rank)
        if site.fresh or not self.o.save_factors:
            u, s, vt = low_rank(site.weight(), rank, generator=site.generator())
            signs = vt.gather(1, vt.abs().argmax(1, keepdim=True)).sign()  # the decomposition leaves them open
            a, b = signs * s.unsqueeze(1) * vt, signs.T * u
        else:
            a, b = torch.empty(rank, inner), torch.empty(out, rank)
        self.register_buffer("A", a.contiguous(), persistent=self.o.save_factors)
        self.register_buffer("B", b.contiguous(), persistent=self.o.save_factors)
        self.R = nn.Parameter(torch.zeros(rank, rank))

    def pair_form(self) -> tuple[int, float]:
        return int(self.o.rank), 1.0 if self.o.alpha is None else float(self.o.alpha / self.o.rank)

    @torch.no_grad()
    def take(self, pair: Pair) -> None:
        """The outer factors of a start, which depend on data, and its core, zero where it has none."""
        if pair.b is None:
            raise ConfigError("'lora-xs' keeps both outer factors as they start; this start gives one of them alone")
        if not self.o.save_factors:
            raise ConfigError("save_factors=False makes the factors of the weight again; with start= leave it out")
        self.A.copy_(pair.a)
        self.B.copy_(pair.b)
        self.R.zero_() if pair.core is None else self.R.copy_(pair.core)

    def core(self) -> Tensor:
        s = 1.0 if self.o.alpha is None else self.o.alpha / self.o.rank
        return self.R if s == 1.0 else self.R * s

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.B, self.core() @ self.A

    def delta_forward(self, x: Tensor) -> Tensor:
        if self.view.kind == "parameter":
            return super().delta_forward(x)
        return self.view.up(self.view.mix(down(self.view, x, self.A), self.core()), self.B)

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return low_rank_linear(x, w, bias, self.B, self.A, self.core())

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        return int(options.rank) ** 2

    def importance(self) -> Tensor:
        """The norm of each left singular direction's part of D: |B_k| |(s R A)_k|."""
        return (self.B.norm(dim=0) * (self.core() @ self.A).norm(dim=1)).detach()
