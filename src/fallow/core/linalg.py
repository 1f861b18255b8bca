"""Linear algebra that methods share: the polar factor of (batches of) matrices.

The polar factor of X = U S Vᵀ (m, n) is U_r V_rᵀ, r the rank: all non-zero singular values become 1, zero ones stay 0.

    svd             exact, by decomposition
    newton-schulz   Y <- 1.5 Y - 0.5 Y Yᵀ Y; converges for every spectrum below sqrt(3)
    polar-express   Y <- a Y + b (Y Yᵀ) Y + c (Y Yᵀ)² Y with the minimax coefficients of each step for singular values
                    in [1e-3, 1] (Amsel et al., arXiv 2505.16932, table 1)

Both iterations are matrix products only: no host sync, any device, batches of one shape together. They start from
X / s with s = ||(X Xᵀ)²||_F^(1/4) >= sigma_max, a bound that the first step computes anyway.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Polar = Literal["newton-schulz", "polar-express", "svd"]
CUBIC_STEPS = 12
# The last pair is the limit of the sequence, the classical quintic iteration; repeated, it only polishes.
EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
SAFETY = 1.01  # keeps rounding from pushing a singular value over the edge of the interval of the next step


def polar(matrix: Tensor, mode: Polar = "polar-express") -> Tensor:
    """The polar factor of `matrix` (..., m, n), in its shape and dtype; a zero matrix gives zero.

    Accuracy (float32, spectrum down to 1e-3 of the largest singular value): "polar-express" keeps every singular value
    of the result within 0.02 of 1; "newton-schulz" leaves those below about 1e-2 of the largest short of 1. Singular
    values smaller than that come out smaller than 1 in both, and zero ones zero. Raises ValueError for another mode.
    """
    if mode not in get_args(Polar):
        raise ValueError(f"mode={mode!r} must be one of {', '.join(get_args(Polar))}")
    if mode == "svd":
        return _by_decomposition(matrix)
    tall = matrix.shape[-2] > matrix.shape[-1]
    y = matrix.mT if tall else matrix
    tiny = torch.finfo(y.dtype).tiny
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    gram = y @ y.mT
    square = gram @ gram
    bound = square.norm(dim=(-2, -1), keepdim=True).clamp_min(tiny).pow(0.25)
    y, gram, square = y / bound, gram / bound**2, square / bound**4
    y = _cubic(y, gram) if mode == "newton-schulz" else _express(y, gram, square)
    return y.mT if tall else y


def _cubic(y: Tensor, gram: Tensor) -> Tensor:
    for step in range(CUBIC_STEPS):
        if step:
            gram = y @ y.mT
        y = 1.5 * y - 0.5 * (gram @ y)
    return y


def _express(y: Tensor, gram: Tensor, square: Tensor) -> Tensor:
    for step, (a, b, c) in enumerate(EXPRESS):
        if step:
            gram = y @ y.mT
            square = gram @ gram
        if step < len(EXPRESS) - 1:
            a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
        y = a * y + (b * gram + c * square) @ y
    return y


def _by_decomposition(matrix: Tensor) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    bound = s[..., :1] * max(matrix.shape[-2:]) * torch.finfo(s.dtype).eps
    return (u * (s > bound).to(u.dtype).unsqueeze(-2)) @ vt
