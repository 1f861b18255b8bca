"""s B A + S: low rank plus a sparse matrix of a fixed support, formed where it is needed and never kept.

    product    y = x Wᵀ, W = s B A + S      x (..., in), B (out, r), A (r, in), S: `values` (k,) at flat `index` (k,)
    backward   W is formed again: gx = gy W.  G = gyᵀ x, gB = s G Aᵀ, gA = s Bᵀ G, gvalues = G[index]

W and G (out, in) are temporaries, one alive at a time; kept for the backward are x and what W is made of. Where the
rows of x are so few that their products with S take less memory than W, neither is formed. W is computed in the dtype
of x, whatever that of the factors; an operator of torch's, so that compiled graphs cannot keep W either.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from fallow.core.coding import PackedIndex, unpack
from fallow.core.delta import number, one_of
from fallow.core.errors import ConfigError

ROWS_AT_ONCE = 1 << 22  # entries for which random keys are held while rows are drawn


def distinct(numel: int, count: int, generator: torch.Generator) -> Tensor:
    """(count,) sorted int64: uniform without replacement, in memory of the order of `count`."""
    if 2 * count > numel:
        left = torch.ones(numel, dtype=torch.bool)
        left[distinct(numel, numel - count, generator)] = False
        return left.nonzero().flatten()
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        more = torch.randint(numel, (int(1.1 * (count - len(found))) + 16,), generator=generator)
        found = torch.cat([found, more]).unique()
    kept = torch.ones(len(found), dtype=torch.bool)
    kept[torch.randperm(len(found), generator=generator)[: len(found) - count]] = False
    return found[kept]


def distinct_by_rows(shape: tuple[int, int], count: int, generator: torch.Generator) -> Tensor:
    """(count,) sorted int64: the same number in every row of (rows, columns), or one more, so that none is empty."""
    rows, columns = shape
    each = torch.full((rows,), count // rows)
    each[torch.randperm(rows, generator=generator)[: count % rows]] += 1
    found, step = [], max(1, ROWS_AT_ONCE // columns)
    for first in range(0, rows, step):
        part = each[first : first + step, None]
        chosen = torch.rand(len(part), columns, generator=generator).argsort(1).argsort(1) < part
        found.append(chosen.flatten().nonzero().flatten() + first * columns)
    return torch.cat(found)


def entries(shape: tuple[int, int], density: float) -> int:
    """K. ConfigError where it is none."""
    number("density", density, most=1.0, open_below=True)
    count = math.floor(density * shape[0] * shape[1])
    if not count:
        raise ConfigError(
            f"density={density} leaves a weight of {shape} no entry; give more than {1 / math.prod(shape):g}"
        )
    return count


def places(
    shape: tuple[int, int], count: int, support: str, generator: torch.Generator, residual: Tensor | None = None
) -> Tensor:
    """(count,) sorted flat indices."""
    one_of("support", support, ("uniform", "rows") if residual is None else ("uniform", "rows", "largest"))
    if residual is not None and support == "largest":
        return residual.abs().flatten().topk(count).indices.sort().values
    return (
        distinct_by_rows(shape, count, generator) if support == "rows" else distinct(math.prod(shape), count, generator)
    )


def keep(module: nn.Module, index: Tensor, shape: tuple[int, int], persistent: bool) -> None:
    """As the buffers `low` and `counts` of a module, 1 to 2 bytes for each place; `unpack` reads them."""
    packed = PackedIndex(index, math.prod(shape))
    module.register_buffer("low", packed.low, persistent)
    module.register_buffer("counts", packed.counts, persistent)


def compose(b: Tensor, a: Tensor, values: Tensor, index: Tensor, scale: float, base: Tensor | None = None) -> Tensor:
    """base + s B A + S (out, in), differentiable; no other matrix of this size is made, in the backward neither."""
    w = (b * scale) @ a if base is None else torch.addmm(base, b * scale, a)
    if torch.compiler.is_compiling():
        return w.flatten().scatter_add(0, index.long(), values.to(w.dtype)).view_as(w)
    return cast(Tensor, _Add.apply(w, values.to(w.dtype), index))  # autocast makes the product in its own dtype


class _Add(torch.autograd.Function):
    """Add values at flat indices, in place; the gradient is handed on as it is."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.mark_dirty(w)
        w.view(-1).scatter_add_(0, index.long(), values)
        return w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return grad, grad.reshape(-1).index_select(0, index) if ctx.needs_input_grad[1] else None, None


