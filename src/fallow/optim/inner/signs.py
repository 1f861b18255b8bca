"""Rules with one state or none.

lion   N = sign(b1 M + (1 - b1) R),  M <- b2 M + (1 - b2) R      arXiv 2302.06675; betas (0.9, 0.99), lr a fifth
sgdm   M <- mu M + R,  N = M, or R + mu M with `nesterov`, or its sign with `sign`; momentum=0 keeps no state
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fallow.optim.inner.rule import Inner
from fallow.optim.moments import read, write
from fallow.optim.parts import number
from fallow.optim.site import Site


@dataclass(frozen=True)
class Lion(Inner):
    name: ClassVar[str] = "lion"
    powers: ClassVar[Mapping[str, int]] = {"m": 1}

    def directions(self, sites: Sequence[Site], inputs: Sequence[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        beta1, beta2 = group["betas"]
        kept = [read(site, "m") for site in sites]
        found = [*torch._foreach_lerp(kept, [*inputs], 1 - beta1)]
        torch._foreach_sign_(found)
        torch._foreach_lerp_(kept, [*inputs], 1 - beta2)
        for site, m in zip(sites, kept, strict=True):
            write(site, "m", m)
        return found


@dataclass(frozen=True)
class SGDM(Inner):
    name: ClassVar[str] = "sgdm"
    powers: ClassVar[Mapping[str, int]] = {"m": 1}
    momentum: float = 0.9
    nesterov: bool = False
    sign: bool = False

    def __post_init__(self) -> None:
        number("sgdm: momentum", self.momentum, 0, 1)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"m": shape} if self.momentum else {}

    def directions(self, sites: Sequence[Site], inputs: Sequence[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        found = [one.clone() for one in inputs]
        if self.momentum:
            kept = [read(site, "m") for site in sites]
            torch._foreach_mul_(kept, self.momentum)
            torch._foreach_add_(kept, [*inputs])
            for site, m in zip(sites, kept, strict=True):
                write(site, "m", m)
            if self.nesterov:
                torch._foreach_add_(found, kept, alpha=self.momentum)
            else:
                found = [m.clone() for m in kept]
        if self.sign:
            torch._foreach_sign_(found)
        return found
