"""A frozen Linear and a low-rank change of it as one operator: y = W x + bias + c * B (M (A x)).

    x (..., in), W (out, in), bias (out,); A (r, in), B (out, s)
    M (s, r), a matrix, or gates (r,), or none; c (out,) or none

    kept            x where A is trained, p = A x where B or M is, u = B M p where c is; u in the dtype of x
    backward        q = (c B)ᵀ g    gB = c * g (M p)ᵀ    gM = q pᵀ    gc = g * u    gA = Mᵀ q xᵀ    gx = Wᵀ g + Aᵀ Mᵀ q

y and gx are made by the layer's own products, and what the change adds goes into them where they lie: no second tensor
of their size. All that is r wide is kept as (r, rows), the layout in which thin products run fastest on a CPU. Where x
is narrower than A (bf16 beside float32), it and g are cast some rows at a time, and each sum is rounded once.

Differentiable twice, by plain operators, unless x was not kept because A is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fallow.core.errors import ModelError

CPU_PIECE, PIECE = 1 << 17, 1 << 26  # numbers cast at one time: what a core's cache holds, what a GPU has room for


class Folding(Protocol):
    """What may stand in the place of the matrix A, where A x costs less than a product."""

    def down(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """A x (r, n) of rows (n, in), in this dtype."""

    def back(self, rows: Tensor, h: Tensor) -> None:
        """Add hᵀ A to rows (n, in), in place; h (r, n)."""

    def plain(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A x (..., r) by operators that autograd knows."""


def low_rank_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    b: Tensor,
    a: Tensor | Folding,
    middle: Tensor | None = None,
    outer: Tensor | None = None,
) -> Tensor:
    """y (..., out) in the dtype of x, which is that of W and no wider than that of B. W and the bias have no gradient.

    `a`: A, or what folds x in its place; `middle`: M; `outer`: c.
    """
    matrix, folding = (a, None) if isinstance(a, Tensor) else (None, a)
    return cast(Tensor, _LowRankLinear.apply(x, w, bias, b, matrix, middle, outer, folding))


def _plain(
    x: Tensor, w: Tensor | None, b: Tensor, a: Tensor | None, middle: Tensor | None, outer: Tensor | None,
    folding: Folding | None,
) -> Tensor:  # fmt: skip
    """y but for what depends on nothing that has a gradient; no W where x has none."""
    h = F.linear(x.to(b.dtype), cast(Tensor, a)) if folding is None else folding.plain(x, b.dtype)
    if middle is not None:
        h = h * middle if middle.dim() == 1 else F.linear(h, middle)
    change = F.linear(h, b)
    change = change if outer is None else change * outer
    return (change if w is None else F.linear(x, w) + change).to(x.dtype)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, b: Tensor, a: Tensor | None, middle: Tensor | None,
        outer: Tensor | None, folding: Folding | None,
    ) -> Tensor:  # fmt: skip
        y = F.linear(x, w, bias).contiguous()
        rows, sums = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        of_b, of_a, of_middle, of_outer = ctx.needs_input_grad[3:7]
        u = torch.empty_like(sums) if of_outer else None
        narrow = []
        for part in _pieces(rows, max(w.shape), b):
            p = cast(Tensor, a) @ rows[part].to(b.dtype).T if folding is None else folding.down(rows[part], b.dtype)
            narrow.append(p)
            h = _mixed(middle, p)
            if u is not None and u.dtype == b.dtype:
                sums.addcmul_(torch.mm(h.T, b.T, out=u), cast(Tensor, outer))
            elif u is not None:
                change = h.T @ b.T
                u[part] = change
                sums[part] = change.mul_(cast(Tensor, outer)).add_(sums[part])
            else:
                add_product(sums[part], h.T, (b if outer is None else outer.unsqueeze(1) * b).T)
        kept = (narrow[0] if len(narrow) == 1 else torch.cat(narrow, 1)) if of_b or of_middle else None
        of_x, ctx.folding = ctx.needs_input_grad[0], folding
        ctx.save_for_backward(x if of_a else None, w if of_x else None, b, a, middle, outer, kept, u)
        return cast(Tensor, torch.ops.aten._unsafe_view(y, y.shape))  # no view: what follows may write into it

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _twice(ctx, grad)
        x, w, b, a, middle, outer, p, u = ctx.saved_tensors
        of_x, _, _, of_b, of_a, of_middle, of_outer, _ = ctx.needs_input_grad
        batch, grad = grad.shape[:-1], grad.reshape(-1, grad.shape[-1])
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        into = grad @ w if of_x else None
        grad_b = torch.zeros_like(b.T, memory_format=torch.contiguous_format) if of_b else None
        grad_a = torch.zeros_like(a) if of_a else None
        grad_middle = torch.zeros_like(middle) if of_middle else None
        grad_outer = column_sums(grad, u) if of_outer else None
        scaled = b if outer is None else outer.unsqueeze(1) * b
        for part in _pieces(grad, max(b.shape[0], 0 if a is None else a.shape[1]), b):
            g = grad[part].to(b.dtype)
            q = scaled.T @ g.T
            if grad_b is not None:
                grad_b.addmm_(_mixed(middle, p[:, part]), g)
            if grad_middle is not None:
                if grad_middle.dim() == 1:
                    grad_middle += (q * p[:, part]).sum(1)
                else:
                    grad_middle.addmm_(q, p[:, part].T)
            if middle is not None:
                q = q * middle.unsqueeze(1) if middle.dim() == 1 else middle.T @ q
            if grad_a is not None:
                grad_a.addmm_(q, cast(Tensor, rows)[part].to(b.dtype))
            if into is not None and ctx.folding is None:
                add_product(into[part], q.T, a)
            elif into is not None:
                ctx.folding.back(into[part], q)
        if grad_b is not None:
            grad_b = grad_b.T if outer is None else grad_b.T * outer.unsqueeze(1)
        return (
            None if into is None else into.view(*batch, into.shape[1]),
            None,
            None,
            grad_b,
            grad_a,
            grad_middle,
            grad_outer,
            None,
        )


