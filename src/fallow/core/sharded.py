"""Weights of which each rank holds a part: DTensors, as `torch.distributed.fsdp.fully_shard` makes them (FSDP2).

Flat indices are local ones wherever weights are read and written: positions in the part that this rank holds. They are
global, row-major positions in the whole weight, in whatever leaves the process: files, states, and the order of ties.

    whole weight (4, 3)      rank 0 holds rows 0-1, rank 1 rows 2-3:  local index i of rank 1 is global index 6 + i

Every function that says "over all ranks" must be called by all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fallow.core.errors import ModelError


def is_dtensor(tensor: Any) -> bool:
    """Whether this is a DTensor, without importing them: that takes a second, for which a single process has no use."""
    return hasattr(tensor, "placements")


def local(tensor: Any) -> Tensor:
    """The part of a tensor that lies on this rank, the very memory; a plain tensor is its own."""
    return tensor.detach().to_local() if is_dtensor(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """All of a tensor, over all ranks, a copy where it is sharded."""
    return tensor.detach().full_tensor() if is_dtensor(tensor) else tensor


@dataclass(frozen=True)
class Part:
    """Which part of a weight this rank holds: `length` slices of dimension `dim` of `shape`, from `offset` on."""

    shape: tuple[int, ...]
    dim: int
    offset: int
    length: int
    group: Any  # the ranks that hold the parts
    device: torch.device

    def cut(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor of the whole weight's shape."""
        return tensor.narrow(self.dim, self.offset, self.length)

    def to_global(self, index: Tensor) -> Tensor:
        """(k,) global int64 indices of local ones; the order stays."""
        inner = _product(self.shape[self.dim + 1 :])
        index = index.long()
        if self.dim == 0:
            return index + self.offset * inner
        block = self.length * inner
        return index // block * (self.shape[self.dim] * inner) + index % block + self.offset * inner

    def to_local(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these global indices lie here, as positions (j,), and their local int64 indices (j,)."""
        inner = _product(self.shape[self.dim + 1 :])
        index = index.long()
        at = index // inner % self.shape[self.dim]
        positions = ((at >= self.offset) & (at < self.offset + self.length)).nonzero().view(-1)
        index = index.index_select(0, positions)
        outer = index // (self.shape[self.dim] * inner)
        rest = index % (self.shape[self.dim] * inner) - self.offset * inner
        return positions, outer * (self.length * inner) + rest

    def total(self, count: int) -> int:
        """The sum over all ranks."""
        return int(summed(torch.tensor([count], device=self.device), self.group))

    def gather(self, index: Tensor, *columns: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The global indices of all ranks, sorted, and with them what belongs to each; over all ranks."""
        indices = torch.cat(_all_gather(self.to_global(index), self.group))
        order = indices.argsort()
        found = [torch.cat(_all_gather(column, self.group)).index_select(0, order) for column in columns]
        return indices.index_select(0, order), found


def part_of(weight: Any) -> Part | None:
    """The part of this weight that the rank holds; None where it holds all of it.

    ModelError where it is cut in more than one direction, as by tensor parallelism together with FSDP.
    """
    if not is_dtensor(weight):
        return None
    cuts = [(at, placement) for at, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if not cuts:
        return None
    if len(cuts) > 1 or not cuts[0][1].is_shard() or hasattr(cuts[0][1], "split_factor"):
        raise ModelError(
            f"a weight {tuple(weight.shape)} is placed as {weight.placements}; selective training takes weights that "
            "are sharded along one dimension, as fully_shard does"
        )
    at, shard = cuts[0]
    mesh = weight.device_mesh
    dim, held = shard.dim % weight.ndim, weight.to_local()
    each = -(-weight.shape[dim] // mesh.size(at))
    offset = min(mesh.get_local_rank(at) * each, weight.shape[dim])
    return Part(tuple(weight.shape), dim, offset, held.shape[dim], mesh.get_group(at), held.device)


def gathered(part: Part | None, index: Tensor, *columns: Tensor) -> list[Tensor]:
    """Local indices (k,) and what belongs to each, as [global indices, *columns] over all ranks; themselves where all
    of the weight is here.
    """
    if part is None:
        return [index, *columns]
    indices, found = part.gather(index, *columns)
    return [indices.to(torch.int32 if _product(part.shape) < 2**31 else torch.int64), *found]


def scattered(part: Part | None, index: Tensor, *columns: Tensor) -> list[Tensor]:
    """What `gathered` gives, cut to this rank's part: [local indices, *columns]."""
    if part is None:
        return [index, *columns]
    positions, own = part.to_local(index)
    return [own.to(index.dtype), *(column.index_select(0, positions) for column in columns)]


def summed(tensor: Tensor, group: Any) -> Tensor:
    """The sum over all ranks of a group, in place."""
    dist.all_reduce(tensor, group=group)
    return tensor


def _all_gather(tensor: Tensor, group: Any) -> list[Tensor]:
    """The one-dimensional tensors of all ranks, which may differ in length."""
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=tensor.device)
    sizes[dist.get_rank(group)] = tensor.numel()
    lengths = summed(sizes, group).tolist()
    padded = tensor.new_zeros(max(lengths))
    padded[: tensor.numel()] = tensor
    every = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(every, padded, group=group)
    return [one[:length] for one, length in zip(every, lengths, strict=True)]


class Together:
    """A choice that is made over weights of which some are sharded; of plain weights alone, it asks nobody.

    A weight that every rank holds whole counts once.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.parts = {id(weight): part for weight in weights if (part := part_of(weight)) is not None}
        groups = {id(part.group): part.group for part in self.parts.values()}
        if len(groups) > 1:
            raise ModelError(
                "the weights are sharded over different groups of ranks; give the model that one fully_shard mesh holds"
            )
        self.group = next(iter(groups.values()), None)

    def counted(self, weight: Tensor) -> bool:
        """Whether this rank's entries of the weight are to be counted."""
        return self.group is None or id(weight) in self.parts or dist.get_rank(self.group) == 0

    def sum(self, counts: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.group is None:
            return counts
        device = next(iter(self.parts.values())).device
        return summed(counts.to(device), self.group).to(counts.device)

    def entries(self, counts: Sequence[tuple[Tensor, int]]) -> int:
        """How many entries there are over all ranks, given the (weight, entries) of this one."""
        return int(self.sum(torch.tensor([sum(count for weight, count in counts if self.counted(weight))])))

    def part(self, weight: Tensor, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor that has the shape of the whole weight, or is that part already."""
        part = self.parts.get(id(weight))
        return local(tensor) if part is None or tensor.shape != part.shape or is_dtensor(tensor) else part.cut(tensor)

    def any(self, weight: Tensor, here: bool) -> bool:
        """Whether it is so on a rank that holds some of this weight."""
        part = self.parts.get(id(weight))
        return here if part is None else part.total(int(here)) > 0

    def first(self, weight: Tensor | None, index: Tensor, wanted: int) -> tuple[Tensor, int]:
        """Of these sorted local indices those that are among the first `wanted` of all ranks, and how many all have."""
        part = self.parts.get(id(weight))
        if part is None:
            return index[:wanted], index.numel()
        total = part.total(index.numel())
        if total <= wanted:
            return index, total
        if wanted == 0:
            return index[:0], total
        indices, _ = part.gather(index)
        return index[part.to_global(index) <= indices[wanted - 1]], total


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
