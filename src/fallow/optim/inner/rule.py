"""What an inner rule is: what becomes of a gradient, projected R (r, n) or plain, before it moves the weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fallow.core.errors import ConfigError
from fallow.optim.site import Site


@dataclass(frozen=True)
class Inner:
    """`powers`: for each of its states the power of the gradient that it averages, 1 or 2. `form`: how its states are
    kept, where that is not the group's choice. `matrices`: whether it is for matrices alone; others take `other()`.
    """

    name: ClassVar[str] = ""
    powers: ClassVar[Mapping[str, int]] = {}
    form: ClassVar[str | None] = None
    matrices: ClassVar[bool] = False
    shares: ClassVar[bool] = True  # whether slices of a tensor can be treated apart

    def fits(self, tensor: Tensor) -> bool:
        return not self.matrices or tensor.ndim >= 2

    def other(self) -> Inner:
        """The rule of tensors that this one is not for."""
        raise AssertionError(self.name)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes of its states for tensors of this shape."""
        return dict.fromkeys(self.powers, shape)

    def turns(self, key: str) -> bool:
        """Whether the state's first dimension is the basis's."""
        return True

    def directions(self, sites: Sequence[Site], inputs: Sequence[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        """For each R (r, n) the direction N (r, n) of W -= lr P N, a new tensor; the states move on. `state["age"]` is
        the number of this update since the states began, from 1.
        """
        raise AssertionError(self.name)

    def correction(self, age: int, group: Mapping[str, Any]) -> float:
        """What the directions were multiplied by, to make up for states that began at zero."""
        return 1.0

    def step(self, sites: Sequence[Site], group: Mapping[str, Any]) -> Sequence[Site]:
        """Update plain tensors at once, where the rule has a quicker way than `directions`; those that are left."""
        return sites

    def check(self, matrix: bool) -> None:
        """ConfigError where a basis gives no matrices and the rule is one of matrices."""
        if self.matrices and not matrix:
            raise ConfigError(
                f"inner='{self.name}' works on matrices, and basis='entries' gives single entries; take 'coordinates', "
                "or another rule"
            )
