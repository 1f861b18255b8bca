"""Bases whose columns come from a fixed set: what is kept of them is which ones, as sorted numbers.

Moments keep their place by number: those of a column that stays go on, those of one that is new begin at zero. So
`moments="rotate"` is exact and costs no product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.optim.bases.basis import Basis, Turn
from fallow.optim.site import Site


@dataclass(frozen=True)
class Chosen(Basis):
    """`state["index"]` (r,) int32, or int64 beyond: sorted."""

    decomposes: ClassVar[bool] = False

    def begin(self, site: Site) -> None:
        kind = torch.int32 if site.param.numel() < 2**31 else torch.int64
        site.state["index"] = torch.zeros(site.rank or 0, dtype=kind, device=site.param.device)

    def pick(self, site: Site, gradient: Tensor, seed: int) -> Tensor:
        """(r,) the numbers of the new columns, in any order."""
        raise AssertionError(f"basis '{self.name}' has no rule of choice")

    def choose(self, sites: Sequence[Site], gradients: Sequence[Tensor], seeds: Sequence[int]) -> list[Turn]:
        turns: list[Turn] = []
        for site, gradient, seed in zip(sites, gradients, seeds, strict=True):
            old = site.state["index"]
            new = self.pick(site, gradient, seed).to(old.dtype).sort()[0]
            turns.append(matched(old, new) if site.state["chosen"] else None)
            site.state["index"] = new
        return turns

    def turn(self, turn: Turn, moment: Tensor, power: int) -> Tensor:
        place, held = turn
        return moment.index_select(0, place) * held.to(moment.dtype).view(-1, *[1] * (moment.ndim - 1))

    def overlap(self, turn: Turn) -> Tensor:
        return turn[1].double().mean()


def matched(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """For each of the sorted numbers `new` (r,) its place in the sorted `old`, and whether it is there."""
    place = torch.searchsorted(old, new).clamp_(max=old.numel() - 1)
    return place, old.index_select(0, place) == new


def at_random(most: int, count: int, seed: int, device: torch.device) -> Tensor:
    """`count` different numbers below `most`."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randperm(most, generator=generator, device=device)[:count]
