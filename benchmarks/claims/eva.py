"""EVA's start against random, least and LoRA's own directions, and its ranks, on digits that turn.

python benchmarks/claims/eva.py --seeds 5

An MLP 64-128-128-10 that knows upright digits learns turned ones for 60 steps; rank 4, alpha 8, in all layers. All but
LoRA start with orthonormal rows in A and B = 0: the directions of most variance of the turned training images in each
layer, of least, or random ones. At one rate, 3e-3, and then each at its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from protocol import Contender, Digits, Setting, arguments, compare
from torch import nn

import fallow
from fallow.core.delta import Site
from fallow.core.starting import Pair, Start

LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SETTING = Setting(targets="all", steps=60)
Seen = Callable[[nn.Module, Digits], Mapping[str, Any]]
Statistics = Any


@dataclass(frozen=True)
class Rows(Start):
    """Orthonormal rows in A: random ones, or of least variance where statistics are given."""

    name: ClassVar[str] = "rows"
    statistics: Statistics = None

    def pair(self, site: Site, rank: int, scale: float) -> Pair:
        if self.statistics is None:
            return Pair(None, torch.linalg.qr(torch.randn(site.shape[1], rank))[0].T.contiguous())
        return Pair(None, self.statistics.at(site, "activation").activation.directions[-rank:].clone())


def after(make: Callable[[Statistics], Mapping[str, Any]], center: bool = True) -> Seen:
    """Options made of the components of the turned training images."""

    def seen(model: nn.Module, digits: Digits) -> Mapping[str, Any]:
        images = digits.target["train"][0].split(200)
        whole = {"components": 128, "center": center, "targets": ["0", "2", "4"]}
        return make(fallow.probe(model, images, want={"activation"}, **whole))

    return seen


def with_rank(label: str, seen: Seen | None = None, **options: Any) -> Contender:
    return Contender(label, "lora", {"rank": 4, "alpha": 8.0, **options}, seen=seen)


TWO = {"rank": 2, "alpha": 4.0}  # at rank 4 its ranks are even: four each
CONTENDERS = [
    with_rank("LoRA"),
    with_rank("random rows", lambda model, digits: {"start": Rows()}),
    with_rank("least variance", after(lambda found: {"start": Rows(found)})),
    with_rank("EVA", after(lambda found: {"start": fallow.EVA(found)})),
    with_rank("EVA, not centred", after(lambda found: {"start": fallow.EVA(found)}, center=False)),
    with_rank("EVA, whitened", after(lambda found: {"start": fallow.EVA(found, whiten=True)})),
    with_rank("EVA r=2", after(lambda found: {"start": fallow.EVA(found)}), **TWO),
    with_rank(
        "EVA r=2, its ranks",
        after(lambda found: {"start": fallow.EVA(found), "budget": fallow.EVARanks(found)}),
        **TWO,
    ),
]

if __name__ == "__main__":
    seeds = arguments(__doc__).seeds
    compare("eva-one-rate", CONTENDERS, seeds=seeds, lrs=(3e-3,), setting=SETTING)
    compare("eva", CONTENDERS, seeds=seeds, lrs=LRS, setting=SETTING)
