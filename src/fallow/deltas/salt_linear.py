"""A frozen Linear with SALT's mixing of its singular directions as one operator: y = (W + U M Vᵀ) x + bias.

    x (n, in), W (out, in), U (out, k), Vᵀ (k, in); M = blockdiag(diag(gates), C), gates (r,) and C (k - r, k - r) made
    of a few numbers

    few rows    p = Vᵀ x and q = Uᵀ g; y = W x + U M p + bias, gx = Wᵀ g + V Mᵀ q, gM = q pᵀ; kept: p
    many rows   W' = W + U M Vᵀ formed, y = W' x + bias, gx = W'ᵀ g, gM = Uᵀ (g xᵀ) V; kept: x

Many are those for which it saves multiplications. M and W' live for one product and are made again in the backward.
Where x is narrower than U (bf16 beside float32), W' would round small changes away, so it is not formed; x and g are
cast some rows at a time. Once differentiable.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fallow.core.low_rank_linear import add_product, pieces


def blocks(s: Tensor, a: Tensor, b: Tensor, x: Tensor, y: Tensor, relu: str) -> tuple[Tensor, Tensor]:
    """The gates (r,), relu(a * s_top + b) - s_top, and C (k - r, k - r): the relu "all" or "diag" of diag(s_tail) + X Y
    less diag(s_tail).
    """
    top, tail, change = s[: len(a)], s[len(a) :], x @ y
    gates = torch.relu(a * top + b) - top
    if relu == "all":
        return gates, torch.relu(change + tail.diag()) - tail.diag()
    sigma = tail + change.diagonal()
    return gates, change + (torch.relu(sigma) - sigma).diag()


def mixed_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, u: Tensor, vt: Tensor, relu: str, s: Tensor, *numbers: Tensor
) -> Tensor:
    """y (..., out) in the dtype of x, which is W's and no wider than U's. `numbers`: a, b (r,), X (k - r, q), Y (q,
    k - r), the only ones but x that have a gradient.
    """
    return cast(Tensor, _MixedLinear.apply(x, w, bias, u, vt, relu, s, *numbers))


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, u: Tensor, vt: Tensor, relu: str, s: Tensor,
        *numbers: Tensor,
    ) -> Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        gates, c = _blocks_in_place(relu, s, *numbers)
        ctx.formed, ctx.relu = rows.dtype == u.dtype and _worth_forming(len(rows), u, vt, c), relu
        if ctx.formed:
            y, kept = F.linear(x, _formed(w, u, vt, gates, c), bias).contiguous(), x
        else:
            y = F.linear(x, w, bias).contiguous()
            kept = torch.empty(len(vt), len(rows), dtype=u.dtype, device=x.device)
            sums = y.view(-1, y.shape[-1])
            for part in _parts(rows, u, vt):
                p = kept[:, part] = vt @ rows[part].to(u.dtype).T
                add_product(sums[part], _mix(gates, c, p).T, u.T)
        of_x, of_numbers = ctx.needs_input_grad[0], any(ctx.needs_input_grad[7:])
        ctx.save_for_backward(kept if of_numbers else None, w if of_x else None, u, vt, s, *numbers)
        return cast(Tensor, torch.ops.aten._unsafe_view(y, y.shape))  # no view: what follows may write into it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, w, u, vt, s, *numbers = ctx.saved_tensors
        batch, grad = grad.shape[:-1], grad.reshape(-1, grad.shape[-1])
        gates, c = _blocks_in_place(ctx.relu, s, *numbers)
        into, of_gates, of_c = None, torch.zeros_like(gates), None if kept is None else torch.zeros_like(c)
        r = len(gates)
        if ctx.formed:
            into = None if w is None else grad @ _formed(w, u, vt, gates, c)
            if of_c is not None:
                left = u.T @ (grad.T @ kept.reshape(-1, kept.shape[-1]))
                of_gates, of_c = (left[:r] * vt[:r]).sum(1), torch.mm(left[r:], vt[r:].T, out=of_c)
        else:
            into = None if w is None else grad @ w
            for part in _parts(grad, u, vt):
                q = u.T @ grad[part].to(u.dtype).T
                if of_c is not None:
                    of_gates += (q[:r] * kept[:r, part]).sum(1)
                    of_c.addmm_(q[r:], kept[r:, part].T)
                if into is not None:
                    add_product(into[part], _mix(gates, c.T, q).T, vt)
        found = (None,) * 4 if of_c is None else _of_numbers(ctx.relu, of_gates, of_c, s, *numbers)
        return (None if into is None else into.view(*batch, into.shape[1]), *(None,) * 6, *found)


def _worth_forming(rows: int, u: Tensor, vt: Tensor, c: Tensor) -> bool:
    """By the multiplications of a forward and backward."""
    k, out, inner = len(vt), len(u), vt.shape[1]
    beside = rows * (2 * k * (out + inner) + 3 * len(c) ** 2)
    return rows * out * inner + 3 * k * (out * inner + k * k) < beside


def _parts(rows: Tensor, u: Tensor, vt: Tensor) -> Iterator[slice]:
    """As few rows as M is wide would spend their time on reading it."""
    return iter((slice(None),)) if rows.dtype == u.dtype else pieces(rows, max(len(u), vt.shape[1]), 2 * len(vt))


def _mix(gates: Tensor, c: Tensor, p: Tensor) -> Tensor:
    """M p (k, n)"""
    h, r = torch.empty_like(p), len(gates)
    torch.mul(p[:r], gates.unsqueeze(1), out=h[:r])
    torch.mm(c, p[r:], out=h[r:])
    return h


def _formed(w: Tensor, u: Tensor, vt: Tensor, gates: Tensor, c: Tensor) -> Tensor:
    """W + U M Vᵀ, M first multiplied into the vectors of the smaller side."""
    if len(u) <= vt.shape[1]:
        return torch.addmm(w, _mix(gates, c.T, u.T).T, vt)
    return torch.addmm(w, u, _mix(gates, c, vt))


def _blocks_in_place(relu: str, s: Tensor, a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`blocks`, in one matrix."""
    r, c = len(a), x @ y
    if relu == "all":
        c.diagonal().add_(s[r:])
        c.relu_().diagonal().sub_(s[r:])
    else:
        c.diagonal().clamp_(min=-s[r:])
    return torch.relu(a * s[:r] + b) - s[:r], c


def _of_numbers(
    relu: str, of_gates: Tensor, of_c: Tensor, s: Tensor, a: Tensor, b: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of a, b, X, Y. What the relu holds back is zeroed in `of_c`."""
    r = len(a)
    of_b = of_gates * (a * s[:r] + b > 0)
    if relu == "all":
        passed = x @ y
        passed.diagonal().add_(s[r:])
        of_c = passed.gt_(0).mul_(of_c)
    else:
        of_c.diagonal().mul_(s[r:] + (x * y.T).sum(1) > 0)
    return of_b * s[:r], of_b, of_c @ y.T, x.T @ of_c
