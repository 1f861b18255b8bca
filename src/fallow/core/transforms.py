"""Orthonormal cosine transforms, which methods share.

    C_n[i, j] = c_i cos(pi (2j + 1) i / 2n)    c_0 = sqrt(1/n), c_i = sqrt(2/n)    C Cᵀ = I, (n, n)

    dct(x)      C x along one dimension (DCT-II)       dct2(X)     C_p X C_qᵀ of the last two
    idct(x)     Cᵀ x (DCT-III), its inverse            idct2(X)    C_pᵀ X C_q

Each is one real FFT of the reordered signal (Makhoul, IEEE Trans. ASSP 28(1), 1980): O(n log n), every size, odd ones
too, any device, differentiable as often as wanted, nothing kept for the backward. float16 and bfloat16 are computed in
float32 and cast back.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor


def dct(x: Tensor, dim: int = -1) -> Tensor:
    """The orthonormal DCT-II of x along `dim`, in the shape and dtype of x."""
    return cast(Tensor, _Cosine.apply(x, dim))


def idct(x: Tensor, dim: int = -1) -> Tensor:
    """The orthonormal DCT-III of x along `dim`, the inverse and the transpose of `dct`."""
    return cast(Tensor, _InverseCosine.apply(x, dim))


def dct2(x: Tensor) -> Tensor:
    """C_p X C_qᵀ of X (..., p, q)."""
    return dct(dct(x), -2)


def idct2(x: Tensor) -> Tensor:
    """C_pᵀ X C_q of X (..., p, q), the inverse of `dct2`."""
    return idct(idct(x), -2)


def dct_rows(index: Tensor, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """C_n[index, :] (k, n) of whole numbers `index` (k,), on their device.

    The angle is reduced in whole numbers and the cosine taken in float64 (where the device has it): (2j + 1) i is
    beyond what float32 tells apart for n of some thousands.
    """
    columns = 2 * torch.arange(n, device=index.device) + 1
    turns = (index.long().unsqueeze(-1) * columns) % (4 * n)
    exact = dtype if index.device.type == "mps" else torch.float64
    squared = (2.0 - (index == 0).to(exact)) / n
    return (torch.cos(turns.to(exact) * (math.pi / (2 * n))) * squared.sqrt().unsqueeze(-1)).to(dtype)


def dct_matrix(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """C_n (n, n)."""
    return dct_rows(torch.arange(n, device=device), n, dtype)


class _Cosine(torch.autograd.Function):
    """Each is the other's derivative, so neither keeps anything; plain autograd keeps the whole signal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        work = _wide(x).movedim(dim, -1)
        n = work.shape[-1]
        order = torch.cat([work[..., ::2], work[..., 1::2].flip(-1)], -1)
        half = torch.view_as_real(torch.fft.rfft(order) * _turn(n, work, -1.0))  # k = 0 .. n/2
        upper = -half[..., 1 : (n + 1) // 2, 1].flip(-1)  # the others are their imaginary parts
        return (torch.cat([half[..., 0], upper], -1) * _norms(n, work)).movedim(-1, dim).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return idct(grad, ctx.dim), None


class _InverseCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        work = _wide(x).movedim(dim, -1)
        n = work.shape[-1]
        scaled = work / _norms(n, work)
        imag = torch.cat([torch.zeros_like(scaled[..., :1]), -scaled[..., n - n // 2 :].flip(-1)], -1)
        spectrum = torch.complex(scaled[..., : n // 2 + 1], imag) * _turn(n, work, 1.0)
        order = torch.fft.irfft(spectrum, n=n)
        even, odd = order[..., : (n + 1) // 2], order[..., (n + 1) // 2 :].flip(-1)
        pairs = torch.stack([even[..., : n // 2], odd], -1).flatten(-2)
        return torch.cat([pairs, even[..., n // 2 :]], -1).movedim(-1, dim).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return dct(grad, ctx.dim), None


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _turn(n: int, like: Tensor, sign: float) -> Tensor:
    """exp(sign * i pi k / 2n), k = 0 .. n/2: angles below pi/4, exact enough in the working dtype."""
    angle = torch.arange(n // 2 + 1, dtype=like.dtype, device=like.device) * (math.pi / (2 * n))
    return torch.complex(torch.cos(angle), sign * torch.sin(angle))


def _norms(n: int, like: Tensor) -> Tensor:
    norms = torch.full((n,), math.sqrt(2 / n), dtype=like.dtype, device=like.device)
    norms[:1] = math.sqrt(1 / n)
    return norms
