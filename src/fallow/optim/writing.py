"""Writing a move into a weight: in place, without a matrix of the weight's size where the move needs none.

    W <- (1 - lr wd) W - lr ( P lift + source o along + dense )

A weight of float32 or float64 is moved where it lies. One of low precision is moved in float32, a block of columns at a
time, and rounded once; `rounding` says how:

    nearest      what is below half a step of the weight's own precision (2^-9 |w| in bfloat16) is lost
    stochastic   bfloat16: up or down, so that the mean over steps is exact (dithered, so a resumed run is the same)
    compensated  what rounding took is kept in a buffer of the same dtype and added to the next move (Kahan)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fallow.core.errors import ConfigError
from fallow.core.small_floats import to_bfloat16
from fallow.optim.residuals.residual import Move
from fallow.optim.site import Site

ROUNDINGS = ("nearest", "stochastic", "compensated")
BLOCK = {"cpu": 1 << 18}  # entries that are moved in float32 at once
BLOCK_ON_ACCELERATOR = 1 << 24


def check_rounding(rounding: str, params: list[Tensor]) -> None:
    """ConfigError where weights are of no kind that is moved, or cannot be rounded so."""
    if strange := [param.dtype for param in params if not param.is_floating_point()]:
        raise ConfigError(f"a parameter is {strange[0]}; only real floating-point ones are trained")
    if rounding == "stochastic" and any(param.dtype == torch.float16 for param in params):
        raise ConfigError("rounding='stochastic' is for bfloat16 weights, and some are float16; take 'compensated'")


def begin_rounding(site: Site) -> None:
    """What `compensated` keeps: one number of the weight's dtype for each of its entries."""
    if site.group["rounding"] == "compensated" and site.param.dtype != site.work:
        site.state["lost"] = torch.zeros_like(site.data)


def move_weight(site: Site, move: Move, lr: Any, decay: Any) -> None:
    """Move W (d, n), or a plain tensor of any shape; the tensors of the move may be overwritten.

    `lr` may be a tensor on the weight's device; `decay` is the share of W that goes, lr wd.
    """
    weight = site.data if site.plain else site.weight()
    if move.lift is not None:
        move.lift.mul_(lr)
    if move.along is not None:
        move.along = move.along * lr
    if move.dense is not None:
        move.dense.mul_(lr)
    if weight.dtype == site.work:
        _move(site, weight, move, decay)
        return
    lost = site.state.get("lost")
    kept = lost if lost is None or site.plain else site.matrix(lost)
    for columns, part in _blocks(site, weight, move):
        exact = weight[..., columns].to(site.work) if columns is not None else weight.to(site.work)
        held = None if kept is None else kept[..., columns] if columns is not None else kept
        if held is not None:
            exact = exact + held
        _move(site, exact, part, decay)
        own = weight[..., columns] if columns is not None else weight
        place = columns.start * (weight.shape[0] if weight.ndim > 1 else 1) if columns is not None else 0
        rounded_into(site, own, exact, held, place)


def rounded_into(site: Site, weight: Tensor, exact: Tensor, lost: Tensor | None, place: int) -> None:
    """Write a weight of low precision, or the part of one from `place` on, as its group says; `lost` keeps the rest."""
    stochastic = site.group["rounding"] == "stochastic" and weight.dtype == torch.bfloat16
    weight.copy_(to_bfloat16(exact, site.state["age"] + site.index, place) if stochastic else exact)
    if lost is not None:
        lost.copy_(exact - weight)


def _move(site: Site, weight: Tensor, move: Move, decay: Any) -> None:
    if isinstance(decay, Tensor) or decay:
        weight.mul_(1 - decay)
    if move.lift is not None:
        site.group["basis"].subtract(site, weight, move.lift)
    if isinstance(move.along, Tensor) and move.source is not None:
        weight.addcmul_(move.source, move.along, value=-1)
    elif isinstance(move.along, float) and move.source is not None:
        weight.add_(move.source, alpha=-move.along)
    if move.dense is not None:
        weight.sub_(move.dense)


def _blocks(site: Site, weight: Tensor, move: Move) -> Iterator[tuple[slice | None, Move]]:
    """Blocks of columns with their parts of the move; all at once where columns cannot be treated apart."""
    most = BLOCK.get(weight.device.type, BLOCK_ON_ACCELERATOR)
    apart = weight.ndim == 2 and (move.lift is None or site.group["basis"].columnwise)
    if not apart or weight.numel() <= most:
        yield None, move
        return
    width = max(1, most // weight.shape[0])
    for start in range(0, weight.shape[1], width):
        columns = slice(start, min(start + width, weight.shape[1]))
        along = move.along
        if isinstance(along, Tensor) and along.ndim:
            along = along[columns]
        lift, source, dense = (one if one is None else one[:, columns] for one in (move.lift, move.source, move.dense))
        yield columns, Move(lift, source, along, dense)
