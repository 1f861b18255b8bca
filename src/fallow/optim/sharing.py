"""Weights of which each rank holds a slice (FSDP2): what is computed where, and how states are saved.

    W (out, in) sharded along out      G_i (n_i, d) here, d = in:      R_i = Pᵀ G_iᵀ (r, n_i), moments, W_i: local
    choosing P (d, r)                  sums over ranks of products (d, r), or of Gram matrices; P is the same on each
    Fira, APOLLO                       one number a matrix and step is summed, for the limiter

So a step sends nothing but that number, and the sharded side is never the projected one: matrices that are wider than
high are projected on their long side, which holds as much of a gradient at equal rank. basis="svd" is by the Gram
matrix then; "entries" are drawn on each rank among its own.

In `state_dict()` what follows the slices are DTensors, so that torch.distributed.checkpoint saves and reshards them;
states of 8 or 4 bits are decoded for it and encoded again, to the same codes but for the rounding of their scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fallow.core.errors import ConfigError
from fallow.core.sharded import local, part_of
from fallow.optim import moments
from fallow.optim.site import Site

DENSE = ("held", "lost")  # states of the parameter's own shape


def check_sharded(group: Mapping[str, Any]) -> None:
    """ConfigError where a group has sharded weights and a part that needs all of a gradient on one rank."""
    if all(part_of(param) is None for param in group["params"]):
        return
    inner = group["plain_inner"] or group["inner"]
    for what, part in (("basis", group["basis"]), ("inner", group["inner"]), ("inner", inner)):
        if not part.shares:
            raise ConfigError(
                f"{what}='{part.name}' needs whole gradients, and weights are sharded; take another, such as "
                f"{'warm' if what == 'basis' else 'adamw'}"
            )


def saved_state(site: Site) -> dict[str, Any]:
    """What is saved of a sharded site: what follows its slices as DTensors, all else as it is."""
    part, state = site.part, site.state
    assert part is not None
    projected = site.active
    shapes = site.inner.shapes(site.shape) if state and (site.rank is None or projected or state.get("active")) else {}
    coded = {key + end for key in shapes for end in ("", "_code", "_scale")}
    found = {key: value for key, value in state.items() if key not in coded and key not in DENSE}
    for key, shape in shapes.items():
        whole = (*shape[:-1], site.whole_n) if projected else tuple(site.param.shape)
        held = state[key] if key in state else moments.read(site, key)
        found[key] = _shared(site, held, whole, len(shape) - 1 if projected else part.dim)
    for key in DENSE:
        if key in state:
            found[key] = _shared(site, state[key], tuple(site.param.shape), part.dim)
    return found


def restore(site: Site, saved: Mapping[str, Any]) -> None:
    """Put back what `saved_state` gave, or torch.distributed.checkpoint has loaded into it."""
    state = site.state
    state.clear()
    state.update((key, local(value).clone() if isinstance(value, Tensor) else value) for key, value in saved.items())
    if site.rank is None or site.active or state.get("active"):
        values = {key: state.pop(key) for key in site.inner.shapes(site.shape) if key in state}
        moments.begin_inner(site)
        for key, value in values.items():
            moments.write(site, key, value)


def _shared(site: Site, held: Tensor, whole: tuple[int, ...], dim: int) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    param: Any = site.param
    placements = [Shard(dim) if one.is_shard() else one for one in param.placements]
    mesh, strides = param.device_mesh, torch.empty(whole, device="meta").stride()
    return DTensor.from_local(held, mesh, placements, run_check=False, shape=torch.Size(whole), stride=strides)
