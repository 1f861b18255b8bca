"""DoRA: LoRA turns the rows of the weight; their lengths are trained apart.

"DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.

    W' = diag(m / n) (W + s B A)    n (out,) the norms of the rows of W + s B A; m (out,) trained, from those of W
    y' = y + (c - 1) (y - bias) + c s B A x,    c = m / n

n gets no gradient (section 4.3 of the paper). Here no W + s B A is formed to find it: with the norms n0 of W,

    n_i^2 = n0_i^2 + 2 s B_i (A W^T)_i + s^2 B_i (A A^T) B_i^T

The backward keeps x as it came, y and h = A x; B h is made again. A row of W that is zero stays zero.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from fallow.core.delta import Site
from fallow.core.factored import down
from fallow.core.views import View
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
        b, a = self.factors()
        c = self.magnitude / self.row_norms(w, b, a)
        h = down(self.view, x, a)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(y.device.type):
            return _rescaled(self.view, y, self.view.up(h, b), c, bias)
        return cast(Tensor, _Rescale.apply(self.view, y, h, b, c, bias))

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


def _along(view: View, vector: Tensor, y: Tensor) -> Tensor:
    """A vector over the channels of y, in a shape that multiplies it."""
    return vector if view.channels == -1 else vector.view(-1, *[1] * (y.dim() - 2))


def _rescaled(view: View, y: Tensor, change: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    c = _along(view, c, y)
    own = y if bias is None else y - _along(view, bias, y)
    return torch.addcmul(torch.addcmul(y.to(c.dtype), own.to(c.dtype), c - 1), change.to(c.dtype), c)


class _Rescale(torch.autograd.Function):
    """y + (c - 1) (y - bias) + c (B h), of which y and h are kept."""

    @staticmethod
    def forward(ctx: Any, view: View, y: Tensor, h: Tensor, b: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
        ctx.view = view
        ctx.save_for_backward(y, h, b, c, bias)
        return _rescaled(view, y, view.up(h, b), c, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        view: View = ctx.view
        y, h, b, c, bias = ctx.saved_tensors
        h, b = h.detach().requires_grad_(), b.detach().requires_grad_()
        with torch.enable_grad():
            change = view.up(h, b)
        others = [dim for dim in range(y.dim()) if dim != view.channels % y.dim()]
        own = y if bias is None else y - _along(view, bias, y)
        grad_c = (grad * (own + change.detach())).sum(others)
        grad_y = grad * _along(view, c, y)
        grad_h, grad_b = torch.autograd.grad(change, (h, b), grad_y)
        grad_bias = None
        if bias is not None and ctx.needs_input_grad[5]:
            grad_bias = (grad.sum(others) * (1 - c)).to(bias.dtype)
        return None, grad_y.to(y.dtype), grad_h, grad_b, grad_c, grad_bias
