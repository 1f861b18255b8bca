"""Selective training over stored weights: the chosen entries as a sparse side branch.

    W = decode(code);  W.flat[index] = v        v (k,), what an optimizer trains; the code stays as it is

A stored weight (`core.stored_weight`) keeps v beside its code and puts it into the dense weight while there is one, so
the layer acts as if its entries had been written: selection, penalty, scale, files and states are those of a dense
weight. The base is never lost, since nothing is written over it: first values cost no memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from fallow.core.coding import PackedIndex
from fallow.core.compact import Form, Slot
from fallow.core.select import Target
from fallow.core.stored_weight import Store, StoredWeight


class SideSlot(Slot):
    """The chosen entries of one stored weight; `index` is shared with it."""

    def __init__(self, target: Target, index: Tensor, form: Form = "value", hollow: bool = False) -> None:
        former = cast(StoredWeight, target.weight).store.index
        self._builds_on = former is not None and former.size > 0  # an earlier training or adapter, which stays
        super().__init__(target, index, form, hollow)
        self._share()

    @property
    def stored(self) -> Store:
        return cast(StoredWeight, self.weight).store

    @property
    def base(self) -> Tensor:
        """(n,) the first values, on the weight's device: what the code says, unless other entries came before these."""
        if self.form == "delta" or self._builds_on:  # in the form "delta" needed in each step, so kept
            return super().base
        return self.stored.read(self.index, self.weight.dtype, trained=False)

    def adopt(self, index: Tensor, base: Tensor, live: Tensor | None, master: Tensor, selected: int) -> None:
        super().adopt(index, base, live, master, selected)
        self._share()

    @torch.no_grad()
    def _share(self) -> None:
        """Let the weight keep the slot's entries apart, with those that were there before, and drop first values that
        the code gives.
        """
        index = self._index
        if self._builds_on and (former := self.stored.index) is not None:
            index = PackedIndex(torch.cat([former.decode(), index.decode()]).unique(), index.numel)
        self.stored.keep(index, self.weight.dtype)
        if self.form == "value" and not self._builds_on:
            self._base = self._base.new_empty(0)


def slot_of(target: Target, index: Tensor, form: Form = "value", hollow: bool = False) -> Slot:
    """The slot that fits how the weight is kept."""
    kind = SideSlot if isinstance(target.weight, StoredWeight) else Slot
    return kind(target, index, form, hollow)


def kept_as(slots: Iterable[Slot]) -> dict[str, Any]:
    """What an adapter's file says of the base that it was trained on, where codes stood for it: its changes are
    relative to what the codes say, its fingerprints are those of the weights before they were coded.
    """
    modes = {slot.stored.mode for slot in slots if isinstance(slot, SideSlot)} - {"plain"}
    return {"base_kept_as": sorted(modes)} if modes else {}
