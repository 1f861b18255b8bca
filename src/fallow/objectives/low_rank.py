"""The nuclear norm of a change B A, through its factors: pulls an adapter towards fewer directions.

SaRA (arXiv 2409.06633) and TRP (arXiv 2004.14566) put it on weights, see `fallow.objectives.nuclear`; here it is on the
change D = B A of each adapted layer, B (out, r), A (r, in), the scale within:

    penalty = weight * sum_l |B_l A_l|_*        gradients for the thin SVD B A = U S Vᵀ:  B: U (A V)ᵀ,  A: (Bᵀ U) Vᵀ

U and V come from the r x r product of the triangles of B and Aᵀ: no D is made, nothing is differentiated through a
decomposition, and zero singular values contribute nothing, so at the start, where B is zero, it is silent.

|D|_* of noise-like D of entries e is about e sqrt(out * in * r): a weight that suits one width suits another times the
inverse of that, and the sum grows with the number of layers; reduction="mean" divides by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from fallow.core.delta import Delta, number, one_of
from fallow.core.linalg import of_product
from fallow.core.objective import Objective, factors_of, in_float32, total


def nuclear_norm_of_product(b: Tensor, a: Tensor) -> Tensor:
    """|B A|_* of B (out, r) and A (r, in), a scalar; differentiable once."""
    return cast(Tensor, _OfProduct.apply(b, a))


class _OfProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b: Tensor, a: Tensor) -> Tensor:
        u, s, vt = of_product(b, a)
        real = (s > s[:1] * max(b.shape[0], a.shape[1]) * torch.finfo(s.dtype).eps).to(s.dtype)
        u = u * real
        ctx.save_for_backward(u @ (vt @ a.T), (b.T @ u) @ vt)
        return (s * real).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        grad_b, grad_a = ctx.saved_tensors
        return upstream * grad_b, upstream * grad_a


@dataclass
class LowRankChange(Objective):
    """`weight`: of the sum over layers, or of their mean, by `reduction`."""

    name: ClassVar[str] = "low-rank-change"
    weight: float = 1e-4
    reduction: str = "sum"

    def __post_init__(self) -> None:
        number("weight", self.weight)
        one_of("reduction", self.reduction, ("sum", "mean"))

    @in_float32
    def penalty(self, deltas: Mapping[str, Delta]) -> Tensor | None:
        """ConfigError for a Delta that is no product of two factors."""
        if not self.weight:
            return None
        terms = [nuclear_norm_of_product(b, a) for _, b, a in factors_of(deltas, self.name)]
        return self.weight * total(terms, self.reduction)
