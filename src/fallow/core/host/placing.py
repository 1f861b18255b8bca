"""Putting a prepared adapter into its model, and giving modules their own classes again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from fallow.core.accompany import accompany
from fallow.core.budgeting import Budget
from fallow.core.delta import Delta
from fallow.core.foreign_codes import is_coded
from fallow.core.gradients import watch
from fallow.core.host.holder import Prepared, Shared, root_of
from fallow.core.host.layer import Adapted, AdaptedReader, Adapters, adapted
from fallow.core.host.targets import Spot
from fallow.core.host.tied import Tied
from fallow.core.objective import Objective
from fallow.core.schedule import carry


def install(
    model: nn.Module,
    made: Prepared,
    every: Sequence[Spot],
    expect_gradients: bool = True,
    budget: Budget | None = None,
    objective: Objective | None = None,
) -> list[Delta]:
    """Put a prepared adapter into the model, inactive."""
    by_key = {spot.key: delta for spot, delta in made.deltas}
    changing = None if budget is None else budget.follow(by_key)  # which may refuse them, so before anything is changed
    found = root_of(model)
    if found is None:
        shared = Shared(model)
        for param in model.parameters():
            param.requires_grad_(False)
    else:
        shared = found[1]
    for spot, delta in made.deltas:
        site = _place(spot)
        site[made.name], site.scale[made.name] = delta, 1.0
        if made.method.mode != "output":
            for other in every:
                if other is not spot and other.parameter() is spot.parameter():
                    follow(other, site)
    shared.specs[made.name] = made.spec
    shared[made.name] = made.common
    shared.show(model)
    deltas = [delta for _, delta in made.deltas]
    accompany(by_key, made.spec.own_loss, objective)
    if changing is not None:
        carry(deltas[0], changing)
    watch(by_key, expect_gradients)
    return deltas


def _place(spot: Spot) -> Adapters:
    held = spot.layer._modules.get(spot.attribute)
    if isinstance(held, Adapters):
        return held
    view = spot.view()
    site = Adapters(spot.key, view)
    site.coded = is_coded(spot.parameter())
    _swap(spot)
    spot.layer.add_module(spot.attribute, site)
    return site


def follow(spot: Spot, leader: Adapters) -> None:
    """Let a module that shares the leader's weight run its Deltas; hidden, so that they are in the model once."""
    view = spot.view()
    _swap(spot)
    spot.layer.__dict__[spot.attribute] = Tied(leader, view)


def _swap(spot: Spot) -> None:
    layer = spot.layer
    if not isinstance(layer, Adapted | AdaptedReader):
        layer.__class__ = adapted(type(layer), spot.reader)
        if spot.reader:
            layer.__dict__["adapted_tensors"] = {}
    if spot.reader:
        cast("dict[str, str]", layer.adapted_tensors)[spot.tensor] = spot.attribute


def restore(model: nn.Module) -> None:
    """Give modules without a Delta their own class again."""
    for module in list(model.modules()):
        if not isinstance(module, Adapted | AdaptedReader):
            continue
        tensors = cast("dict[str, str]", module.__dict__.get("adapted_tensors", {"weight": "adapters"}))
        left = {}
        for tensor, attribute in tensors.items():
            held: Any = getattr(module, attribute)
            if len(held.leader if isinstance(held, Tied) else held):
                left[tensor] = attribute
            else:
                module.__dict__.pop(attribute, None)
                module._modules.pop(attribute, None)
        if isinstance(module, AdaptedReader):
            module.__dict__["adapted_tensors"] = left
        if not left:
            module.__dict__.pop("adapted_tensors", None)
            plain: Any = module.plain
            module.__class__ = plain
