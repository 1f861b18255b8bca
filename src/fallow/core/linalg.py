"""Linear algebra that methods share: the polar factor of (batches of) matrices, and the leading singular vectors.

The polar factor of X = U S Vᵀ (m, n) is U_r V_rᵀ, r the rank: all non-zero singular values become 1, zero ones stay 0.

    svd             exact, by decomposition
    newton-schulz   Y <- 1.5 Y - 0.5 Y Yᵀ Y; converges for every spectrum below sqrt(3)
    polar-express   Y <- a Y + b (Y Yᵀ) Y + c (Y Yᵀ)² Y with the minimax coefficients of each step for singular values
                    in [1e-3, 1] (Amsel et al., arXiv 2505.16932, table 1)

Both iterations are matrix products only: no host sync, any device, batches of one shape together. They start from
X / s with s = ||(X Xᵀ)²||_F^(1/4) >= sigma_max, a bound that the first step computes anyway.

The leading r singular triples come from a randomised range finder with power iterations (Halko et al., arXiv 0909.4061)
where the matrix is large and r small, else from the decomposition; those of a product B A from the triangles of B, Aᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fallow.core.errors import ConfigError

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


# -- leading singular triples -----------------------------------------------------------------------------------------

EXACT_BELOW = 256  # rows or columns; the decomposition of a smaller matrix costs less than the range finder saves
OVERSAMPLING = 16  # columns that the range finder carries above the rank
POWER_STEPS = 2
FIRST_GUESS = 64  # columns tried first where the rank follows from the spectrum
Triples = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Truncation:
    """How many singular values are kept: `rank` of them; or as many as hold the share `energy` of the squared norm; or
    all above the largest / `ratio`; at most `most`. None is not asked for. Raises ConfigError for impossible values.
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "energy", "ratio") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"{' and '.join(given) or 'nothing'} {'are' if given else 'is'} given to choose the rank by; give "
                "one of rank, energy, ratio"
            )
        for name in ("rank", "most"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} keeps no singular value; give 1 or more")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConfigError(f"energy={self.energy} must be above 0 and at most 1; 0.9 keeps nine tenths")
        if self.ratio is not None and not (self.ratio > 1 and self.ratio < float("inf")):
            raise ConfigError(f"ratio={self.ratio} must be above 1; 10 keeps what is above a tenth of the largest")

    def choose(self, values: Tensor, total: float | None = None) -> int:
        """The rank, given singular values (k,) in descending order; `total` is the squared norm of the whole matrix."""
        if self.rank is not None:
            rank = self.rank
        elif self.energy is not None:
            rank = energy_rank(values, self.energy, total)
        elif self.ratio is not None:
            rank = int((values > values[0] / self.ratio).sum()) if values.numel() else 0
        return max(1, min(rank, self.most or rank, values.numel()))


def energy_rank(values: Tensor, energy: float, total: float | None = None) -> int:
    """The smallest r for which the first r of the descending `values` (k,) hold the share `energy` of their squares.

    `total`: the sum of squares that is the whole, where `values` are not all; k + 1 where all of them do not suffice.
    """
    held = values.double().square().cumsum(0)
    whole = float(held[-1]) if total is None and held.numel() else total or 0.0
    # one part in 10^12 is the rounding of the sum, without which energy=1 may never be reached
    return int(torch.searchsorted(held, energy * whole * (1 - 1e-12))) + 1 if whole else 1


def low_rank(
    matrix: Tensor,
    rank: int,
    *,
    oversampling: int = OVERSAMPLING,
    steps: int = POWER_STEPS,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    exact: bool = False,
) -> Triples:
    """The leading singular triples U (m, r), S (r,), Vᵀ (r, n) of a matrix (m, n) of float32 or float64.

    By decomposition where a side is at most EXACT_BELOW, `rank` is above a quarter of it, or `exact`; else by the
    range finder with `steps` power iterations, of which each divides what the tail adds to the error by
    (sigma_r / sigma_{r + oversampling})². `start` (n, k): the right singular vectors of a matrix nearby, which save
    iterations; else Gaussian from `generator`. At most min(m, n) triples come back.
    """
    rank = min(rank, *matrix.shape)
    if exact or min(matrix.shape) <= EXACT_BELOW or 4 * rank > min(matrix.shape):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    width = min(rank + oversampling, *matrix.shape)
    held = 0 if start is None else min(start.shape[1], width)
    probe = torch.randn(matrix.shape[1], width - held, generator=generator, dtype=matrix.dtype).to(matrix.device)
    if start is not None:
        probe = torch.cat([start[:, :held].to(probe), probe], 1)
    basis = _orthonormal(matrix @ probe)
    for _ in range(steps):
        basis = _orthonormal(matrix @ _orthonormal(matrix.mT @ basis))
    u, s, vt = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vt[:rank]


def _orthonormal(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix)[0]


def truncated(matrix: Tensor, how: Truncation, generator: torch.Generator | None = None) -> Triples:
    """The leading triples that `how` keeps of a matrix (m, n); where the spectrum decides, as few are computed as tell.

    The range finder's width is doubled until the spectrum it shows decides, each time from the vectors found before.
    """
    if how.rank is not None:
        return low_rank(matrix, how.choose(torch.empty(min(matrix.shape))), generator=generator)
    total = float(matrix.double().square().sum()) if how.energy is not None else None
    width, start = min(FIRST_GUESS, how.most or FIRST_GUESS), None
    while True:
        u, s, vt = low_rank(matrix, width, start=start, generator=generator)
        rank = how.choose(s, total)
        complete = s.numel() >= min(matrix.shape) or (how.most is not None and s.numel() >= how.most)
        enough = energy_rank(s, how.energy, total) <= s.numel() if how.energy is not None else rank < s.numel()
        if enough or complete:
            return u[:, :rank], s[:rank], vt[:rank]
        width, start = (min(2 * width, how.most) if how.most else 2 * width), vt.mT


def of_product(b: Tensor, a: Tensor) -> Triples:
    """The singular triples of B A, B (m, k), A (k, n), without forming it where k is below both sides.

    QR of B and of Aᵀ leaves the triangles' product (k, k): O((m + n) k²) in place of O(m n min(m, n)).
    """
    if a.shape[0] >= min(b.shape[0], a.shape[1]):
        u, s, vt = torch.linalg.svd(b @ a, full_matrices=False)
        return u, s, vt
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.mT)
    u, s, vt = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    return left @ u, s, vt @ right.mT
