"""How much the loss hangs on the change D of one weight, to first order: the sum of |D * dL/dD| over its entries.

Neither D nor G = dL/dD (out, in) is made whole: rows of both are, as many at a time as hold a million numbers, from
what the backward has at hand, G = gᵀ x of the layer's input and its output's gradient. That costs one product of the
size of the layer's own weight gradient for each backward pass. A weight that its module reads itself has D and G whole
anyway.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fallow.core.delta import Delta
from fallow.core.views import View

BLOCK = 1 << 20  # numbers of D that exist at a time


@torch.no_grad()
def sensitivity(view: View, x: Tensor, grad: Tensor, b: Tensor, a: Tensor, block: int = BLOCK) -> Tensor:
    """The sum of |B A * G|, a scalar: x as the layer is given it, `grad` of what B A x adds to its output."""
    out, inner = view.shape
    count = out if getattr(view, "groups", 1) > 1 else max(1, block // inner)
    if view.kind == "linear":
        x, grad = x.reshape(-1, inner).to(grad.dtype), grad.reshape(-1, out)
    total = torch.zeros((), device=grad.device)
    for first in range(0, out, count):
        size = min(count, out - first)
        of_rows = grad.narrow(view.channels, first, size)
        g = of_rows.T @ x if view.kind == "linear" else _through(view, x, of_rows, size)
        total += (b[first : first + size] @ a).mul_(g).abs_().sum(dtype=total.dtype)
    return total


def _through(view: View, x: Tensor, grad: Tensor, rows: int) -> Tensor:
    """G (rows, in) of layers that are no plain product."""
    with torch.enable_grad():
        w = torch.zeros(rows, view.shape[1], dtype=grad.dtype, device=grad.device, requires_grad=True)
        y = view.op(x.to(grad.dtype) if x.is_floating_point() else x, w)
        (found,) = torch.autograd.grad(y, w, grad)
    return found


class Observed:
    """In the place of a Delta's own way through its layer: the same, and it adds up the sensitivity of each backward.

    Of a weight that modules share, what the leader's passes say is counted, not those of its followers.
    """

    def __init__(self, delta: Delta) -> None:
        self.delta = delta
        self.sum: Tensor | None = None
        self.on = True  # else it only passes on
        self.of_parameter = delta.view.kind == "parameter"
        delta.__dict__["delta_weight" if self.of_parameter else "delta_forward"] = self
        delta.has_linear = False  # one operator for layer and change would not pass here

    def stop(self) -> None:
        """Let the Delta run by itself again."""
        for name in ("delta_weight", "delta_forward"):
            if self.delta.__dict__.get(name) is self:
                del self.delta.__dict__[name]
        self.delta._layout()

    def __call__(self, *args: Any) -> Tensor:
        if self.of_parameter:
            d = type(self.delta).delta_weight(self.delta)
            if self.on and d.requires_grad:
                d.register_hook(partial(self._whole, d.detach()))
            return d
        y = type(self.delta).delta_forward(self.delta, *args)
        if self.on and y.requires_grad:
            y.register_hook(partial(self._by_rows, args[0].detach()))
        return y

    def _whole(self, d: Tensor, grad: Tensor) -> None:
        step = max(1, BLOCK // d.shape[1])
        for rows, of_rows in zip(d.split(step), grad.split(step), strict=True):
            self._add((rows * of_rows).abs().sum(dtype=torch.float32))

    def _by_rows(self, x: Tensor, grad: Tensor) -> None:
        b, a = (factor.detach() for factor in self.delta.factors())
        self._add(sensitivity(self.delta.view, x, grad, b, a))

    def _add(self, found: Tensor) -> None:
        self.sum = found if self.sum is None else self.sum + found

    def taken(self) -> Tensor | None:
        """The sum over all backward passes since this was asked last; None where there was none."""
        found, self.sum = self.sum, None
        return found


def smoothed(score: Tensor, value: Tensor, betas: tuple[float, float]) -> Tensor:
    """(..., 2), the mean of sensitivities and that of their distance to it, after one more `value` (...).

    mean <- b1 mean + (1 - b1) I      spread <- b2 spread + (1 - b2) |I - mean|, with the new mean
    """
    mean = betas[0] * score[..., 0] + (1 - betas[0]) * value
    spread = betas[1] * score[..., 1] + (1 - betas[1]) * (value - mean).abs()
    return torch.stack([mean, spread], -1)
