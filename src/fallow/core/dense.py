"""D x for a dense D (out, in) that is made from few numbers: made again in the backward, not kept between the two.

    kept            x (as it came) and the few numbers
    gradients       gx = g D    G = gᵀ x, (out, in), at once turned into gradients of the few numbers

D is made in their dtype and cast to x's, so that half-precision layers multiply in half precision; D alone keeps its
small entries there, which W + D would round away. Under compilation these are plain operators, whose partitioner
decides. The result cannot be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from fallow.core.views import View


def dense(view: View, x: Tensor, make: Callable[..., Tensor], *numbers: Tensor) -> Tensor:
    """D x in the way of the layer, D = make(*numbers) (out, in). For Deltas with `any_dtype`."""
    dtype = x.dtype if x.is_floating_point() else numbers[0].dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return view.op(_cast(x, dtype), make(*numbers).to(dtype))
    return cast(Tensor, _Dense.apply(view, make, dtype, x, *numbers))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, view: View, make: Callable[..., Tensor], dtype: torch.dtype, x: Tensor, *numbers: Tensor
    ) -> Tensor:
        ctx.view, ctx.make, ctx.dtype = view, make, dtype
        ctx.save_for_backward(x, *numbers)
        with torch.autocast(x.device.type, enabled=False):
            return view.op(_cast(x, dtype), make(*numbers).to(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *numbers = ctx.saved_tensors
        need_x, *need = ctx.needs_input_grad[3:]
        numbers = [t.detach().requires_grad_(n) for t, n in zip(numbers, need, strict=True)]
        with torch.autocast(x.device.type, enabled=False):
            with torch.enable_grad():
                matrix = ctx.make(*numbers)
            grad_x, grad_matrix = _of_product(
                ctx.view, _cast(x, ctx.dtype), matrix.detach().to(ctx.dtype), grad, need_x, any(need)
            )
            wanted = [t for t in numbers if t.requires_grad]
            found = iter(
                torch.autograd.grad(matrix, wanted, cast(Tensor, grad_matrix).to(matrix.dtype)) if wanted else ()
            )
        grad_x = None if grad_x is None else grad_x.to(x.dtype)
        return None, None, None, grad_x, *(next(found) if n else None for n in need)


def _of_product(
    view: View, x: Tensor, matrix: Tensor, grad: Tensor, need_x: bool, need_matrix: bool
) -> tuple[Tensor | None, Tensor | None]:
    if view.kind == "linear":
        return (
            grad @ matrix if need_x else None,
            grad.flatten(0, -2).T @ x.flatten(0, -2) if need_matrix else None,
        )
    x, matrix = (t.detach().requires_grad_(n) for t, n in ((x, need_x), (matrix, need_matrix)))
    with torch.enable_grad():
        out = view.op(x, matrix)
    found = iter(torch.autograd.grad(out, [t for t in (x, matrix) if t.requires_grad], grad))
    return next(found) if need_x else None, next(found) if need_matrix else None