def product(
    x: Tensor, b: Tensor, a: Tensor, values: Tensor, low: Tensor, counts: Tensor | None, scale: float
) -> Tensor:
    """x (..., in) times (s B A + S)ᵀ, in the dtype of x. `low`, `counts`: the support, as a PackedIndex keeps it."""
    return cast(Tensor, _product(x, b, a, values, low, counts, scale))


def _made(b: Tensor, a: Tensor, values: Tensor, index: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    w = (b.to(dtype) * scale) @ a.to(dtype)
    w.view(-1).scatter_add_(0, index.long(), values.to(dtype))
    return w


def _few(x: Tensor, b: Tensor, a: Tensor, index: Tensor) -> bool:
    return x.shape[0] * index.numel() <= b.shape[0] * a.shape[1]


@torch.library.custom_op("fallow::low_rank_sparse", mutates_args=())
def _product(
    x: Tensor, b: Tensor, a: Tensor, values: Tensor, low: Tensor, counts: Tensor | None, scale: float
) -> Tensor:
    shape, x = x.shape, x.reshape(-1, x.shape[-1])
    out, inner = b.shape[0], a.shape[1]
    index = unpack(low, counts, out * inner)
    if _few(x, b, a, index):
        index = index.long()
        y = (x @ a.to(x.dtype).T) @ (b.to(x.dtype) * scale).T + _times(x, index // inner, index % inner, values, out)
    else:
        y = x @ _made(b, a, values, index, scale, x.dtype).T
    return y.view(*shape[:-1], out)


def _times(x: Tensor, rows: Tensor, columns: Tensor, values: Tensor, out: int) -> Tensor:
    """x (n, in) times Sᵀ (in, out), S of these values at these places, summed in float32 or better."""
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = x.T.contiguous().index_select(0, columns).to(wide).mul_(values[:, None].to(wide))
    return torch.zeros(out, len(x), dtype=wide, device=x.device).index_add_(0, rows, parts).T.to(x.dtype)


@_product.register_fake
def _(x: Tensor, b: Tensor, a: Tensor, values: Tensor, low: Tensor, counts: Tensor | None, scale: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], b.shape[0])


@torch.library.custom_op("fallow::low_rank_sparse_backward", mutates_args=())
def _gradients(
    grad: Tensor, x: Tensor, b: Tensor, a: Tensor, values: Tensor, low: Tensor, counts: Tensor | None, scale: float,
    of_x: bool, of_w: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape, x, grad = x.shape, x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    dtype, out, inner = x.dtype, b.shape[0], a.shape[1]
    index = unpack(low, counts, out * inner)
    scaled, thin = b.to(dtype) * scale, a.to(dtype)
    grad_x, grad_b, grad_a, grad_values = (x.new_empty(0) for _ in range(4))
    if _few(x, b, a, index):
        rows, columns = index.long() // inner, index.long() % inner
        if of_x:
            grad_x = (grad @ scaled) @ thin + _times(grad, columns, rows, values, inner)
        if of_w:
            grad_b, grad_a = grad.T @ (x @ thin.T), (grad @ scaled).T @ x
            grad_values = (
                (grad.T.contiguous().index_select(0, rows) * x.T.contiguous().index_select(0, columns))
                .to(values.dtype)
                .sum(1)
            )
    else:
        if of_x:
            grad_x = grad @ _made(b, a, values, index, scale, dtype)
        if of_w:
            dense = grad.T @ x
            grad_b, grad_a, grad_values = dense @ thin.T, scaled.T @ dense, dense.view(-1).index_select(0, index)
    grad_x = grad_x.view(shape) if of_x else grad_x
    return grad_x, (grad_b * scale).to(b.dtype), grad_a.to(a.dtype), grad_values.to(values.dtype)


@_gradients.register_fake
def _(
    grad: Tensor, x: Tensor, b: Tensor, a: Tensor, values: Tensor, low: Tensor, counts: Tensor | None, scale: float,
    of_x: bool, of_w: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x = x.new_empty(x.shape if of_x else 0)
    others = [t.new_empty(t.shape if of_w else 0) for t in (b, a, values)]
    return grad_x, others[0], others[1], others[2]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_x, *of_w = ctx.needs_input_grad[:4]
    found = _gradients(grad, *ctx.saved_tensors, ctx.scale, of_x, any(of_w))
    needed = (t if need else None for t, need in zip(found, (of_x, *of_w), strict=True))
    return (*needed, None, None, None)


_product.register_autograd(_backward, setup_context=_setup)
