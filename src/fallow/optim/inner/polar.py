"""The polar factor of a momentum, as in Muon (KellerJordan/Muon) and Trion (arXiv 2505.17967).

    M <- mu M + R      B = R + mu M (nesterov) or M      N = s U Vᵀ for B = U S Vᵀ

by matrix products alone (`core.linalg.polar`), all matrices of one shape together. s of a weight (out, in): `adjust`
    none 1      kj max(1, out / in)^.5      dion (out / in)^.5      kimi 0.2 max(out, in)^.5

Tensors that are no matrices take AdamW, with the group's `plain_scale` as the factor of their rate. For whole matrices
without a basis there is `torch.optim.Muon`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fallow.core.linalg import polar
from fallow.optim.inner.adamw import AdamW
from fallow.optim.inner.rule import Inner
from fallow.optim.moments import read, write
from fallow.optim.parts import number, one_of
from fallow.optim.site import Site


@dataclass(frozen=True)
class Polar(Inner):
    """`momentum`: mu, 0 where the residual rule keeps one. `method`: of `core.linalg.polar`."""

    name: ClassVar[str] = "polar"
    shares: ClassVar[bool] = False
    powers: ClassVar[Mapping[str, int]] = {"m": 1}
    matrices: ClassVar[bool] = True
    momentum: float = 0.95
    nesterov: bool = True
    adjust: str = "kj"
    method: str = "polar-express"

    def __post_init__(self) -> None:
        number("polar: momentum", self.momentum, 0, 1)
        one_of("polar: adjust", self.adjust, ("none", "kj", "dion", "kimi"))
        one_of("polar: method", self.method, ("polar-express", "newton-schulz", "svd"))

    def other(self) -> Inner:
        return AdamW()

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"m": shape} if self.momentum else {}

    def directions(self, sites: Sequence[Site], inputs: Sequence[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        given = [self._averaged(site, one) for site, one in zip(sites, inputs, strict=True)]
        found = polar(torch.stack([one.flatten(1) for one in given]), self.method)  # type: ignore[arg-type]
        return [one.mul(self._size(site)).view(like.shape) for site, one, like in zip(sites, found, given, strict=True)]

    def _averaged(self, site: Site, given: Tensor) -> Tensor:
        if not self.momentum:
            return given
        kept = read(site, "m").mul_(self.momentum).add_(given)
        write(site, "m", kept)
        return given.add(kept, alpha=self.momentum) if self.nesterov else kept

    def _size(self, site: Site) -> float:
        out, inner = site.param.shape[0], site.param.numel() // site.param.shape[0]
        sizes = {"none": 1.0, "kj": max(1.0, out / inner) ** 0.5, "dion": (out / inner) ** 0.5}
        return sizes.get(self.adjust, 0.2 * max(out, inner) ** 0.5)
