"""What an inner rule is: what becomes of a gradient, projected R (r, n) or plain, before it moves the weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fallow.optim.site import Site


@dataclass(frozen=True)
class Inner:
    """`powers`: for each of its states the power of the gradient that it averages, 1 or 2; 0 for one without sides.

    `per_entry`: whether an entry's direction depends on that entry's past alone, so that blocks may be treated apart.
    """

    name: ClassVar[str] = ""
    powers: ClassVar[Mapping[str, int]] = {}

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes of its states for tensors of this shape."""
        return dict.fromkeys(self.powers, shape)

    def directions(self, sites: Sequence[Site], inputs: Sequence[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        """For each R (r, n) the direction N (r, n) of W -= lr P N; the states move on. `state["age"]` is the number of
        this update since the states began, from 1.
        """
        raise NotImplementedError(self.name)

    def correction(self, age: int, group: Mapping[str, Any]) -> float:
        """What the directions were multiplied by, to make up for states that began at zero."""
        return 1.0

    def step(self, sites: Sequence[Site], gradients: Sequence[Tensor], group: Mapping[str, Any]) -> bool:
        """Update plain tensors at once, where the rule has a quicker way than `directions`; whether it has done so."""
        return False
