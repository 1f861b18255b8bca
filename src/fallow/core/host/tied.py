"""A weight that several modules share: the Deltas are at one of them, the leader; its followers run them too.

An embedding (width, rows) and the output layer (rows, width) take the same numbers as matrices that are each other's
transpose, so the follower's change is D^T x, by factors x A^T B^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from fallow.core.delta import Delta
from fallow.core.engine import Active
from fallow.core.factored import through
from fallow.core.host.layer import Adapters
from fallow.core.views import ConvView, TransposedView, View


class Tied:
    """In the place of Adapters at a follower, which sees the weight through `view`."""

    def __init__(self, leader: Adapters, view: View) -> None:
        self.leader, self.key, self.view = leader, leader.key, view
        self.alike = type(view) is type(leader.view) and not isinstance(view, ConvView)
        self.turned = isinstance(view, TransposedView) != isinstance(leader.view, TransposedView)

    @property
    def rows(self) -> list[str] | None:
        return self.leader.rows

    @property
    def acting(self) -> Active:
        return self._seen(self.leader.acting)

    def named(self, names: Sequence[str]) -> Active:
        return self._seen(self.leader.named(names))

    def changed(self, weight: Tensor, acting: Active) -> Tensor:
        """The weight itself, for a module that reads it."""
        return self.leader.changed(weight, [(getattr(delta, "delta", delta), scale) for delta, scale in acting])

    def _seen(self, acting: Active) -> Active:
        """Without those that leave the weight alone, which are the leader's own."""
        acting = [(delta, scale) for delta, scale in acting if delta.mode != "output"]
        if self.alike:
            return acting
        return [(cast(Delta, _Follower(delta, self.view, self.turned)), scale) for delta, scale in acting]


class _Follower:
    """What the engine asks of a Delta, on a follower's x and with its matrix; `turned`: the leader's transpose."""

    output = None

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
