"""Orthonormal wavelet transforms along one dimension, of any number of levels, which methods share.

    low_j = sum_t h_t x_{2j + t}    high_j = sum_t g_t x_{2j + t}    g_t = (-1)^t h_{L-1-t}    indices modulo n
    dwt(x) = H x, H (n, n) orthonormal        idwt(c) = Hᵀ c

Coefficients stand as [low_J, high_J, .., high_1]: the low half of each level is transformed again. Where n is no
multiple of 2^J, zeros follow the signal, and the inverse cuts them off: H is then (padded, n) with HᵀH = I.

A level is L/2 products with a (2, 2) matrix over pairs of neighbours (the polyphase form), whatever n, so that short
signals need no case of their own. Differentiable; nothing of the size of x is kept for the backward.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Low-pass filters h, sum sqrt(2): I. Daubechies, "Ten Lectures on Wavelets" (1992), tables 6.1 and 6.3.
_S = math.sqrt(3)
TAPS = {
    "haar": (math.sqrt(0.5), math.sqrt(0.5)),
    "db2": tuple(v / (4 * math.sqrt(2)) for v in (1 + _S, 3 + _S, 3 - _S, 1 - _S)),
    "db4": (
        0.2303778133088965,
        0.7148465705529157,
        0.6308807679298589,
        -0.027983769416859854,
        -0.18703481171909309,
        0.030841381835560764,
        0.0328830116668852,
        -0.010597401785069032,
    ),
    "sym4": (
        0.0322231006040427,
        -0.012603967262037833,
        -0.09921954357684722,
        0.29785779560527736,
        0.8037387518059161,
        0.49761866763201545,
        -0.02963552764599851,
        -0.07576571478927333,
    ),
}


def padded(n: int, levels: int = 1) -> int:
    """How many coefficients a signal of n has: the next multiple of 2^levels."""
    return -(-n // 2**levels) * 2**levels


def dwt(x: Tensor, wavelet: str, levels: int = 1, dim: int = -1) -> Tensor:
    """H x along `dim`: `padded(n, levels)` coefficients in the dtype of x, low ones first."""
    low = x.movedim(dim, -1)
    low = F.pad(low, (0, padded(low.shape[-1], levels) - low.shape[-1]))
    highs = []
    for _ in range(levels):
        pairs = low.unflatten(-1, (-1, 2))
        both = torch.zeros_like(pairs)
        for shift, taps in enumerate(_polyphase(wavelet, low)):
            both = both + pairs.roll(-shift, -2) @ taps.T
        low = both[..., 0]
        highs.append(both[..., 1])
    return torch.cat([low, *reversed(highs)], -1).movedim(-1, dim)


def idwt(c: Tensor, wavelet: str, levels: int = 1, dim: int = -1, size: int | None = None) -> Tensor:
    """Hᵀ c along `dim`, cut to `size`."""
    rest = c.movedim(dim, -1)
    width = rest.shape[-1] >> levels
    low = rest[..., :width]
    for _ in range(levels):
        both = torch.stack([low, rest[..., width : 2 * width]], -1)
        pairs = torch.zeros_like(both)
        for shift, taps in enumerate(_polyphase(wavelet, both)):
            pairs = pairs + (both @ taps).roll(shift, -2)
        low, width = pairs.flatten(-2), 2 * width
    return low[..., :size].movedim(-1, dim)


def _polyphase(wavelet: str, like: Tensor) -> list[Tensor]:
    """For each pair of taps, what it makes of a pair of neighbours: rows low and high, (2, 2)."""
    h = TAPS[wavelet]
    g = [(-1) ** t * h[-1 - t] for t in range(len(h))]
    taps = torch.tensor([h, g], dtype=like.dtype, device=like.device)
    return list(taps.unflatten(1, (-1, 2)).unbind(1))
