"""A frozen Linear with LoCA's update as one operator: y = W x + bias + Cᵀ S C x. D (out, in) is never made.

    x (N, in), W (out, in); S (out, in) of n components, S[i_k, j_k] += alpha a_k; C: the DCT-II of either side
    X = C x, G = C g        the cosine transforms of the rows, by FFT
    forward                 y = W x + bias + Cᵀ (S X)
    backward                gx = Wᵀ g + Cᵀ (Sᵀ G)      K[i, j] = alpha sum over rows of G[i] X[j]

K, the spectrum of D's gradient, is taken at the components only and, for their places, at the four neighbours of each.
Kept: x, the coefficients, the places. X is made again in the backward; all transforms are made some rows at a time, in
the dtype of the coefficients. Once differentiable.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fallow.core.low_rank_linear import pieces
from fallow.core.transforms import dct, idct


class CosineLinear(torch.autograd.Function):
    """`a`: (n,) coefficients. `positions`: (2, n), rounded to rows and columns of the spectrum; their gradients are
    central differences times a / 2, clipped to [-1, 1].
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, positions: Tensor, alpha: float
    ) -> Tensor:
        place, scaled = positions.round().long(), alpha * a
        y = F.linear(x, w, bias).contiguous()
        rows, sums = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for part in _parts(rows, w, a):
            picked = dct(rows[part].to(a.dtype)).index_select(1, place[1])
            sums[part] += idct(_spread(picked.mul_(scaled), place[0], len(w)))
        ctx.alpha = alpha
        ctx.save_for_backward(x, w, a, place)
        made: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, place = ctx.saved_tensors
        need_x, _, _, need_a, need_places, _ = ctx.needs_input_grad
        grad, rows, scaled = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), ctx.alpha * a
        into = grad @ w if need_x else None
        (below, above), k = neighbours(place, w.shape), a.new_zeros(3, len(a))
        for part in _parts(rows, w, a):
            g = dct(grad[part].to(a.dtype))
            down = g.index_select(1, place[0])
            if need_a or need_places:
                spectrum = dct(rows[part].to(a.dtype))
                right = spectrum.index_select(1, place[1])
                k[0] += (down * right).sum(0)
            if need_places:
                k[1] += (right.mul_(g.index_select(1, above[0]) - g.index_select(1, below[0]))).sum(0)
                across = spectrum.index_select(1, above[1]) - spectrum.index_select(1, below[1])
                k[2] += (across.mul_(down)).sum(0)
            if into is not None:
                into[part] += idct(_spread(down.mul_(scaled), place[1], w.shape[1]))
        k *= ctx.alpha
        places = (k[1:] * (a / 2)).clamp_(-1, 1) if need_places else None
        return None if into is None else into.view(x.shape), None, None, k[0] if need_a else None, places, None


def neighbours(place: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The places (2, n) one lower and one higher along each side; at a border the place itself."""
    last = torch.tensor(shape, device=place.device).unsqueeze(1) - 1
    return (place - 1).clamp_min(0), torch.minimum(place + 1, last)


def _spread(picked: Tensor, at: Tensor, width: int) -> Tensor:
    """(rows, width): the columns of `picked` (rows, n), added where `at` says."""
    return picked.new_zeros(len(picked), width).index_add_(1, at, picked)


def _parts(rows: Tensor, w: Tensor, a: Tensor) -> Iterator[slice]:
    return pieces(rows, max(*w.shape, len(a)), 16)
