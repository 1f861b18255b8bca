"""Several processes, each with batches of its own, that all get what was found in all batches.

Sums are added over the ranks, principal components merged. Every rank calls these with the same layers, in the same
order; a rank in which a layer never ran counts as zero there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fallow.core.distributed import ranks
from fallow.core.probing.components import Known, Principal

T = TypeVar("T")


def gathered(value: T) -> list[T]:
    """The values of all ranks, in their order: small ones, which are pickled."""
    if ranks() == 1:
        return [value]
    every: list[Any] = [None] * ranks()
    dist.all_gather_object(every, value)
    return every


def all_agree(here: bool) -> bool:
    """Whether it is so on every rank."""
    return all(gathered(here))


def summed(sums: dict[str, Tensor], shapes: Mapping[str, Sequence[int]], device: torch.device) -> None:
    """Put the sums over all ranks in place of these (CPU, of one dtype), one at a time; what no rank has stays away.

    `shapes`: of all that could be there. `device`: through which they travel.
    """
    if ranks() == 1:
        return
    held = gathered({name: str(tensor.dtype) for name, tensor in sums.items()})
    for name, shape in shapes.items():
        dtypes = [names[name] for names in held if name in names]
        if not dtypes:
            continue
        here = sums.get(name)
        if here is None:
            here = torch.zeros(tuple(shape), dtype=getattr(torch, dtypes[0].removeprefix("torch.")))
        moved = here.to(device).contiguous()
        dist.all_reduce(moved)
        sums[name] = moved.cpu()


def common_owners(owner: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """{layer: the first layer that shares its input on every rank}, given {layer: the first that does on this one}."""
    every = gathered(dict(owner))
    first: dict[tuple[str | None, ...], str] = {}
    found = {}
    for name in names:
        at = tuple(each.get(name) for each in every)
        if any(one is not None for one in at):  # the name of a model that is one layer is empty
            found[name] = first.setdefault(at, name)
    return found


def merged(own: Mapping[str, Principal], empty: Principal, device: torch.device) -> dict[str, Principal]:
    """Principal components of the inputs of all ranks, {name: ...}, equal on all of them; `empty`: without a row.

    Each rank goes on until its own have settled; settled are those that have on every rank that saw the layer.
    """
    if ranks() == 1:
        return dict(own)
    told = gathered({name: vars(part.known) for name, part in own.items() if part.known is not None})
    found: dict[str, Principal] = {}
    for name in dict.fromkeys(name for each in told for name in each):
        parts = [Known(**_moved(each[name], device)) for each in told if name in each]
        total = empty
        for part in parts:
            total = total.merged(dataclasses.replace(empty, known=part))
        assert total.known is not None, "a rank has seen a row"
        settled = torch.zeros_like(total.known.converged)
        least = min(len(part.converged) for part in parts)
        settled[:least] = torch.stack([part.converged[:least] for part in parts]).all(0)
        found[name] = dataclasses.replace(total, known=dataclasses.replace(total.known, converged=settled))
    return found


def _moved(told: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in told.items()}
