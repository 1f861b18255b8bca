"""The leading left singular space of (batches of) matrices: orthonormal columns P (d, r) that hold most of G (d, n).

    exact        the first r left singular vectors of the decomposition
    by_gram      the first r eigenvectors of G Gᵀ (d, d): exact where the spectrum is not too wide, O(d² n)
    randomised   a Gaussian range finder with power steps (Halko et al., arXiv 0909.4061), O(d n (r + p) (2 q + 1))
    power_step   qr(G Gᵀ P) from a space that was good a while ago, O(2 d n r): one step of block power iteration

All take float32 or float64, batches of one shape together, and give orthonormal columns whatever the rank of G is. A
matrix with an entry that is no number must not come here: decompositions raise or never end. Where columns of G lie on
several ranks, `total` sums a product over all of them; the basis is then the same on each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OVERSAMPLING = 10  # columns that the range finder carries above the rank

Total = Callable[[Tensor], Tensor]


def _here(tensor: Tensor) -> Tensor:
    return tensor


def exact(matrix: Tensor, rank: int) -> Tensor:
    """(..., d, rank) the leading left singular vectors of `matrix` (..., d, n), by decomposition."""
    return torch.linalg.svd(matrix, full_matrices=False)[0][..., :rank]


def by_gram(matrix: Tensor, rank: int, total: Total = _here) -> Tensor:
    """(..., d, rank) the leading eigenvectors of G Gᵀ, by decomposition.

    Singular values below about 3e-4 (float32) of the largest are lost in rounding: their vectors are then arbitrary.
    """
    return torch.linalg.eigh(total(matrix @ matrix.mT))[1][..., -rank:].flip(-1)


def randomised(matrix: Tensor, rank: int, probe: Tensor, steps: int = 2, total: Total = _here) -> Tensor:
    """(..., d, rank) of the range finder; `probe` (n, rank + p) or (..., n, rank + p) Gaussian.

    `steps` power iterations divide what the tail adds to the error by (sigma_r / sigma_{r + p})² each.
    """
    basis = torch.linalg.qr(total(matrix @ probe))[0]
    for _ in range(steps):
        basis = power_step(matrix, basis, total)
    small = basis.mT @ matrix  # (..., rank + p, n), whose Gram matrix tells the best `rank` directions in the range
    return basis @ by_gram(small, rank, total) if basis.shape[-1] > rank else basis


def power_step(matrix: Tensor, basis: Tensor, total: Total = _here) -> Tensor:
    """(..., d, r) after one step of block power iteration from `basis` (..., d, r)."""
    return torch.linalg.qr(total(matrix @ (matrix.mT @ basis)))[0]


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """(...) ||P_1ᵀ P_2||_F² / r of orthonormal columns (..., d, r): 1 where the spaces are one, r / d by chance."""
    return (one.mT @ other).square().sum((-2, -1)) / one.shape[-1]
