"""The covariance of a layer's inputs, C = 1/K sum_k Xkᵀ Xk over K calls, X (tokens, in) divided by its scale.

CorDA's scale is |max X| ("official"), which depends on the sign of the inputs; "max_abs" is max |X|. Where it is zero,
X is left as it is. The scale of C moves the balance of CorDA's A against its B, so that it matters.

A batch in CorDA's code is one sample. Here all samples of a call are one X; or each is one by itself, K counting them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fallow.core.probing.options import Scale


@dataclass(eq=False)
class Covariance:
    """A running sum (in, in), float32 on the CPU: a copy on another device would be as large as all of the layers'."""

    total: Tensor | None
    scale: Scale = "official"
    count: int = 0

    def added(self, rows: Tensor, alone: bool, samples: Tensor | None = None) -> Covariance:
        """With the rows of one more call; `alone`: nobody else holds this sum, which may be changed in place.

        `samples` (tokens,): of which sample each row is, where samples are divided and counted one by one.
        """
        x = rows / self._divisor(rows, samples)
        count = self.count + (1 if samples is None else len(samples.unique()))
        if x.device.type != "cpu":
            part = (x.mT @ x).cpu()
            total = part if self.total is None else self.total.add_(part) if alone else self.total + part
        elif self.total is None:
            total = x.mT @ x
        else:
            total = self.total.addmm_(x.mT, x) if alone else torch.addmm(self.total, x.mT, x)
        if alone:
            self.total, self.count = total, count
            return self
        return Covariance(total, self.scale, count)

    def _divisor(self, rows: Tensor, samples: Tensor | None) -> Tensor:
        if self.scale == "none":
            return rows.new_ones(())
        if samples is None:
            largest = rows.max().abs() if self.scale == "official" else rows.abs().max()
        else:
            of_rows = rows.amax(1) if self.scale == "official" else rows.abs().amax(1)
            empty = rows.new_full((int(samples[-1]) + 1,), -torch.inf)
            largest = empty.scatter_reduce(0, samples, of_rows, "amax")[samples, None].abs()
        return torch.where(largest > 0, largest, largest.new_ones(()))

    def tensors(self) -> dict[str, Tensor]:
        """What is saved of it."""
        return {} if self.total is None else {"total": self.total}
