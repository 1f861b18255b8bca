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
from fallow.core.low_rank_linear import column_sums, low_rank_linear, pieces
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

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        b, a = self.factors()
        c = self.magnitude / self.row_norms(w, b, a)
        return cast(Tensor, _Lengths.apply(low_rank_linear(x, w, bias, b, a), c, bias))

    @torch.no_grad()
    def row_norms(self, w: Tensor, b: Tensor, a: Tensor) -> Tensor:
        """n (out,) for W (out, in) and the scaled B, A."""
        crossed, gram = w.to(a.dtype) @ a.T, a @ a.T
        square = cast(Tensor, self.norms) ** 2 + (b * torch.addmm(crossed, b, gram, beta=2)).sum(1)
        return _above_zero(square.clamp_min(0).sqrt())

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        return LoRA.parameter_count(shape, options) + shape[0]


class _Lengths(torch.autograd.Function):
    """c z + (1 - c) bias of z (..., out), c (out,), in the dtype of z; what is made of z on the way is made by rows."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, c, bias)
        return _lengthened(z, c, None if bias is None else (1 - c) * bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, c, bias = ctx.saved_tensors
        into = _lengthened(grad, c, None) if ctx.needs_input_grad[0] else None
        if torch.is_grad_enabled():
            return into, (grad * (z if bias is None else z - bias)).flatten(0, -2).sum(0), None
        grad, z = grad.reshape(-1, c.numel()), z.reshape(-1, c.numel())
        grad_c = column_sums(grad, z)
        return into, grad_c if bias is None else grad_c - grad.sum(0, dtype=c.dtype) * bias, None


def _lengthened(z: Tensor, c: Tensor, shift: Tensor | None) -> Tensor:
    """c z + shift, rounded once."""
    if z.dtype == c.dtype:
        return z * c if shift is None else torch.addcmul(shift, z, c)
    out = torch.empty_like(z, memory_format=torch.contiguous_format)
    for part in pieces(z.reshape(-1, c.numel()), c.numel()):
        scaled = z.reshape(-1, c.numel())[part] * c
        out.view(-1, c.numel())[part] = scaled if shift is None else scaled.add_(shift)
    return out


def _above_zero(norms: Tensor) -> Tensor:
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)
