"""A change of weights as low-rank factors, or as its largest entries; and what that leaves out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fallow.core.errors import ConfigError
from fallow.core.linalg import Truncation, of_product, truncated
from fallow.core.select import index_dtype, largest_in_stream
from fallow.recipes.formats.layers import Factors

ALPHA = 16  # of factors whose ranks follow from their spectra
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def precision(name: str) -> torch.dtype:
    """The dtype of that name. ConfigError for one that is not offered."""
    if name not in PRECISIONS:
        raise ConfigError(f"dtype={name} is unknown; give {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


@dataclass
class Losses:
    """What approximations leave out, by layer and in all; norms are Frobenius norms, errors relative to them."""

    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    square: float = 0.0
    lost: float = 0.0

    def add(self, name: str, norm: float, missing: float, **told: Any) -> None:
        """Of a change of that norm an approximation misses one of norm `missing`."""
        self.layers[name] = {**told, "norm": norm, "error": missing / norm if norm else 0.0}
        self.square += norm**2
        self.lost += missing**2

    @property
    def error(self) -> float:
        """||change - approximation|| / ||change|| over all layers."""
        return math.sqrt(self.lost / self.square) if self.square else 0.0


def factored(change: Tensor, how: Truncation, dtype: torch.dtype, seed: int = 0) -> tuple[Factors, float, float]:
    """Factors of a change (out, in[, kh, kw]); its norm, and that of what they miss as stored.

    Alpha is the same whatever the rank of a layer, since diffusers does not heed alphas that differ between attentions
    in kohya's format. The singular values are shared evenly between the two. A convolution counts as the matrix
    (out, in * kh * kw).
    """
    matrix = change.flatten(1)
    u, s, vt = truncated(matrix, how, torch.Generator().manual_seed(seed))
    rank, alpha = len(s), float(how.rank or how.most or ALPHA)
    root = (s * rank / alpha).sqrt()
    up, down = (u * root).to(dtype), (root[:, None] * vt).to(dtype)
    missing = float((matrix - alpha / rank * (up.to(matrix.dtype) @ down.to(matrix.dtype))).norm())
    made = Factors(
        down.view(rank, *change.shape[1:]).contiguous(),
        up.view(-1, rank, *[1] * (change.ndim - 2)).contiguous(),
        alpha,
    )
    return made, float(matrix.norm()), missing


def resized(one: Factors, how: Truncation, dtype: torch.dtype | None, seed: int = 0) -> tuple[Factors, float, float]:
    """Factors of another rank at the same scale alpha / rank; the norm of the change, and of what they miss.

    A rank above the present one adds rows of Kaiming's start to down and zeros to up, so that the change is the same
    and can be trained on; an energy never does. DoRA's magnitudes stay, and errors are then of the product alone.
    """
    kept = dtype or one.down.dtype
    up, down = one.matrices(torch.float32)
    if how.rank is not None and how.rank > one.rank:
        more = how.rank - one.rank
        bound = 1 / math.sqrt(down.shape[1])
        rows = torch.rand(more, down.shape[1], generator=torch.Generator().manual_seed(seed)) * 2 * bound - bound
        new_down, new_up = torch.cat([down, rows]), torch.cat([up, up.new_zeros(up.shape[0], more)], 1)
    else:
        u, s, vt = of_product(up, down)
        rank = how.choose(s)
        root = s[:rank].sqrt()
        new_up, new_down = u[:, :rank] * root, root[:, None] * vt[:rank]
    new_up, new_down = new_up.to(kept), new_down.to(kept)
    rank = new_down.shape[0]
    both = torch.cat([up, -new_up.float()], 1), torch.cat([down, new_down.float()])
    missing = float(of_product(*both)[1].norm()) if rank <= one.rank else 0.0
    made = Factors(
        new_down.view(rank, *one.down.shape[1:]).contiguous(),
        new_up.view(*one.up.shape[:1], rank, *one.up.shape[2:]).contiguous(),
        one.scale * rank,
        one.magnitude,
    )
    norm = float(of_product(up, down)[1].norm())
    return made, abs(one.scale) * norm, abs(one.scale) * missing


@dataclass(frozen=True)
class Most:
    """How many entries are kept: the share `fraction` of all, or `budget` of them; all that change where both are None.

    Raises ConfigError for impossible values.
    """

    fraction: float | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None and self.budget is not None:
            raise ConfigError(f"fraction={self.fraction} and budget={self.budget} are both given; give one of them")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction={self.fraction} must be above 0 and at most 1")
        if self.budget is not None and self.budget < 1:
            raise ConfigError(f"budget={self.budget} keeps no entry; give 1 or more")

    def count(self, total: int) -> int | None:
        """The number of entries out of `total`; None is all that change."""
        if self.fraction is not None:
            return max(1, round(self.fraction * total))
        return self.budget


def largest(
    changes: Callable[[], Iterable[tuple[str, Tensor]]], total: int, most: Most
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, change, sorted flat indices of the entries that are kept) of each; `changes()` is called up to four times.

    Entries that do not change are never kept, however many may be. `total`: of which `most.fraction` is a share.
    """
    count = most.count(total)
    if count is None:
        for name, change in changes():
            flat = change.flatten()
            yield name, change, _sorted(flat != 0)
        return
    masks = largest_in_stream(lambda: (change.abs().float() for _, change in changes()), count)
    for (name, change), mask in zip(changes(), masks, strict=True):
        yield name, change, _sorted(mask & (change.flatten() != 0))


def _sorted(mask: Tensor) -> Tensor:
    return mask.nonzero().view(-1).to(index_dtype(mask.numel()))
