"""KaSA's two penalties for every factor pair: a small update, of orthonormal factors.

"KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models", arXiv 2412.06071. W' = W + D, D = B A up to
a scale, A (r, in), B (out, r):

    penalty = mean over layers of  beta |D|_F² + gamma (|Bᵀ B - I|_F + |A Aᵀ - I|_F)

The paper's update is B diag(d) A and its first term |d|², which is |D|_F² where the factors are orthonormal; written so
it is there for methods without d. KaSA itself has both as options of its own. All is made of Gram matrices (r, r).

The second term does not depend on the width: r is its largest useful size. |D|_F² of entries of one size grows with
out * in, and with reduction="sum", PEFT's, both with the number of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.core.delta import Delta, number, one_of
from fallow.core.errors import ConfigError
from fallow.core.objective import Objective, each, factors_of, in_float32, total


def off_orthonormal(rows: Tensor, gram: str = "small") -> Tensor:
    """|R Rᵀ - I|_F of R (r, n); for "official" |Rᵀ R - I|_F, by |R Rᵀ - I|² + n - r. Orthonormal rows: gradient 0."""
    gap = torch.linalg.vector_norm(rows @ rows.T - torch.eye(rows.shape[0], dtype=rows.dtype, device=rows.device))
    return gap if gram == "small" else (gap.square() + rows.shape[1] - rows.shape[0]).sqrt()


def squared_size(b: Tensor, a: Tensor) -> Tensor:
    """|B A|_F² of B (out, r), A (r, in), in r² (out + in) multiplications."""
    return ((b.T @ b) * (a @ a.T)).sum()


@dataclass
class Orthonormal(Objective):
    """`beta`: weight of |D|_F². `gamma`: of the two distances from orthonormality. `reduction`: over layers."""

    name: ClassVar[str] = "orthonormal"
    beta: float = 1e-4
    gamma: float = 1e-3
    reduction: str = "mean"

    def __post_init__(self) -> None:
        number("beta", self.beta)
        number("gamma", self.gamma)
        one_of("reduction", self.reduction, ("mean", "sum"))

    @in_float32
    def penalty(self, deltas: Mapping[str, Delta]) -> Tensor | None:
        """ConfigError for a Delta that is no pair of trained A and B."""
        terms: list[Tensor] = []
        if self.beta:
            terms += [self.beta * squared_size(b, a) for _, b, a in factors_of(deltas, self.name)]
        if self.gamma:
            pairs = [_pair(name, delta) for name, delta in each(deltas)]
            terms += [self.gamma * (off_orthonormal(b.T) + off_orthonormal(a)) for b, a in pairs]
        if not terms:
            return None
        return total(terms) / (len(list(each(deltas))) if self.reduction == "mean" else 1)


def _pair(name: str, delta: Delta) -> tuple[Tensor, Tensor]:
    """The trained B and A, in float32 or wider, without the scale and without what a start subtracts."""
    b, a = getattr(delta, "B", None), getattr(delta, "A", None)
    if not isinstance(b, Tensor) or not isinstance(a, Tensor) or b.shape[1:] != a.shape[:1]:
        raise ConfigError(f"objective 'orthonormal' needs a pair B A; '{delta.name}' of '{name}' has none; use lora")
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return b.to(wide), a.to(wide)
