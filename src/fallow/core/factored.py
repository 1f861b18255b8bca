"""h = A x and B h through a view, keeping for the backward x as it came.

Trained factors are float32 where the base is bf16 or fp16. Plain autograd then keeps the float32 copy of x that meets
A, twice the memory of x itself, which other layers keep anyway. Here the copy is made again in the backward:

    kept            x (as it came, and only where A is trained), A; B and h, of r channels, by what follows
    gradients       gA = ghᵀ x    gx = gh A

Where x has the dtype of the factors, under autocast, and while compiling (whose partitioner makes casts again by
itself) these are plain operators. Else h cannot be differentiated twice.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fallow.core.views import View


def through(view: View, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """B (A x) in the way of the layer, in the dtype of the factors A (r, in) and B (out, r); x of any dtype."""
    return view.up(down(view, x, a), b)


def down(view: View, x: Tensor, a: Tensor) -> Tensor:
    """A x in the way of the layer, in the dtype of A (r, in); x of any dtype. For Deltas with `any_dtype`."""
    if not x.is_floating_point() or x.dtype == a.dtype or torch.is_autocast_enabled(x.device.type):
        return view.down(x, a)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return view.down(x.to(a.dtype), a)
    return cast(Tensor, (_Linear if view.kind == "linear" else _Again).apply(view, x, a))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, view: View, x: Tensor, a: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, a)
        return view.down(x.to(a.dtype), a)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a = ctx.saved_tensors
        _, need_x, need_a = ctx.needs_input_grad
        grad_a = grad.flatten(0, -2).T @ x.flatten(0, -2).to(a.dtype) if need_a else None
        return None, (grad @ a).to(ctx.dtype) if need_x else None, grad_a


class _Again(torch.autograd.Function):
    """For convolutions, whose down is run again to be differentiated."""

    @staticmethod
    def forward(ctx: Any, view: View, x: Tensor, a: Tensor) -> Tensor:
        ctx.view = view
        ctx.save_for_backward(x, a)
        return view.down(x.to(a.dtype), a)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a = (
            tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        )
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            h = ctx.view.down(x.to(a.dtype), a)
        found = iter(torch.autograd.grad(h, [tensor for tensor in (x, a) if tensor.requires_grad], grad))
        return (None, *(next(found) if tensor.requires_grad else None for tensor in (x, a)))
