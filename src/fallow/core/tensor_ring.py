"""Tensor rings: large matrices as traces of products of small cores.

    T[(i_1 .. i_D), (j_1 .. j_D)] = trace(A_1[i_1, j_1] A_2[i_2, j_2] .. A_D[i_D, j_D])    A_d (I_d, J_d, R, R)

The first index is the most significant, as in a plain reshape. With R = 1 it is the Kronecker product of the cores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from fallow.core.low_rank_linear import pieces

PUBLISHED = {(320, 3): (4, 8, 10)}  # TLoRA's table where it is not the smallest sum; its other rows are


def balanced(n: int, order: int) -> tuple[int, ...]:
    """At most `order` factors of n in ascending order with the smallest sum, without ones; (n,) for a prime."""
    return PUBLISHED.get((n, order)) or tuple(f for f in _ascending(n, order, 1) if f > 1) or (1,)


@lru_cache(maxsize=65536)
def _ascending(n: int, order: int, least: int) -> tuple[int, ...]:
    """`order` factors of n, none below `least`, with the smallest sum; () where there are none."""
    if order == 1:
        return (n,) if n >= least else ()
    splits = ((d, *_ascending(n // d, order - 1, d)) for d in range(least, int(n ** (1 / order)) + 2) if n % d == 0)
    return min((s for s in splits if len(s) == order), key=lambda s: (sum(s), s), default=())


def ring_apply(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """x T (..., J) of x (..., I), in the dtype of x: core by core (`taken_apart`), or by T where that costs less.

    Core by core keeps x and the cores; x is cast to their dtype, and spread over the bonds, some rows at a time.
    """
    if not taken_apart([(core.shape[0], core.shape[1]) for core in cores], cores[0].shape[2]) or not len(x):
        return (x.to(cores[0].dtype) @ ring_matrix(cores)).to(x.dtype)
    if torch.compiler.is_compiling():
        rows = x.reshape(-1, x.shape[-1]).to(cores[0].dtype)
        return _chain(rows.T, cores).T.reshape(*x.shape[:-1], -1).to(x.dtype)
    return cast(Tensor, _RingApply.apply(x, *cores))


def taken_apart(sizes: Sequence[tuple[int, int]], bonds: int) -> bool:
    """Whether a row of x costs less core by core, in products of small matrices that reach half the speed, than in T.

    `sizes`: (I_d, J_d) of each core; `bonds`: R.
    """
    dense = math.prod([i * j for i, j in sizes])
    return len(sizes) > 1 and (bonds == 1 or 2 * ring_cost(sizes, bonds) <= dense)


def ring_cost(sizes: Sequence[tuple[int, int]], bonds: int) -> int:
    """Multiplications of a row of x with T, core by core: I (R^2 I_1 + R^3 (I_2 + ..) + R^2 I_D) where I_d = J_d."""
    total, before, after = 0, 1, math.prod([i for i, _ in sizes])
    for d, (i, j) in enumerate(sizes):
        total += bonds ** (2 if d in (0, len(sizes) - 1) else 3) * before * j * after
        before, after = before * j, after // i
    return total


def _chain(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """Tᵀ x (J, n) of x (I, n), of two cores or more: each takes i_d and the bond before it, gives j_d and its own.

    In this order of indices no product but the first x needs a copy: (a, j_1 .. j_d, bond, i_d+1 .. i_D, n), where a is
    the bond that closes the ring.
    """
    first, *inner, last = cores
    bonds, batch = first.shape[2], first.shape[2] * first.shape[1]
    u = first.permute(2, 1, 3, 0).flatten(0, 2) @ x.reshape(first.shape[0], -1)
    for core in inner:
        matrix = core.permute(1, 3, 2, 0).flatten(2).flatten(0, 1)
        u = torch.bmm(matrix.expand(batch, -1, -1), u.view(batch, matrix.shape[1], -1))
        batch *= core.shape[1]
    ends = last.permute(3, 1, 2, 0).flatten(2)  # (a, j_D, (bond, i_D))
    u = u.view(bonds, batch // bonds, ends.shape[2], -1)
    y = torch.bmm(ends[0].expand(batch // bonds, -1, -1), u[0])
    for a in range(1, bonds):
        y = torch.baddbmm(y, ends[a].expand(batch // bonds, -1, -1), u[a])
    return y.flatten(0, 1)


class _RingApply(torch.autograd.Function):
    """`_chain` by pieces of rows, which is run again in the backward: it keeps x and the cores."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *cores: Tensor) -> Tensor:
        ctx.save_for_backward(x, *cores)
        rows = x.reshape(-1, x.shape[-1])
        y = x.new_empty(len(rows), math.prod([core.shape[1] for core in cores]))
        for part in _parts(rows, cores):
            y[part] = _chain(_turned(rows[part], cores), cores).T
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *cores = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _twice(x, cores, grad, ctx.needs_input_grad)
        need_x, *need = ctx.needs_input_grad
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        into = torch.empty_like(rows) if need_x else None
        cores = [core.detach().requires_grad_(needed) for core, needed in zip(cores, need, strict=True)]
        learned = [core for core in cores if core.requires_grad]
        sums = [torch.zeros_like(core) for core in learned]
        for part in _parts(rows, cores):
            piece = _turned(rows[part], cores).requires_grad_(need_x)
            with torch.enable_grad():
                y = _chain(piece, cores)
            found = torch.autograd.grad(y, [*learned, piece] if need_x else learned, _turned(grad[part], cores))
            for total, one in zip(sums, found, strict=False):
                total += one
            if into is not None:
                into[part] = found[-1].T
        given = iter(sums)
        of_x = None if into is None else into.view(x.shape)
        return of_x, *(next(given) if needed else None for needed in need)


def _parts(rows: Tensor, cores: Sequence[Tensor]) -> Iterator[slice]:
    widest = max(rows.shape[1], math.prod([core.shape[1] for core in cores]))
    return pieces(rows, cores[0].shape[2] ** 2 * widest, 64)


def _turned(rows: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """(I, n) of rows (n, I), in the dtype of the cores, as a tensor of its own."""
    return rows.detach().T.to(cores[0].dtype, copy=True, memory_format=torch.contiguous_format)


def _twice(x: Tensor, cores: list[Tensor], grad: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients as functions of everything, for those who differentiate them again."""
    y = _chain(x.reshape(-1, x.shape[-1]).T.to(cores[0].dtype), cores).T.reshape(grad.shape).to(x.dtype)
    wanted = [tensor for tensor, needed in zip((x, *cores), need, strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in need)


def ring_matrix(cores: Sequence[Tensor]) -> Tensor:
    """T (I, J)."""
    if len(cores) == 1:
        return torch.einsum("ijaa->ij", cores[0])
    first, *inner, last = cores
    t = first.permute(2, 3, 0, 1)
    for core in inner:
        t = torch.einsum("abij,klbc->acikjl", t, core).flatten(4, 5).flatten(2, 3)
    return torch.einsum("abij,klba->ikjl", t, last).flatten(2, 3).flatten(0, 1)


def ring_rows(cores: Sequence[Tensor]) -> Tensor:
    """B_1[o_1] .. B_D[o_D] for all rows (o_1 .. o_D): (O, R, R) of cores B_d (O_d, R, R)."""
    first, *rest = cores
    for core in rest:
        first = (first.unsqueeze(1) @ core).flatten(0, 1)
    return first
