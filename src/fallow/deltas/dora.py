"""DoRA: LoRA turns the rows of the weight; their lengths are trained apart.

"DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.

    W' = diag(m / n) (W + s B A)    n (out,) the norms of the rows of W + s B A; m (out,) trained, from those of W
    y' = c y + (c s B) A x + (1 - c) bias,    c = m / n, of the layer's own output y

n gets no gradient (section 4.3 of the paper). Here no W + s B A is formed to find it: with the norms n0 of W,

    n_i^2 = n0_i^2 + 2 s B_i (A W^T)_i + s^2 B_i (A A^T) B_i^T

The backward keeps x and y as they came, and h = A x; the gradient of c needs no B h: it is rowsum(B * g^T h), which the
gradient of B makes. A row of W that is zero stays zero.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from fallow.core.delta import Site
from fallow.core.factored import down
from fallow.deltas.lora import FactorOptions, LoRA


class DoRA(LoRA):
    name = "dora"
    exact = False
    any_dtype = True

    @dataclasses.dataclass(kw_only=True)
    class Options(FactorOptions):
        pass

    def setup(self, site: Site) -> None:
        super().setup(site)
        norms = site.weight().norm(dim=1)
        self.register_buffer("norms", norms, persistent=False)  # n0
        self.magnitude = nn.Parameter(norms.clone())

    def transform(self, w: Tensor) -> Tensor:
        b, a = self.factors()
        turned = w + b @ a
        return turned * (self.magnitude / _above_zero(turned.detach().norm(dim=1))).unsqueeze(1)

    def output(self, x: Tensor, y: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        view, (b, a) = self.view, self.factors()
        c = self.magnitude / self.row_norms(w, b, a)
        changed = view.scale(y, c) + view.up(down(view, x, a), c.unsqueeze(1) * b)
        if bias is None:
            return changed
        shift = (1 - c) * bias
        return changed + (shift if view.channels == -1 else shift.view(-1, *[1] * (y.dim() - 2)))

    @torch.no_grad()
    def row_norms(self, w: Tensor, b: Tensor, a: Tensor) -> Tensor:
        """n (out,) for W (out, in) and the scaled B, A."""
        crossed, gram = w.to(a.dtype) @ a.T, a @ a.T
        square = cast(Tensor, self.norms) ** 2 + (b * torch.addmm(crossed, b, gram, beta=2)).sum(1)
        return _above_zero(square.clamp_min(0).sqrt())

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        return LoRA.parameter_count(shape, options) + shape[0]


def _above_zero(norms: Tensor) -> Tensor:
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)
