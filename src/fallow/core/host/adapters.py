"""Adding adapters to a model, switching them, taking them off."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fallow.core.accompany import Penalty, penalty_of
from fallow.core.budgeting import Budget, budget_of
from fallow.core.delta import Delta, method_of
from fallow.core.errors import ConfigError, nearest
from fallow.core.host.holder import (
    needed,
    prepare,
    refuse_merged,
    refuse_sharded,
    root_of,
    spec_of,
)
from fallow.core.host.layer import BASE, Adapters, sites, weight_at
from fallow.core.host.placing import install, restore
from fallow.core.host.targets import Targets, choose, in_blocks, spots, with_patterns
from fallow.core.objective import Told
from fallow.core.starting import Start, start_of


def attach(
    model: nn.Module,
    method: str | type[Delta],
    targets: Targets = "all-linear",
    name: str = "default",
    *,
    exclude: Targets | None = None,
    patterns: Mapping[str, Mapping[str, Any]] | None = None,
    fused: Mapping[str, int | list[int]] | None = None,
    start: Start | str | None = None,
    budget: Budget | str | None = None,
    objective: Told | None = None,
    seed: int = 0,
    own_loss: Penalty = "step",
    expect_gradients: bool = True,
    **options: Any,
) -> nn.Module:
    """Add an adapter to a model, in place, and make it the only active one; returns the model.

    `method`: a name such as "lora", or a Delta class; `options`: its own. `targets`: "all-linear" (every linear layer
    and the projections of attention, without the output layer of a language model); "all-layers" (convolutions,
    embeddings and stacks of experts too); names of modules or their last parts; or a regular expression that matches
    whole names. A Parameter that its module reads itself has its own path: "encoder.attention.in_proj_weight".
    `exclude`: of these, in the same way. `patterns`: {regular expression: {option: value}}, for layers that differ.
    `fused`: {regular expression: number of equal row blocks, or their sizes}, for weights that hold several
    projections: each gets a Delta of its own, as each matrix of a stack of experts does by itself.
    `start`: what the factors are at first, see `fallow.core.starting`; None for the method's own. `budget`: which layer
    gets how much of the rank, and when, see `fallow.core.budgeting`. `objective`: a penalty of the weights that
    training adds, see `fallow.core.objective`. All three are objects, or names where no data is needed.
    `seed`: of frozen random tensors; trained ones start from torch's global generator. `own_loss`: see
    `fallow.core.accompany`. `expect_gradients`: whether the first optimizer step refuses adapted weights that have no
    gradient; see `fallow.core.gradients`.

    The first adapter freezes what the model has. A weight that several modules share is adapted once, in all of them.
    ConfigError, ModelError for what cannot be; the model is then as it was.
    """
    kind = method_of(method)
    first, shares, term = start_of(start), budget_of(budget), penalty_of(objective)
    spec = spec_of(kind, options, seed, own_loss, {"start": first, "budget": shares, "objective": term})
    every = spots(model)
    planned = with_patterns(choose(model, every, kind, targets, exclude), options, patterns)
    blocks = in_blocks([spot for spot, _ in planned], fused)
    made = prepare(model, kind, planned, every, name, spec, True, blocks, first, shares)
    install(model, made, every, expect_gradients, shares, term)
    finish(model, name)
    return model


def finish(model: nn.Module, name: str) -> None:
    """What is left to do once an adapter is in: it is the active one, and nothing passes its layers by."""
    take_slow_path(model)
    activate(model, name)


def detach(model: nn.Module, *names: str) -> nn.Module:
    """Take these adapters off, or all; returns the model. Without any it has its own classes and is trainable again.

    What was merged stays in the weights. ConfigError for one of several that is merged.
    """
    root, shared = needed(model, *names)
    refuse_sharded(model, "detach")
    gone = names or tuple(shared.specs)
    if set(gone) != set(shared.specs):
        refuse_merged(model, "detach")
    for _, site in sites(model):
        for name in [name for name in gone if name in site]:
            del site[name], site.scale[name]
        site.active = [name for name in site.active if name not in gone]
        site.refresh()
    for name in gone:
        del shared.specs[name], shared[name]
    restore(root)
    shared.show(root)
    if not shared.specs:
        shared.hide(root)
        take_slow_path(root)
        before = set(shared.trained_before)
        for name, param in root.named_parameters():
            param.requires_grad_(name in before)
    return model


def activate(model: nn.Module, *names: str) -> None:
    """Let these adapters act, in this order, and train them; without a name none acts."""
    _, shared = needed(model, *names)
    refuse_merged(model, "activate")
    for _, site in sites(model):
        site.active = [name for name in names if name in site]
        site.refresh()
        for name, delta in site.items():
            delta.requires_grad_(name in names)
    for name, common in shared.items():
        common.requires_grad_(name in names)


def set_scale(model: nn.Module, scale: float, name: str = "default") -> None:
    """Let an adapter's change count `scale` times; 0 is off, 1 as trained."""
    needed(model, name)
    refuse_merged(model, "set_scale")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ConfigError(f"scale={scale!r} of '{name}' must be a finite number; 0 is off, 1 as trained")
    for _, site in sites(model):
        if name in site:
            site.scale[name] = float(scale)
            site.refresh()


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the model is the base, bit for bit, also where adapters are merged."""
    needed(model)
    if any(site.off for _, site in sites(model)):
        yield
        return
    shown = []
    with torch.no_grad():
        for module, site in sites(model):
            if site.kept is not None:
                weight = weight_at(module, site)
                shown.append((weight, weight.detach().clone()))
                weight.copy_(site.kept)
            site.off = True
            site.refresh()
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, merged in shown:
                weight.copy_(merged)
        for _, site in sites(model):
            site.off = False
            site.refresh()


@contextmanager
def mixed(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within the block each sample of a batch has the adapter of its name; "__base__" is none.

    Layers must be given the samples as their first dimension, one row each.
    """
    _, shared = needed(model)
    refuse_merged(model, "mixed")
    for name in names:
        if name != BASE and name not in shared.specs:
            raise ConfigError(f"there is no adapter '{name}'{nearest(name, [*shared.specs, BASE])}")
    held: list[Adapters] = [site for _, site in sites(model)]
    before = [site.rows for site in held]
    try:
        for site in held:
            site.rows = list(names)
        yield
    finally:
        for site, rows in zip(held, before, strict=True):
            site.rows = rows


def _as_it_is(module: nn.Module, args: Any) -> None:
    """A hook whose presence keeps torch's encoder from reading the weights of its layers past them."""


def take_slow_path(model: nn.Module) -> None:
    """Keep torch's transformer encoder, in inference, from computing with the bare weights of adapted layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is _as_it_is]:
                del hooks[key]
            if root_of(model) is not None and next(sites(module), None) is not None:
                module.register_forward_pre_hook(_as_it_is)
        elif isinstance(module, nn.TransformerEncoder):  # nested tensors are for the fast path alone
            module.use_nested_tensor = module.enable_nested_tensor and next(sites(module), None) is None
