"""Which layer gets how much rank, from the spectra of the weights alone: layers of a flat spectrum need more of it.

The energy of a layer with singular values s_1 >= s_2 >= ... at rank q is E(q) = sum_(j<=q) s_j² / ||W||_F². All layers
get the rank at which their energy reaches one threshold, the largest that the budget allows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from fallow.core.errors import ConfigError
from fallow.core.linalg import low_rank


def energies(weight: Tensor, most: int, generator: torch.Generator | None = None) -> Tensor:
    """E(1), ..., E(most) of a matrix (out, in), float64 (min(most, out, in),); 1 throughout for a zero matrix."""
    values = low_rank(weight, most, generator=generator)[1].double()
    whole = weight.double().square().sum()
    return (values.square().cumsum(0) / whole).clamp(max=1.0) if whole > 0 else torch.ones_like(values)


def ranks_by_energy(
    held: Mapping[str, Tensor],
    mean: int,
    least: int | None = None,
    most: int | None = None,
    budget: Literal["rank", "params"] = "rank",
) -> dict[str, int]:
    """The rank of each layer, in [least, most] (default: half and twice the mean), from its `energies`.

    `budget`: "rank" keeps the sum of ranks within layers * mean; "params" the sum of their squares, which is what cores
    (r, r) train, within layers * mean². What the threshold leaves goes, one rank at a time, to the layer of the lowest
    energy; ties by the order of the layers. ConfigError for a range or a mean that no layer can have.
    """
    least = max(1, mean // 2) if least is None else least
    most = 2 * mean if most is None else most
    if not 1 <= least <= mean <= most:
        raise ConfigError(f"least={least}, mean={mean}, most={most} must be whole numbers from 1 in rising order")
    if budget not in ("rank", "params"):
        raise ConfigError(f"budget={budget!r} must be 'rank' or 'params'")
    short = [name for name, energy in held.items() if energy.numel() < least]
    if short:
        raise ConfigError(f"least={least} is above what '{short[0]}' can have, {held[short[0]].numel()}; leave it out")
    cost: Callable[[int], int] = (lambda r: r) if budget == "rank" else (lambda r: r * r)
    limit = len(held) * cost(mean)
    curves = {name: energy[:most].tolist() for name, energy in held.items()}

    def at(threshold: float) -> dict[str, int]:
        reached = {name: sum(value < threshold for value in curve) + 1 for name, curve in curves.items()}
        return {name: min(max(rank, least), len(curves[name])) for name, rank in reached.items()}

    candidates = sorted({value for curve in curves.values() for value in curve})
    affordable = bisect_right(candidates, limit, key=lambda threshold: sum(map(cost, at(threshold).values())))
    ranks = at(candidates[affordable - 1] if affordable else 0.0)
    spent = sum(map(cost, ranks.values()))
    while True:
        open_to = [n for n, r in ranks.items() if r < len(curves[n]) and spent + cost(r + 1) - cost(r) <= limit]
        if not open_to:
            return ranks
        name = min(open_to, key=lambda name: curves[name][ranks[name] - 1])
        spent += cost(ranks[name] + 1) - cost(ranks[name])
        ranks[name] += 1
