"""Adafactor (arXiv 1804.04235) as the inner rule: the second moment of R (r, n) as the means of its rows and columns.

    b2 = 1 - k^-0.8      A <- b2 A + (1 - b2) mean_j(R² + eps)      C <- b2 C + (1 - b2) mean_i(R² + eps)
    U = R / sqrt(A Cᵀ / mean(A))      U <- U / max(1, rms(U) / clip)      N = U, or its average with momentum b1

The clip by the root mean square is of R's, in the low-rank space, as in GaLore's code. Tensors without two dimensions
keep the whole second moment. `lr` is the rate; no relative steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fallow.optim.inner.rule import Inner
from fallow.optim.moments import read, write
from fallow.optim.parts import number
from fallow.optim.site import Site


@dataclass(frozen=True)
class Adafactor(Inner):
    """`momentum`: b1 of an average of U, 0 for none. `decay`: of b2. `floor`: eps under the squares."""

    name: ClassVar[str] = "adafactor"
    shares: ClassVar[bool] = False
    powers: ClassVar[Mapping[str, int]] = {"row": 2, "column": 2, "v": 2, "m": 1}
    momentum: float = 0.0
    decay: float = 0.8
    clip: float = 1.0
    floor: float = 1e-30

    def __post_init__(self) -> None:
        number("adafactor: momentum", self.momentum, 0, 1)
        number("adafactor: decay", self.decay, 0, closed=False)
        number("adafactor: clip", self.clip, 0, closed=False)
        number("adafactor: floor", self.floor, 0)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        second = {"row": shape[:-1], "column": shape[:-2] + shape[-1:]} if len(shape) > 1 else {"v": shape}
        return second | ({"m": shape} if self.momentum else {})

    def turns(self, key: str) -> bool:
        return key != "column"

    def directions(self, sites: Sequence[Site], inputs: Sequence[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        return [self._direction(site, one) for site, one in zip(sites, inputs, strict=True)]

    def _direction(self, site: Site, given: Tensor) -> Tensor:
        share = site.state["age"] ** -self.decay  # 1 - b2, 1 in the first update
        square = given.square().add_(self.floor)
        if given.ndim > 1:
            row = self._average(site, "row", square.mean(-1), share)
            column = self._average(site, "column", square.mean(-2), share)
            scale = (row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)
            found = scale.mul_(given)
        else:
            found = given * self._average(site, "v", square, share).rsqrt()
        found.div_((found.square().mean().sqrt() / self.clip).clamp_min(1.0))
        return self._average(site, "m", found, 1 - self.momentum).clone() if self.momentum else found

    @staticmethod
    def _average(site: Site, key: str, value: Tensor, share: float) -> Tensor:
        held = read(site, key)
        held.lerp_(value, share)
        write(site, key, held)
        return held
