"""The covariance of a layer's inputs, C = 1/K sum_k Xkᵀ Xk over K calls, X (tokens, in) divided by its scale.

CorDA's scale is |max X| of each call ("official"), which depends on the sign of the inputs; "max_abs" is max |X|. Where
it is zero, X is left as it is. The scale of C moves the balance of CorDA's A against its B, so that it matters.
All tokens of a call are one X: the batch of CorDA's code is one sample, here it may be more.
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
    calls: int = 0

    def added(self, rows: Tensor, alone: bool) -> Covariance:
        """With the rows of one more call; `alone`: nobody else holds this sum, which may be changed in place."""
        x = rows / self._divisor(rows)
        if x.device.type != "cpu":
            part = (x.mT @ x).cpu()
            total = part if self.total is None else self.total.add_(part) if alone else self.total + part
        elif self.total is None:
            total = x.mT @ x
        else:
            total = self.total.addmm_(x.mT, x) if alone else torch.addmm(self.total, x.mT, x)
        if alone:
            self.total, self.calls = total, self.calls + 1
            return self
        return Covariance(total, self.scale, self.calls + 1)

    def _divisor(self, rows: Tensor) -> Tensor:
        if self.scale == "none":
            return rows.new_ones(())
        largest = rows.max().abs() if self.scale == "official" else rows.abs().max()
        return torch.where(largest > 0, largest, largest.new_ones(()))

    def tensors(self) -> dict[str, Tensor]:
        """What is saved of it."""
        return {} if self.total is None else {"total": self.total}
