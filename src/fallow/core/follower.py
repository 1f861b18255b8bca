"""A Delta seen from another module that shares its weight.

An embedding (width, rows) and the output layer (rows, width) take the same numbers as matrices that are each other's
transpose, so the follower's change is D^T x, by factors x A^T B^T.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from fallow.core.delta import Delta
from fallow.core.engine import Active
from fallow.core.factored import through
from fallow.core.views import ConvView, TransposedView, View


def followed(acting: Active, leader: View, view: View) -> Active:
    """The same Deltas for the engine at a module that sees their weight through `view`; they must not act on inputs."""
    if type(view) is type(leader) and not isinstance(view, ConvView):
        return acting
    turned = isinstance(view, TransposedView) != isinstance(leader, TransposedView)
    return [(cast(Delta, Follower(delta, view, turned)), scale) for delta, scale in acting]


class Follower:
    """What the engine asks of a Delta, on a follower's x and with its matrix; `turned`: the leader's transpose."""

    output = None
    has_linear = False

    def __init__(self, delta: Delta, view: View, turned: bool) -> None:
        self.delta, self.view, self.turned = delta, view, turned
        self.has_inputs = view.kind != "embedding"
        self.drop = delta.drop if self.has_inputs else 0.0
        self.any_dtype = delta.exact

    def __getattr__(self, name: str) -> Any:
        return getattr(self.delta, name)

    def new_weight(self, w: Tensor, scale: float = 1.0) -> Tensor:
        return self.delta.new_weight(w.T, scale).T if self.turned else self.delta.new_weight(w, scale)

    def delta_forward(self, x: Tensor) -> Tensor:
        if not self.delta.exact:
            change = self.delta.delta_weight()
            return self.view.op(x, change.T if self.turned else change)
        b, a = self.delta.factors()
        if self.turned:
            b, a = a.T, b.T
        return through(self.view, x, a, b)
