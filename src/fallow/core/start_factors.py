"""What starts share: factors of singular triples, the plain start where there is nothing to start from, a complement.

balanced     B = U sqrt(S / s), A = sqrt(S / s) Vᵀ, so that s B A = U S Vᵀ
plain        LoRA's own: A uniform in +-1 / sqrt(in), B zero
complement   rows orthonormal to each other and to given ones
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fallow.core.delta import Site
from fallow.core.errors import ConfigError
from fallow.core.linalg import Triples
from fallow.core.starting import Pair
from fallow.core.statistics import Statistics


def balanced(site: Site, triples: Triples, scale: float, largest: Tensor | float | None = None) -> Pair:
    """The pair with s B A = U S Vᵀ, of U (out, r), S (r,), Vᵀ (r, in), for the scale s.

    Where a singular value is zero (below rounding, beside `largest`, S's own if not given), both factors would be, and
    their rank never learn: it gets the plain start, B zero and A not.
    """
    u, s, vt = triples
    root = (s / scale).sqrt()
    a, b = root.unsqueeze(1) * vt, u * root
    dead = s <= torch.finfo(s.dtype).eps * math.sqrt(max(site.shape)) * (s[0] if largest is None else largest)
    if bool(dead.any()):
        a = torch.where(dead.unsqueeze(1), uniform(site, len(s)).to(a), a)
        b = torch.where(dead, 0.0, b)
    return Pair(b, a)


def plain(site: Site, rank: int) -> Pair:
    """What LoRA starts with; the two the other way round for an embedding, as there."""
    out, inner = site.shape
    if site.view.kind == "embedding":
        return Pair(torch.randn(out, rank, dtype=site.dtype), torch.zeros(rank, inner), kept=True)
    return Pair(None, uniform(site, rank))


def uniform(site: Site, rank: int) -> Tensor:
    """(rank, in), from torch's global generator, as of what is trained."""
    inner = site.shape[1]
    return torch.empty(rank, inner, dtype=site.dtype).uniform_(-1, 1) / math.sqrt(inner)


def complement(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, n): orthonormal rows, orthogonal to the orthonormal `rows` (k, n); count + k <= n."""
    drawn = torch.randn(count, rows.shape[1], generator=generator, dtype=rows.dtype).to(rows.device)
    return torch.linalg.qr(torch.cat([rows, drawn]).T)[0].T[len(rows) :]


def check_statistics(name: str, given: Any, want: str) -> None:
    """ConfigError unless `given` is what `fallow.probe` returns."""
    if not isinstance(given, Statistics):
        raise ConfigError(
            f"{name}={type(given).__name__} is no statistics of a model; give fallow.probe(model, batches, "
            f"want={{'{want}'}})"
        )
