"""VeRA: one frozen random pair of factors for all layers, and two trained vectors in each.

"VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454.

    W' = W + diag(b) B diag(d) A    d (r,) starts at 0.1, b (out,) at zero

A (r, largest in) and B (largest out, r) are the same in all layers, which take their first columns and rows. They are
uniform in +-sqrt(6 / fan in), A drawn first and B after it from one generator of the seed: those that PEFT draws for
`projection_prng_key` = seed, so its files, with or without the two, are ours with lambda_d = d and lambda_b = b.

Where r is at most a sixteenth of out, b is folded into B: the backward keeps r numbers a token and nothing of the
layer's width. Above that the product which folding adds to the backward costs more time than it is worth.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.delta import Delta, MethodOptions, Site, number, one_of, whole
from fallow.core.factored import down
from fallow.core.low_rank_linear import low_rank_linear

FOLDED = 16  # how many times r goes into out where b is folded into B


class VeRA(Delta):
    name = "vera"
    any_dtype = True

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`rank`: r, of the factors that all layers share. `dropout`: on the layer's input. `d_initial`: what d starts
        at. `save_projection`: keep A and B in the file, once for all layers; if not, they are drawn again, the same on
        every system that has torch's generator.
        """

        rank: int = 256
        dropout: float = 0.0
        d_initial: float = 0.1
        save_projection: bool = True

        def check(self) -> None:
            whole("rank", self.rank)
            number("dropout", self.dropout, most=0.99)
            number("d_initial", self.d_initial, open_below=True)
            one_of("save_projection", self.save_projection, (True, False))

    def setup(self, site: Site) -> None:
        out, inner = site.shape
        common, rank = site.common, self.o.rank
        held_a, held_b = getattr(common, "A", None), getattr(common, "B", None)
        wide = max(inner, 0 if held_a is None else held_a.shape[1])
        tall = max(out, 0 if held_b is None else held_b.shape[0])
        if held_a is None or held_b is None or (tall, wide) != (held_b.shape[0], held_a.shape[1]):
            generator = torch.Generator().manual_seed(
                site.seed
            )  # a larger layer has both drawn again, as if it came first
            for name, shape in (("A", (rank, wide)), ("B", (tall, rank))):
                bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
                drawn = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
                drawn = drawn.to(site.dtype) if held_a is None else drawn.to(held_a)
                common.register_buffer(name, drawn, persistent=self.o.save_projection)
        self.d = nn.Parameter(torch.full((rank,), float(self.o.d_initial)))
        self.b = nn.Parameter(torch.zeros(out))

    def projections(self) -> tuple[Tensor, Tensor]:
        """This layer's part of B (out, r) and A (r, in)."""
        out, inner = self.view.shape
        return self.shared("B")[:out].to(self.b.device), self.shared("A")[:, :inner].to(self.b.device)

    def factors(self) -> tuple[Tensor, Tensor]:
        b, a = self.projections()
        return self.b.unsqueeze(1) * b, self.d.unsqueeze(1) * a

    def delta_forward(self, x: Tensor) -> Tensor:
        b, a = self.projections()
        h = self.view.scale(down(self.view, x, a), self.d)
        if FOLDED * a.shape[0] <= b.shape[0]:
            return self.view.up(h, self.b.unsqueeze(1) * b)
        return self.view.scale(self.view.up(h, b), self.b)

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        b, a = self.projections()
        if FOLDED * a.shape[0] <= b.shape[0]:
            return low_rank_linear(x, w, bias, self.b.unsqueeze(1) * b, a, self.d)
        return low_rank_linear(x, w, bias, b, a, self.d, self.b)

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        return int(options.rank) + shape[0]

    def importance(self) -> Tensor:
        """The norm of each rank's part of D: |d_k| |A_k| |(b * B)_k|."""
        b, a = self.factors()
        return (b.norm(dim=0) * a.norm(dim=1)).detach()
