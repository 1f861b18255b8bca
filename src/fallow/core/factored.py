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

from fallow.core.views import ConvView, View


def through(view: View, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """B (A x) in the way of the layer, in the dtype of the factors A (r, in) and B (out, r); x of any dtype."""
    return view.up(down(view, x, a), b)


def down(view: View, x: Tensor, a: Tensor) -> Tensor:
    """A x in the way of the layer, in the dtype of A (r, in); x of any dtype. For Deltas with `any_dtype`."""
    if not x.is_floating_point() or x.dtype == a.dtype or torch.is_autocast_enabled(x.device.type):
        return view.down(x, a)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return view.down(x.to(a.dtype), a)
    return cast(Tensor, (_Conv if isinstance(view, ConvView) else _Linear).apply(view, x, a))


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


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, view: ConvView, x: Tensor, a: Tensor) -> Tensor:
        ctx.view = view
        ctx.save_for_backward(x, a)
        return view.down(x.to(a.dtype), a)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a = ctx.saved_tensors
        view: ConvView = ctx.view
        _, need_x, need_a = ctx.needs_input_grad
        if view.padding_mode != "zeros" or isinstance(view.padding, str):
            return None, *_by_running_again(view, x, a, grad, (need_x, need_a))
        groups = view.groups
        grad_x, grad_a, _ = torch.ops.aten.convolution_backward(
            grad, x.to(a.dtype), a.repeat(groups, 1).reshape(-1, *view.kernel), None, view.stride, view.padding,
            view.dilation, False, [0] * len(view.stride), groups, [need_x, need_a, False],
        )  # fmt: skip
        return None, grad_x.to(x.dtype) if need_x else None, grad_a.view(groups, *a.shape).sum(0) if need_a else None


def _by_running_again(view: View, x: Tensor, a: Tensor, grad: Tensor, need: tuple[bool, bool]) -> list[Tensor | None]:
    x, a = (tensor.detach().requires_grad_(needed) for tensor, needed in zip((x, a), need, strict=True))
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        h = view.down(x.to(a.dtype), a)
    found = iter(torch.autograd.grad(h, [tensor for tensor in (x, a) if tensor.requires_grad], grad))
    return [next(found) if tensor.requires_grad else None for tensor in (x, a)]
