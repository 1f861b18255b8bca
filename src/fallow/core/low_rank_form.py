"""What a Delta does to its weight, as plain factors: D ~ B A, B (out, r), A (r, in), and how far off that is.

    exact, no bound      its own `factors()`, error 0; cut to min(out, in) where they are wider
    exact, a bound       the leading triples of B A, from the triangles of the two; D is not formed
    any other            the leading triples of D = W' - W; needs a bound, and W where the method rewrites it

The error is ||D - B A|| / ||D|| (Frobenius). A bound is a rank, a share of the squared change, or an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fallow.core.delta import Delta
from fallow.core.errors import ConfigError
from fallow.core.linalg import Truncation, of_product, truncated

FINE = 1e-3  # an error below this is looked for in float64, since squares of it drown in float32


@dataclass(frozen=True)
class LowRank:
    """`b` (out, r), `a` (r, in), float32 or float64; the norms of the change and of what they miss of it."""

    b: Tensor
    a: Tensor
    norm: float
    missing: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def error(self) -> float:
        return self.missing / self.norm if self.norm else 0.0


def bound(rank: int | None = None, energy: float | None = None, error: float | None = None) -> Truncation | None:
    """What of these is given; None for none. An error e is the energy 1 - e². ConfigError for impossible values."""
    if sum(value is not None for value in (rank, energy, error)) > 1:
        raise ConfigError(f"rank={rank}, energy={energy}, error={error}: give one of them")
    if error is not None:
        if isinstance(error, bool) or not isinstance(error, int | float) or not 0 < error < 1:
            raise ConfigError(f"error={error!r} must be above 0 and below 1; 0.05 misses a twentieth of the change")
        return Truncation(energy=1 - error**2)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise ConfigError(f"rank={rank!r} must be a whole number of at least 1")
    return None if rank is None and energy is None else Truncation(rank, energy)


def refuse_without_form(delta: Delta, how: Truncation | None) -> None:
    """ConfigError where `low_rank_form` would have none: an unmergeable method, or a bound is needed."""
    if not delta.mergeable:
        raise ConfigError(
            f"'{delta.name}' at '{delta.site_name}' depends on the layer's input: it changes no weight by a fixed "
            "amount, so that no LoRA is like it"
        )
    if how is None and not delta.exact:
        raise ConfigError(
            f"'{delta.name}' at '{delta.site_name}' is no product of two factors, which can only come near to it; give "
            "rank=16, energy=0.9 or error=0.1"
        )


@torch.no_grad()
def low_rank_form(delta: Delta, weight: Callable[[], Tensor], how: Truncation | None = None) -> LowRank:
    """The plain form of a Delta at scale 1. `weight()`: W (out, in), asked for only where the method rewrites it.

    ConfigError as `refuse_without_form`.
    """
    refuse_without_form(delta, how)
    if delta.exact:
        b, a = (part.double() if _fine(how) else _wide(part) for part in delta.factors())
        return of_factors(b, a, how)
    assert how is not None
    return of_dense(_wide(dense_change(delta, weight)), how)


def dense_change(delta: Delta, weight: Callable[[], Tensor]) -> Tensor:
    """W' - W (out, in) at scale 1."""
    if delta.mode == "add":
        return delta.delta_weight()
    w = weight()
    w = w.to(torch.promote_types(w.dtype, delta.dtype))
    return delta.new_weight(w) - w


def of_dense(d: Tensor, how: Truncation) -> LowRank:
    """The leading triples of D (out, in), float32 or float64."""
    u, s, vt = truncated(d.double() if _fine(how) else d, how, torch.Generator().manual_seed(0))
    root = s.sqrt()
    b, a = (u * root).to(d.dtype), (root[:, None] * vt).to(d.dtype)
    return LowRank(b, a, float(d.norm()), float((d - b @ a).norm()))


def of_factors(b: Tensor, a: Tensor, how: Truncation | None) -> LowRank:
    """Those factors where they are no larger than asked for, else their leading triples."""
    widest = min(b.shape[0], a.shape[1])
    if a.shape[0] <= widest and (how is None or (how.rank is not None and how.rank >= a.shape[0])):
        return LowRank(b, a, float(of_product(b, a)[1].norm()), 0.0)
    u, s, vt = of_product(b, a)
    rank = widest if how is None else how.choose(s)
    root = s[:rank].sqrt()
    missing = math.sqrt(float(s[rank:].double().square().sum()))
    return LowRank(u[:, :rank] * root, root[:, None] * vt[:rank], float(s.double().norm()), missing)


def _fine(how: Truncation | None) -> bool:
    return how is not None and how.energy is not None and 1 - how.energy < FINE**2


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
