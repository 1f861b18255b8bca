"""A frozen Linear with RandLoRA's update as one operator: y = (W + B U) x + bias, or (W + Uᵀ Bᵀ) x + bias.

    x (N, in), W (out, in); B (M, k) frozen, U (k, m) made of few numbers, M and m the larger and the smaller side
    forward     y = (W + D) x where forming D, M m k, costs less than N (m + M) k for taking x through U and B
    backward    tall, out = M:  gU = (Bᵀ g) xᵀ, or Bᵀ (g xᵀ) once N > M, where gx = (W + D)ᵀ g as well
                wide, in = M:   p = Bᵀ x is kept in the place of x, so that y = W x + Uᵀ p + bias and gU = p gᵀ; gx as y

D and W + D live for one product. In half precision D has a product of its own, since W + D would round its small
entries away; what is made in float32 on the way is made by rows. U is made again in the backward. Once differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fallow.core.low_rank_linear import add_product, pieces


class BasesLinear(torch.autograd.Function):
    """`scaled`: U of `numbers`, by torch operators of float32 or wider; `diagonals`: their gradients, of
    U's, which it may write into.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, b: Tensor, tall: bool,
        scaled: Callable[..., Tensor], diagonals: Callable[..., tuple[Tensor, Tensor]], a: Tensor, *numbers: Tensor,
    ) -> Tensor:  # fmt: skip
        u, rows, kept = scaled(a, *numbers), x.reshape(-1, x.shape[-1]), x
        narrow = x.dtype != u.dtype
        formed = tall and _worth_forming(rows, b, u)
        w_ = torch.addmm(w, b, u) if formed and not narrow else w
        y = F.linear(x, w_, bias).contiguous()
        sums = y.view(-1, y.shape[-1])
        if formed and narrow:
            sums += rows @ (b @ u).to(x.dtype).T
        elif tall and not formed:
            for part in _parts(rows, len(b), narrow):
                add_product(sums[part], rows[part].to(u.dtype) @ u.T, b.T)
        elif not tall:
            kept = torch.empty(len(rows), b.shape[1], dtype=u.dtype, device=x.device)
            for part in _parts(rows, len(b), narrow):
                torch.mm(rows[part].to(u.dtype), b, out=kept[part])
                add_product(sums[part], kept[part], u)
        ctx.tall, ctx.scaled, ctx.diagonals, ctx.shape = tall, scaled, diagonals, x.shape
        ctx.save_for_backward(kept, w if ctx.needs_input_grad[0] else None, b, a, *numbers)
        made: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, w, b, a, *numbers = ctx.saved_tensors
        u, grad, kept = ctx.scaled(a, *numbers), grad.reshape(-1, grad.shape[-1]), kept.reshape(-1, kept.shape[-1])
        narrow = grad.dtype != u.dtype
        formed = len(grad) > len(b) if ctx.tall else _worth_forming(grad, b, u)
        into = None
        if ctx.needs_input_grad[0]:
            left, right = (b, u) if ctx.tall else (u.T, b.T)
            into = grad @ (torch.addmm(w, left, right) if formed and not narrow else w)
            if formed and narrow:
                into += grad @ (left @ right).to(grad.dtype)
        if formed and ctx.tall:
            u = left = right = None  # what is not needed any more is not held
            return _all(ctx, into, b.T @ (grad.T @ kept).to(b.dtype), a, numbers)
        grad_u = torch.zeros_like(u)
        for part in _parts(grad, len(b), narrow):
            g = grad[part].to(b.dtype)
            if ctx.tall:
                q = g @ b
                grad_u.addmm_(q.T, kept[part].to(b.dtype))
                if into is not None:
                    add_product(into[part], q, u)
            else:
                grad_u.addmm_(kept[part].T, g)
                if into is not None and not formed:
                    add_product(into[part], g @ u.T, b.T)
        u = left = right = None
        return _all(ctx, into, grad_u, a, numbers)


def _all(ctx: Any, into: Tensor | None, grad_u: Tensor, a: Tensor, numbers: list[Tensor]) -> tuple[Tensor | None, ...]:
    into = None if into is None else into.view(ctx.shape)
    return into, None, None, None, None, None, None, None, *ctx.diagonals(grad_u, a, *numbers)


def _worth_forming(rows: Tensor, b: Tensor, u: Tensor) -> bool:
    large, small = len(b), u.shape[1]
    return len(rows) * (large + small) > large * small


def _parts(rows: Tensor, large: int, narrow: bool) -> Any:
    return pieces(rows, large, large // 6) if narrow else (slice(None),)
