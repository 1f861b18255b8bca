"""The state of a selective optimizer: its chosen entries and moments as plain tensors, taken, checked and put back.

Of sharded weights the state is of the whole, so it fits any number of ranks: entries are gathered when it is taken and
cut to each rank's part when it is put back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fallow.core.compact import Form, Slot
from fallow.core.errors import AdapterError
from fallow.core.sharded import gathered, scattered
from fallow.selection.rules import per_entry
from fallow.selection.showing import Showing

STATE_VERSION = 1


def tensors_of(slots: Mapping[str, Slot], showing: Showing) -> dict[str, dict[str, Any]]:
    """{name: its entries, their first and present values, and masters}; where weights are sharded, of the whole."""
    showing.refresh()
    tensors = {}
    for name, slot in slots.items():
        index, base, weight = gathered(slot.part, slot.index, slot.base, showing.present(slot))
        trained, master = gathered(slot.part, slot.trained, slot.trained if slot.exact else slot.proxy.detach())
        live = slot.live
        tensors[name] = {
            "shape": list(slot.weight.shape),
            "index": index,
            "base": base,
            "live": None if live is None else torch.searchsorted(index, trained).to(live.dtype),
            "selected": slot.selected,
            "weight": weight,
            "master": None if slot.exact else master,
        }
    return tensors


def checked_state(
    state_dict: Mapping[str, Any],
    form: Form,
    rule: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    grouped: Sequence[str],
) -> Mapping[str, Any]:
    """The part that is ours of a state that fits this form, rule and model; AdapterError where it does not."""
    own = state_dict.get("selective")
    if not isinstance(own, Mapping) or own.get("version") != STATE_VERSION:
        raise AdapterError(
            f"this is no state of a selective optimizer (version {STATE_VERSION}); its own state_dict() is needed"
        )
    if own["form"] != form:
        raise AdapterError(f"the state holds entries in the form {own['form']!r}, this optimizer in {form!r}")
    if (saved := own.get("rule", type(rule).__name__)) != type(rule).__name__:
        raise AdapterError(
            f"the state holds the moments of {saved}, this optimizer's rule is {type(rule).__name__}; give the "
            "rule of the saved run"
        )
    for name, held in own["tensors"].items():
        if name not in named or list(named[name].shape) != held["shape"]:
            raise AdapterError(f"the state trains '{name}' {held['shape']}, which this model lacks")
        index = held["index"]
        if not index.shape == held["base"].shape == held["weight"].shape or (
            index.numel() and not 0 <= int(index[0]) <= int(index[-1]) < named[name].numel()
        ):
            raise AdapterError(f"the state is broken at '{name}': its indices do not fit; copy it again")
    if several_groups(rule, state_dict) and list(own["grouped"]) != list(grouped):
        raise AdapterError(
            "the state trains other weights than this optimizer, and its rule has several groups; make it with the "
            "amount, include, exclude and rule of the saved run"
        )
    return own


def several_groups(rule: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> bool:
    """Whether the rule or the state has more than one group, so that proxies cannot move between them."""
    return max(len(rule.param_groups), len(state_dict["param_groups"])) > 1


def put_back(slots: Mapping[str, Slot], tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the slots what `tensors_of` took; the weights are written."""
    for name, slot in slots.items():
        held = tensors[name]
        live, weight, master = held["live"], held["weight"], held["master"]
        if master is None:
            master = weight if live is None else weight.index_select(0, live)
        if slot.part is not None:
            trained = held["index"] if live is None else held["index"].index_select(0, live)
            trained, master = scattered(slot.part, trained, master)
            index, base, weight = scattered(slot.part, held["index"], held["base"], weight)
            live = None if live is None else torch.searchsorted(index, trained)
            held = {**held, "index": index, "base": base}
        slot.adopt(held["index"], held["base"], live, master, held["selected"])
        slot.write(weight.to(slot.weight.device))


def by_proxy(slots: Mapping[str, Slot], rule: torch.optim.Optimizer) -> list[Slot]:
    """The slots in the order in which the rule's state numbers their proxies."""
    owner = {id(slot.proxy): slot for slot in slots.values()}
    return [owner[id(param)] for group in rule.param_groups for param in group["params"]]


def gathered_moments(state: Mapping[int, Any], slots: Sequence[Slot]) -> dict[int, Any]:
    """The rule's moments with those of sharded weights put together; `slots` in the order of `by_proxy`."""
    found = dict(state)
    for at, slot in enumerate(slots):
        if slot.part is not None and at in state:
            found[at] = {
                key: gathered(slot.part, slot.trained, value)[1] if per_entry(value, slot.proxy.numel()) else value
                for key, value in state[at].items()
            }
    return found


def scattered_moments(state: Mapping[int, Any], slots: Sequence[Slot], tensors: Mapping[str, Any]) -> dict[int, Any]:
    """The moments of the whole, cut to this rank's parts of sharded weights; those slots know their entries."""
    found = dict(state)
    for at, slot in enumerate(slots):
        if slot.part is None or at not in state:
            continue
        live, index = tensors[slot.name]["live"], tensors[slot.name]["index"]
        trained = index if live is None else index.index_select(0, live)
        found[at] = {
            key: scattered(slot.part, trained, value)[1] if per_entry(value, trained.numel()) else value
            for key, value in state[at].items()
        }
    return found
