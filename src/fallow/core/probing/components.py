"""Principal components of a layer's inputs, batch by batch (EVA, arXiv 2410.07170).

    S = [diag(sigma) V; X - mean(X); sqrt(M T / (M + T)) (mu - mean(X))]        (q + T + 1, in)
    sigma, V <- the q leading singular values and right singular vectors of S

with T rows X, after M before of the mean mu. So sigma and V are those of all rows about their mean, but for what lay
outside of the q directions that were kept. Without centring S = [diag(sigma) V; X]. The share of component j is
sigma_j² over the sum of squares, about the mean, of all rows.

Unlike EVA's code a batch of fewer than q rows counts too, and inputs that do not vary have shares of 0, not NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fallow.core.linalg import low_rank
from fallow.core.statistics import Components

SEED = 42  # of the range finder, as in EVA's code


@dataclass(frozen=True)
class Convergence:
    """When a direction counts as settled: `by` "component", where |cos| with the one of the same number before is at
    least `tolerance`; by "subspace", where the mean of cos² of the principal angles between both sets is at least its
    square, for all at once.
    """

    tolerance: float = 0.99
    by: Literal["component", "subspace"] = "component"

    def of(self, before: Tensor, after: Tensor) -> Tensor:
        """(q,) bool, for directions (p, in) before and (q, in) after, p <= q."""
        settled = torch.zeros(len(after), dtype=torch.bool, device=after.device)
        count = len(before)
        if self.by == "component":
            settled[:count] = (before * after[:count]).sum(1).abs() >= self.tolerance
        elif count == len(after):
            settled[:] = (before @ after.mT).square().sum() / count >= self.tolerance**2
        return settled


@dataclass(frozen=True, eq=False)
class Known:
    """Of `count` rows about their mean: `directions` (p, in), `singular` (p,), `mean` (in,) float64, `scatter` ()
    float64, the sum of squares about the mean, `converged` (p,) bool. Where not centred the mean is 0.
    """

    directions: Tensor
    singular: Tensor
    mean: Tensor
    scatter: Tensor
    converged: Tensor
    count: int

    @property
    def ratios(self) -> Tensor:
        """(p,): the share of the variance that each explains; 0 where nothing varies."""
        whole = self.scatter.clamp_min(torch.finfo(self.scatter.dtype).tiny)
        found = (self.singular.to(whole.dtype).square() / whole).float()
        # what float32 leaves of a mean that was taken off
        rounding = (self.mean.norm() * self.count**0.5 * torch.finfo(torch.float32).eps).float()
        return torch.where(self.singular > rounding, found, torch.zeros_like(found))

    def result(self) -> Components:
        """On the CPU."""
        return Components(
            self.directions.cpu(), self.singular.cpu(), self.ratios.cpu(), self.mean.float().cpu(),
            self.converged.cpu(), self.count,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Principal:
    """What is known after some calls of a layer, at most `most` components; None before a row was seen."""

    most: int
    center: bool = True
    known: Known | None = None

    def added(self, rows: Tensor, settle: Convergence | None = None) -> Principal:
        """With the rows (T, in) of one more call, float32."""
        if not len(rows):
            return self
        wide = torch.float32 if rows.device.type == "mps" else torch.float64  # which knows no float64
        mean = torch.zeros(rows.shape[1], dtype=wide, device=rows.device)
        if self.center:
            mean = rows.mean(0, dtype=wide)
            rows = rows - mean.float()
        return self._joined(rows, mean, rows.square().sum(dtype=wide), len(rows), settle)

    def merged(self, other: Principal) -> Principal:
        """Of the rows of both."""
        if other.known is None:
            return self
        them = other.known
        return self._joined(them.singular[:, None] * them.directions, them.mean, them.scatter, them.count, None)

    def _joined(
        self, below: Tensor, mean: Tensor, scatter: Tensor, count: int, settle: Convergence | None
    ) -> Principal:
        """With what stands for `count` more rows about their mean: (T, in) of the same covariance."""
        parts, before = [below], self.known
        if before is not None:
            apart, share = before.mean - mean, before.count * count / (before.count + count)
            parts.insert(0, before.singular[:, None] * before.directions)
            parts += [(share**0.5 * apart).float()[None]] if self.center else []
            scatter = before.scatter + scatter + share * apart.square().sum()
            mean = (before.mean * before.count + mean * count) / (before.count + count)
            count += before.count
        stacked = torch.cat(parts)
        most = min(self.most, *stacked.shape)
        _, singular, directions = low_rank(stacked, most, generator=torch.Generator().manual_seed(SEED))
        directions = _signed(directions)
        converged = torch.zeros(most, dtype=torch.bool, device=directions.device)
        if before is not None and settle is not None:
            converged = settle.of(before.directions, directions)
        return Principal(self.most, self.center, Known(directions, singular, mean, scatter, converged, count))


def _signed(directions: Tensor) -> Tensor:
    """With the entry of largest magnitude of each row positive: signs of singular vectors are arbitrary."""
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return torch.where(largest < 0, -directions, directions)
