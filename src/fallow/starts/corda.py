"""CorDA: start from the components of a weight that a context uses most, or least.

"CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware Parameter-Efficient
Fine-tuning", arXiv 2406.05223. C (in, in) is the second moment of the layer's inputs in the context, C_d = C + d
mean(diag C) I:

    W C_d = U S Vᵀ      V̂ᵀ = Vᵀ C_d⁻¹      W = U S V̂ᵀ      k = min(out, in) components, S descending
    B0 = U_I sqrt(S_I / s) (out, r)        A0 = sqrt(S_I / s) V̂_Iᵀ (r, in)

    mode="ipa"   I: the first r. The context is the task, whose components are trained
    mode="kpa"   I: the last r. The context is knowledge to keep, whose components stay frozen

C_d⁻¹ is never taken: Uᵀ U = I makes S V̂ᵀ = Uᵀ W, and s B0 A0 = U_I U_Iᵀ W. The official code inverts C_d in float32
and doubles d until |C_d C_d⁻¹ - I| is below 0.05, which guards that inverse. Here d is doubled until C_d is positive
definite to rounding; `tolerance=0.05` is the official test. The first components come from a randomised decomposition
where the layer is large; the last from the eigenvectors of the smaller Gram matrix of W C_d, in float64, which tells
singular values apart down to 1e-8 of the largest: as far as a C in float32 is known.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fallow.core.delta import Site, number, one_of
from fallow.core.errors import ConfigError, DataError
from fallow.core.linalg import EXACT_BELOW, Triples, low_rank
from fallow.core.start_factors import check_statistics, uniform
from fallow.core.starting import Pair, Start
from fallow.core.statistics import Statistics

Part = Literal["first", "last"]


@dataclass(frozen=True)
class CorDA(Start):
    """`statistics`: of `fallow.probe(model, batches, want={"input_covariance"}, scale_by="sample")` over the context, 2
    tokens for each input of a layer or more. `mode`: "ipa" learns the context first, "kpa" keeps it. `sigma_fuse`:
    which factor holds the singular values, "UV" both, "U" B, "V" A. `balance`: "paper", in which the size of A against
    B follows the size of the inputs (C four times as large: A half, B double), or "equal", |A| = |B|. `damp`: d.
    `tolerance`: None, or how exact an inverse of C_d has to be.
    """

    name: ClassVar[str] = "corda"
    needs: ClassVar[str] = "statistics with the covariance of inputs, start=fallow.CorDA(statistics)"

    statistics: Statistics
    mode: str = "ipa"
    sigma_fuse: str = "UV"
    balance: str = "paper"
    damp: float = 0.01
    tolerance: float | None = None

    def __post_init__(self) -> None:
        check_statistics("statistics", self.statistics, "input_covariance")
        one_of("mode", self.mode, ("ipa", "kpa"))
        one_of("sigma_fuse", self.sigma_fuse, ("UV", "U", "V"))
        one_of("balance", self.balance, ("paper", "equal"))
        number("damp", self.damp, open_below=True)
        if self.tolerance is not None:
            number("tolerance", self.tolerance, open_below=True)
        found = self.statistics.items()
        few = [name for name, one in found if one.covariance is not None and one.tokens < one.shape[1]]
        if few:
            others = f" and {len(few) - 1} other layers have" if len(few) > 1 else " has"
            warnings.warn(
                f"'{few[0]}'{others} seen fewer tokens than inputs, so that the context says nothing of some of their "
                "directions, whose order is arbitrary; give fallow.probe more batches",
                stacklevel=3,
            )

    def pair(self, site: Site, rank: int, scale: float) -> Pair:
        covariance = self.statistics.at(site, "covariance").covariance
        assert covariance is not None
        w, part = site.weight(), "first" if self.mode == "ipa" else "last"
        try:
            c = covariance.to(site.device, site.dtype)
            generator = site.generator(self.name)
            u, s, v = context_svd(w, c, rank, part, self.damp, self.tolerance, generator)  # type: ignore[arg-type]
        except DataError as error:
            raise DataError(f"'{site.name}': {error}") from None
        to_b = {"UV": (s / scale).sqrt(), "U": s / scale, "V": torch.ones_like(s)}[self.sigma_fuse]
        to_a = {"UV": (s / scale).sqrt(), "U": torch.ones_like(s), "V": s / scale}[self.sigma_fuse]
        b, a = u * to_b, to_a.unsqueeze(1) * v
        if self.balance == "equal" and bool(a.any()):
            even = (b.norm() / a.norm()).sqrt()
            b, a = b / even, a * even
        dead = (v == 0).all(1)  # W has no such component: were both factors zero, the rank would never learn
        if bool(dead.any()):
            b, a = torch.where(dead, 0.0, b), torch.where(dead.unsqueeze(1), uniform(site, rank).to(a), a)
        return Pair(b, a)


def context_svd(
    weight: Tensor,
    covariance: Tensor,
    rank: int | None = None,
    part: Part = "first",
    damp: float = 0.01,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> Triples:
    """U (out, r), S (r,), V̂ᵀ (r, in): of W (out, in) = U S V̂ᵀ in the metric of C (in, in) the first r components or
    the last, S descending; all of them where `rank` is None.

    U_r S_r V̂_rᵀ of the first is the matrix W̃ of rank r with the least |(W - W̃) C_d|: W compressed for its context.
    Components that W lacks have V̂ zero. DataError where C is not finite or zero, ConfigError for impossible options.
    """
    one_of("part", part, ("first", "last"))
    rank = min(weight.shape) if rank is None else rank
    if not 1 <= rank <= min(weight.shape):
        raise ConfigError(f"rank={rank} must be from 1 to {min(weight.shape)}, the components of {tuple(weight.shape)}")
    added = damping(covariance, damp, tolerance)
    if part == "first":
        u, s, _ = low_rank(weight @ covariance + added * weight, rank, generator=generator)
    else:
        double = weight.double()
        u, s = _last(double @ covariance.double() + added * double, rank)
    rows = u.mT @ weight.to(u)  # S V̂ᵀ
    known = rows.norm(dim=1) > torch.finfo(weight.dtype).eps * weight.norm()
    v = torch.where(known.unsqueeze(1), rows / torch.where(known, s, 1.0).unsqueeze(1), 0.0)
    return u.to(weight), s.to(weight), v.to(weight)


def damping(covariance: Tensor, damp: float = 0.01, tolerance: float | None = None) -> float:
    """d mean(diag C), what C (n, n) needs on its diagonal: d from `damp` on is doubled until C_d is positive definite
    in the precision of C, or, with a `tolerance`, until |C_d C_d⁻¹ - I| is below it.

    DataError where C is not finite, or zero.
    """
    mean = float(covariance.diagonal().mean())
    if not bool(torch.isfinite(covariance).all()):
        raise DataError("the covariance of its inputs is not finite; look for NaN or infinite values in the batches")
    if mean <= 0:
        raise DataError(
            "the covariance of its inputs is zero, as all of them were; exclude the layer, or give other batches"
        )
    unit = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    while True:
        damped = covariance + damp * mean * unit
        if tolerance is None:
            sound = int(torch.linalg.cholesky_ex(damped).info) == 0
        else:
            inverse, info = torch.linalg.inv_ex(damped)
            sound = int(info) == 0 and float((damped @ inverse - unit).norm()) < tolerance
        if sound:
            return damp * mean
        if damp > 1e6:
            raise DataError(
                f"cannot be inverted to tolerance={tolerance}, whatever is added; give a larger one, or None"
            )
        damp *= 2


def _last(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (m, r) and S (r,) of the r smallest of the min(m, n) singular values, descending; float64."""
    m, n = matrix.shape
    if min(m, n) <= EXACT_BELOW or 4 * rank > min(m, n):
        u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, -rank:], s[-rank:]
    if m > n:
        right = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[:, :rank]
        u, s, _ = torch.linalg.svd(matrix @ right, full_matrices=False)
        return u, s
    left = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[:, :rank]
    # the values of what the subspace holds: roots of eigenvalues would be good to 1e-8 of the largest only
    u, s, _ = torch.linalg.svd(left.mT @ matrix, full_matrices=False)
    return left @ u, s
