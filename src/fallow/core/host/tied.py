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
        self.leader, self.key = leader, leader.key
        self.alike = type(view) is type(leader.view) and not isinstance(view, ConvView)
        self.view = leader.view if self.alike else cast(View, _TiedView(leader.view, view))

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
        view = cast(_TiedView, self.view)
        return [(cast(Delta, _TiedDelta(delta, view)), scale) for delta, scale in acting]


class _TiedView:
    """Matrices are the leader's, x is the follower's."""

    def __init__(self, leader: View, own: View) -> None:
        self.leader, self.own, self.kind = leader, own, own.kind
        self.turned = isinstance(leader, TransposedView) != isinstance(own, TransposedView)

    def read(self, weight: Tensor) -> Tensor:
        return self.leader.read(weight)

    def op(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.own.op(x, matrix.T if self.turned else matrix, bias)


class _TiedDelta:
    """What the engine asks of a Delta, on a follower's x."""

    def __init__(self, delta: Delta, view: _TiedView) -> None:
        self.delta, self.view = delta, view
        self.has_inputs = view.kind != "embedding"
        self.drop = delta.drop if self.has_inputs else 0.0
        self.any_dtype = delta.exact

    def __getattr__(self, name: str) -> Any:
        return getattr(self.delta, name)

    def delta_forward(self, x: Tensor) -> Tensor:
        if not self.delta.exact:
            return self.view.op(x, self.delta.delta_weight())
        b, a = self.delta.factors()
        if self.view.turned:
            b, a = a.T, b.T
        return through(self.view.own, x, a, b)
