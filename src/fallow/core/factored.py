"""B (A x) through a view, keeping for the backward x as it came.

Trained factors are float32 where the base is bf16 or fp16. Plain autograd then keeps the float32 copy of x that meets
A, twice the memory of x itself, which other layers keep anyway. Here the copy is made again in the backward:

    kept            x (as it came), A, B, and for Linear h = A x, of r channels
    gradients       gB = gᵀ h    gh = g B    gA = ghᵀ x    gx = gh A

Where x has the dtype of the factors, under autocast, and while compiling (whose partitioner makes casts again by
itself) these are plain operators.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fallow.core.views import View


def through(view: View, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """B (A x) in the way of the layer, in the dtype of the factors A (r, in) and B (out, r); x of any dtype.

    Where x is cast, the result cannot be differentiated twice.
    """
    if not x.is_floating_point() or x.dtype == a.dtype or torch.is_autocast_enabled(x.device.type):
        return view.up(view.down(x, a), b)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return view.up(view.down(x.to(a.dtype), a), b)
    return cast(Tensor, (_Linear if view.kind == "linear" else _Again).apply(view, x, a, b))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, view: View, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        h = view.down(x.to(a.dtype), a)
        ctx.save_for_backward(x, a, b, h)
        return view.up(h, b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, h = ctx.saved_tensors
        _, need_x, need_a, need_b = ctx.needs_input_grad
        grad_b = grad.flatten(0, -2).T @ h.flatten(0, -2) if need_b else None
        grad_h = grad @ b if need_x or need_a else None
        grad_a = cast(Tensor, grad_h).flatten(0, -2).T @ x.flatten(0, -2).to(a.dtype) if need_a else None
        grad_x = (cast(Tensor, grad_h) @ a).to(x.dtype) if need_x else None
        return None, grad_x, grad_a, grad_b


class _Again(torch.autograd.Function):
    """For other layers: the hidden result is made again too."""

    @staticmethod
    def forward(ctx: Any, view: View, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.view = view
        ctx.save_for_backward(x, a, b)
        return view.up(view.down(x.to(a.dtype), a), b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = (
            tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        )
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            out = ctx.view.up(ctx.view.down(x.to(a.dtype), a), b)
        needed = [tensor for tensor in (x, a, b) if tensor.requires_grad]
        found = iter(torch.autograd.grad(out, needed, grad))
        return (None, *(next(found) if tensor.requires_grad else None for tensor in (x, a, b)))
