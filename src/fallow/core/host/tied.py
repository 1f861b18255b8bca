"""A weight that several modules share: the Deltas are at one of them, the leader; its followers run them too."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fallow.core.engine import Active
from fallow.core.follower import followed
from fallow.core.host.layer import Adapters
from fallow.core.views import View


class Tied:
    """In the place of Adapters at a follower, which sees the weight through `view`."""

    def __init__(self, leader: Adapters, view: View) -> None:
        self.leader, self.key, self.view = leader, leader.key, view

    @property
    def rows(self) -> list[str] | None:
        return self.leader.rows

    @property
    def coded(self) -> bool:
        return self.leader.coded

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
        return followed(acting, self.leader.view, self.view)
