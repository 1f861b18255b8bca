"""What the model shows of a selective optimizer's training: the trained weights, the base, or something between.

    showing.set_scale(0.5)       base + 0.5 * change, in the model's own weights; 0 and 1 bit for bit
    showing.delta("value", {})   what training changed, as an adapter
    showing.take(adapter, ...)   an adapter in place of what was trained

While the model shows anything but the trained weights these are on the `shelf`, and training is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fallow.core.compact import Slot, gather
from fallow.core.errors import ConfigError
from fallow.core.files import fingerprint
from fallow.core.select import named_weights
from fallow.core.sharded import gathered, scattered, whole
from fallow.core.sparse import Entry, SparseDelta

Untrained = Callable[[str, nn.Parameter], Slot]


class Showing:
    """The slots of one optimizer and its model; `slots` is the optimizer's own mapping, which may grow."""

    def __init__(self, model: nn.Module, slots: dict[str, Slot]) -> None:
        self.model, self.slots = model, slots
        self.shelf: dict[str, Tensor] | None = None  # the trained values, while the model shows others
        self.scale = 1.0
        self.prints: dict[str, str] = {}  # the fingerprints of the base's weights, as far as they were asked for

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Show the model as base + scale * change: 0 is the base bit for bit, 1 the trained weights bit for bit."""
        if not abs(scale) < float("inf"):
            raise ConfigError(f"scale={scale} must be a finite number; 0 is the base, 1 the trained weights")
        if scale == 1 and self.shelf is None:
            return
        self.refresh()
        shelf = self.shelf or {name: slot.read() for name, slot in self.slots.items()}
        for name, slot in self.slots.items():
            if scale == 1:
                slot.write(shelf[name])
            elif scale == 0:
                slot.write(slot.base)
            else:
                slot.write(slot.base.to(slot.precision) + scale * self.moved(slot, shelf[name]))
        self.scale, self.shelf = float(scale), None if scale == 1 else shelf

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model is the base, bit for bit."""
        scale = self.scale
        self.set_scale(0.0)
        try:
            yield
        finally:
            self.set_scale(scale)

    def delta(self, store: Literal["delta", "value"], metadata: dict[str, Any]) -> SparseDelta:
        """What training changed, as a sparse adapter: float32 changes, or the exact values in the weights' dtype."""
        if store not in ("delta", "value"):
            raise ConfigError(f"store={store!r} must be 'delta' (scales and merges) or 'value' (bit-exact)")
        self.refresh()
        self._fingerprint()
        entries = {}
        for name, slot in self.slots.items():
            present = self.present(slot)
            values = present if store == "value" else self.moved(slot, present)
            index, values = gathered(slot.part, slot.index, values)
            entries[name] = Entry(
                index=index.clone(),
                values=values,
                shape=tuple(slot.weight.shape),
                dtype=str(slot.weight.dtype).removeprefix("torch."),
                fingerprint=self.prints[name],
            )
        return SparseDelta(entries, store, metadata)

    def take(self, adapter: SparseDelta, force: bool, untrained: Untrained) -> None:
        """Put an adapter in place of what was trained; `untrained` makes the slots of weights that had none.

        AdapterError where it belongs to another base, unless forced.
        """
        with self.disabled():
            adapter.check(self.model, force)
            plan = list(self._plan(adapter, untrained))
            self.settle()
            for slot, index, base, values, live in plan:
                change = values - base.to(slot.precision) if slot.form == "delta" else values
                every = live.numel() == index.numel()  # then positions would cost memory and a gather in each step
                slot.adopt(index, base, None if every else live, change.index_select(0, live), slot.selected)
                slot.write(values)
                self.slots.setdefault(slot.name, slot)

    def _plan(
        self, adapter: SparseDelta, untrained: Untrained
    ) -> Iterator[tuple[Slot, Tensor, Tensor, Tensor, Tensor]]:
        """(slot, index, base, values, live) of every weight after loading; read while the model shows the base."""
        named = named_weights(self.model)
        canonical = {id(param): name for name, slot in self.slots.items() for param in slot.params}
        entries = {canonical.get(id(named[name]), name): entry for name, entry in adapter.entries.items()}
        for name in dict.fromkeys((*self.slots, *entries)):
            slot = self.slots.get(name) or untrained(name, named[name])
            trained, device = slot.trained, slot.weight.device
            added = change = trained[:0]
            if name in entries:
                added, change = scattered(slot.part, entries[name].index.to(device), entries[name].values.to(device))
                added, change = added.to(trained.dtype), change.to(slot.precision)
            index = torch.cat([slot.index, added]).unique()
            base = gather(slot.weight, index)
            values = base.to(slot.precision, copy=True)  # base itself must stay
            if name in entries:
                at = torch.searchsorted(index, added)
                values[at] = change if adapter.store == "value" else values[at] + change
            yield slot, index, base, values, torch.searchsorted(index, trained, out_int32=True)

    def settle(self) -> None:
        """What the model holds from now on is what is trained."""
        self.shelf, self.scale = None, 1.0

    def check_trained_shown(self) -> None:
        """ConfigError while the model shows anything but the trained weights."""
        if reason := self.refusal():
            raise ConfigError(reason)

    def refusal(self) -> str:
        """Why the weights may not change now; empty where they may."""
        if self.shelf is None:
            return ""
        return f"the model shows the adapter at scale {self.scale}; call set_scale(1.0) before training on"

    def refresh(self) -> None:
        """Follow what others wrote into the weights, unless the model shows another scale."""
        if self.shelf is None:
            for slot in self.slots.values():
                slot.refresh()

    def present(self, slot: Slot) -> Tensor:
        """(n,) the trained values in the weight's dtype, whatever the model shows at the moment."""
        return slot.read() if self.shelf is None else self.shelf[slot.name]

    def moved(self, slot: Slot, present: Tensor) -> Tensor:
        """(n,) what training added to the first values, from the masters where there are some."""
        moved = present.to(slot.precision) - slot.base.to(slot.precision)
        if not slot.mastered:
            return moved
        change = slot.values() - slot.base_of_trained() if slot.form == "value" else slot.proxy.detach().clone()
        live = slot.live
        return change if live is None else moved.index_copy_(0, live.long(), change)

    def values(self, slot: Slot) -> Tensor:
        """(k,) the trained values, whatever the model shows at the moment."""
        if self.shelf is None or slot.mastered:
            return slot.values()
        present, live = self.shelf[slot.name], slot.live
        return present if live is None else present.index_select(0, live)

    def _fingerprint(self) -> None:
        if missing := [name for name in self.slots if name not in self.prints]:
            with self.disabled():
                self.prints |= {name: fingerprint(whole(self.slots[name].weight.detach())) for name in missing}
