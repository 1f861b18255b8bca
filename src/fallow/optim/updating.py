"""The steps of an update of a low-rank optimizer, over sites that are treated alike.

choosing    which bases are to be chosen
look        G, or what the residual rule makes of it; bases are chosen by it where that is due
project     R = Pᵀ G
move        N = inner(R), and W by what the residual rule says
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from fallow.optim import moments, refresh
from fallow.optim.residuals.residual import Move
from fallow.optim.site import Site
from fallow.optim.writing import begin_rounding, move_weight

TOGETHER = {"cpu": 1 << 20}  # entries of gradients that are treated together: what stays in a core's cache
TOGETHER_ON_ACCELERATOR = 1 << 22  # there launches cost more than memory
Matrices = dict[int, Tensor]  # by the index of the site


def begin(site: Site) -> None:
    """Make everything that is kept for a site, of its final shapes."""
    group, state = site.group, site.state
    state["age"] = 0
    begin_rounding(site)
    if site.rank is None or site.active:
        moments.begin_inner(site)
    if site.rank is None:
        return
    every = group["refresh_every"]
    offset = site.place * every // site.peers if group["stagger"] else 0
    state.update(chosen=False, due=0, gap=every, offset=offset)
    if site.rank:
        group["basis"].begin(site)
        group["residual"].begin(site)


def together(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Sites that are treated alike, of one dtype and device, projected ones of one shape; as many at a time as is worth
    while.
    """
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        shape = (site.d, site.n, site.rank, site.flipped) if site.rank is not None else type(site.inner)
        holders = site.part and id(site.part.group)
        groups.setdefault((shape, holders, site.param.dtype, site.param.device), []).append(site)
    for (_, _, _, device), group in groups.items():
        most, part, taken = TOGETHER.get(device.type, TOGETHER_ON_ACCELERATOR), list[Site](), 0
        for site in group:
            if part and taken + site.param.numel() > most:
                yield part
                part, taken = [], 0
            part.append(site)
            taken += site.param.numel()
        yield part


def choosing(sites: Sequence[Site]) -> set[int]:
    """The indices of the sites whose basis is chosen in this step."""
    waiting = [site for site in sites if site.rank is not None and refresh.due(site, site.group["steps"])]
    looking = [site for site in waiting if refresh.looks(site.group)]
    found = refresh.usable(looking, [site.gradient() for site in looking])
    zero = {site.index for site, good in zip(looking, found, strict=True) if not good}
    return {site.index for site in waiting} - zero


def look(sites: Sequence[Site], group: Mapping[str, Any], chosen: set[int]) -> Matrices:
    """What is projected for each site of one shape; the bases of `chosen` ones are chosen by it first."""
    seen = {site.index: group["residual"].incoming(site, site.gradient()) for site in sites}
    if due := [site for site in sites if site.index in chosen]:
        refresh.refresh(due, [seen[site.index] for site in due], group, group["steps"])
    return seen


def project(sites: Sequence[Site], seen: Matrices) -> Matrices:
    """R of the sites whose basis holds anything."""
    return {site.index: site.group["basis"].project(site, seen[site.index]) for site in sites if site.active}


def move(sites: Sequence[Site], seen: Matrices, projected: Matrices, group: Mapping[str, Any]) -> None:
    """Move the weights of sites of one shape; `seen` may be empty where the residual rule looks at R alone."""
    basis, inner, residual = group["basis"], group["inner"], group["residual"]
    inside = [site for site in sites if site.active]
    for site in inside:
        site.state["age"] += 1
    within = [projected[site.index] for site in inside]
    directions = inner.directions(inside, within, group) if inside else []
    lr, decay = group["lr"], group["lr"] * group["weight_decay"]
    for site, r, direction in zip(inside, within, directions, strict=True):
        correction = inner.correction(site.state["age"], group)
        # of a rule that does not look at G, R stands in for it
        told = residual.move(site, basis, seen.get(site.index, r), r, direction, correction)
        move_weight(site, told, lr, decay)
    for site in sites:
        if not (site.active or site.plain):
            move_weight(site, residual.alone(site, seen[site.index]), lr, decay)


def move_plain(sites: Sequence[Site], group: Mapping[str, Any]) -> None:
    """Tensors that take the inner rule as it is, those of an active block at the projected ones' rate."""
    factor = group["plain_scale"] if sites[0].rank is None else group["scale"]
    lr, inner = group["lr"] * factor, sites[0].inner
    options = {**group, "lr": lr, "weight_decay": group["weight_decay"] / factor if factor else 0.0}
    for site in sites:
        site.state["age"] += 1
    left = inner.step(sites, options) if factor else sites
    gradients = [site.grad.to(site.work) for site in left]
    directions = inner.directions(left, gradients, options) if left else []
    for site, direction in zip(left, directions, strict=True):
        move_weight(site, Move(dense=direction), lr, group["lr"] * group["weight_decay"])
