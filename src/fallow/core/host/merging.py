"""Writing adapters into the weights, and the base back, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fallow.core.errors import ConfigError, ModelError
from fallow.core.host.holder import needed, refuse_sharded
from fallow.core.host.layer import Adapters, sites, weight_at
from fallow.core.sharded import is_dtensor


@torch.no_grad()
def merge(model: nn.Module, *names: str) -> None:
    """Write these adapters, or all active ones, into the weights, in their order, beside those merged before.

    While some are merged no others act. The base of the adapted weights is kept for `unmerge`; `detach` after it
    leaves a plain model with the merged weights. Computed in float32 at least, rounded once. ConfigError for a method
    that cannot merge, ModelError for weights that are quantised or sharded and for a result that is not finite; the
    model is then as it was.
    """
    needed(model, *names)
    refuse_sharded(model, "merge")
    held = list(sites(model))
    before = {name: None for _, site in held for name in site.merged}
    asked = names or tuple({name: None for _, site in held for name in site.active})
    added = [name for name in asked if name not in before]
    if not added:
        raise ConfigError(f"merge: {', '.join(map(repr, asked)) or 'no adapter'} is not active or merged already")
    order = [*before, *added]
    for module, site in held:
        weight = weight_at(module, site)
        for delta, _ in site.named(order):
            if not delta.mergeable:
                raise ConfigError(
                    f"'{delta.name}' at '{site.key}' acts on the layer's input and output and cannot be merged; keep "
                    "it unmerged, or merge others by their names"
                )
        if type(weight.data) is not Tensor or not weight.is_floating_point():
            raise ModelError(
                f"'{site.key}' is quantised ({type(weight.data).__name__}); merge on a base in float32, bf16 or fp16"
            )
    try:
        for module, site in held:
            _write(weight_at(module, site), site, order)
    except ModelError:
        unmerge(model)
        if before:
            for module, site in held:
                _write(weight_at(module, site), site, list(before))
        raise


def _write(weight: Tensor, site: Adapters, order: list[str]) -> None:
    base = weight.detach().clone() if site.kept is None else site.kept
    acting = site.named(order)
    if acting:
        changed = site.changed(base, acting)
        if not bool(torch.isfinite(changed).all()):
            raise ModelError(
                f"merging {', '.join(map(repr, order))} makes the weight of '{site.key}' NaN or infinite in "
                f"{weight.dtype}; its training has failed, or the base has to be in float32"
            )
        site.kept = base
        weight.copy_(changed)
    site.merged = order
    site.refresh()


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Write the base back, bit for bit; the active adapters act again. Nothing happens where none is merged."""
    needed(model)
    for module, site in sites(model):
        weight = weight_at(module, site)
        if site.kept is not None:
            if is_dtensor(weight):
                raise ModelError(f"'{site.key}' was sharded while it was merged; unmerge before fully_shard")
            weight.copy_(site.kept)
        site.kept, site.merged = None, []
        site.refresh()
