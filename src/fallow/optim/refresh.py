"""When a basis is chosen anew, and what becomes of the moments that live in the old one.

t       the group's steps before this one: 0, 1, 2, ...
due     a site is due when t >= its `due`, 0 at first; afterwards the next multiple of its gap, shifted by the site's
        offset, so a site that missed a refresh (no gradient, or a zero one) is refreshed at its next gradient
stagger offsets spread over the gap, so that no step pays for all; at the first step all are chosen
lazy    where the new space holds at least this share of the old one, the site's gap doubles (Q-GaLore,
        arXiv 2407.08296, whose cosine of single vectors an SVD's sign flips; ||P_oldᵀ P_new||_F² / r has no sign)
moments keep    as they are, on the new axes (GaLore)
        rotate  M <- Q M, V <- (Q o Q) V with Q = P_newᵀ P_old (LDAdam, DCT-AdamW)
        reset   zero, and bias correction starts again (FRUGAL)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fallow.core.errors import TrainingError
from fallow.optim import moments
from fallow.optim.site import Site

MOMENTS = ("keep", "rotate", "reset")
SEED_STRIDE = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9)  # odd numbers that keep the seeds of sites and steps apart


def due(site: Site, step: int) -> bool:
    """Whether the site's basis is to be chosen in this step."""
    return bool(site.rank) and step >= site.state["due"]


def looks(group: Mapping[str, Any]) -> bool:
    """Whether the gradient is to be looked at before a basis is chosen by it, which waits for the device.

    A fixed basis that is chosen in every step keeps its choice by itself where a gradient is zero.
    """
    basis = group["basis"]
    return basis.decomposes or (basis.follows and group["refresh_every"] > 1)


def seed_of(site: Site, step: int) -> int:
    """The seed of a choice, the same on every device and after a resume."""
    mixed = site.group["seed"] + SEED_STRIDE[0] * (site.index + 1) + SEED_STRIDE[1] * (step + 1)
    return mixed % (1 << 63)


def usable(sites: Sequence[Site], gradients: Sequence[Tensor]) -> list[bool]:
    """Which gradients are not zero. TrainingError, before anything has changed, where one is not finite.

    One wait for the device, for all sites of the step that are due.
    """
    if not sites:
        return []
    device = sites[0].param.device
    norms = torch.stack([_largest(one).to(device) for one in gradients])
    if group := next((site.part.group for site in sites if site.part is not None), None):
        dist.all_reduce(norms, dist.ReduceOp.MAX, group=group)
    sizes = norms.tolist()
    for site, size in zip(sites, sizes, strict=True):
        if not size < float("inf"):
            raise TrainingError(
                f"the gradient of {site.name} {tuple(site.param.shape)} has NaN or infinite entries, of which no basis "
                "can be made; nothing was changed. Clip or skip such steps (GradScaler does), or lower lr"
            )
    return [size > 0 for size in sizes]


def _largest(gradient: Tensor) -> Tensor:
    """0-dim float32: the largest magnitude, infinite where one is no number; 0 of no entries."""
    if not gradient.numel():
        return torch.zeros((), device=gradient.device)
    size = torch.linalg.vector_norm(gradient, float("inf")).float()
    return torch.where(size.isfinite(), size, float("inf"))


def refresh(sites: Sequence[Site], gradients: Sequence[Tensor], group: Mapping[str, Any], step: int) -> None:
    """Choose the bases of sites of one shape, and carry the moments over."""
    basis = group["basis"]
    turns = basis.choose(sites, gradients, [seed_of(site, step) for site in sites])
    for site, turn in zip(sites, turns, strict=True):
        state = site.state
        if turn is not None:
            if group["moments"] == "reset":
                moments.zero(site)
                state["age"] = 0
                group["residual"].restart(site)
            elif group["moments"] == "rotate":
                _rotate(site, turn)
            if group["lazy"] is not None and float(basis.overlap(turn)) >= group["lazy"]:
                state["gap"] *= 2
        state["chosen"] = True
        state["due"] = _next(site, step)


def _next(site: Site, step: int) -> int:
    gap, offset = site.state["gap"], site.state["offset"]
    return step + gap - (step - offset) % gap


def _rotate(site: Site, turn: Any) -> None:
    basis, inner = site.group["basis"], site.inner
    for key in inner.shapes(site.shape):
        if inner.turns(key):
            moments.write(site, key, basis.turn(turn, moments.read(site, key), inner.powers[key]))