def pieces(rows: Tensor, width: int, least: int = 1) -> Iterator[slice]:
    """Of rows, so many that numbers of which each row has `width` may be made of them on the way; `least` at least."""
    size = max(least, (CPU_PIECE if rows.device.type == "cpu" else PIECE) // width)
    return (slice(start, start + size) for start in range(0, max(1, len(rows)), size))


def _pieces(rows: Tensor, width: int, b: Tensor) -> Iterator[slice]:
    """Few rows in a product with many ranks would spend their time on packing the factor, so they are not too few."""
    return iter((slice(None),)) if rows.dtype == b.dtype else pieces(rows, width, 2 * b.shape[1])


def _mixed(middle: Tensor | None, p: Tensor) -> Tensor:
    """M p (s, n)"""
    if middle is None:
        return p
    return p * middle.unsqueeze(1) if middle.dim() == 1 else middle @ p


def column_sums(left: Tensor, right: Tensor) -> Tensor:
    """(columns,): of the products of the entries of two matrices of one dtype, float32 or wider."""
    wide = torch.promote_types(left.dtype, torch.float32)
    total = torch.zeros(left.shape[1], dtype=wide, device=left.device)
    for part in pieces(left, left.shape[1]):
        total += (left[part].to(wide) * right[part]).sum(0)
    return total


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """sums += left right, rounded once to their dtype."""
    if sums.dtype == right.dtype:
        sums.addmm_(left, right)
    else:
        sums.copy_(torch.addmm(sums.to(right.dtype), left, right))


def _twice(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as functions of everything, for those who differentiate them again."""
    tensors = ctx.saved_tensors[:6]
    if tensors[0] is None:
        raise ModelError("a change whose first factor is frozen keeps no input, so it has no second derivatives")
    x, w, b, a, middle, outer = tensors
    out = _plain(x, w, b, a, middle, outer, ctx.folding)
    of_x, _, _, *needed, _ = ctx.needs_input_grad
    wanted = [tensor for tensor, need in zip((x, b, a, middle, outer), (of_x, *needed), strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    of_input = next(found) if of_x else None
    return of_input, None, None, *(next(found) if need else None for need in needed), None
