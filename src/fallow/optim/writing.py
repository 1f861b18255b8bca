"""Writing a move into a weight: in place, without a matrix of the weight's size where the move needs none.

    W <- (1 - lr wd) W - lr ( P lift + source o along + dense )

A weight of float32 or float64 is moved where it lies. One of low precision is moved in float32, a block of columns at a
time, and rounded once; `rounding` says how:

    nearest      what is below half a step of the weight's own precision (2^-9 |w| in bfloat16) is lost
    stochastic   bfloat16: up or down, so that the mean over steps is exact (dithered, so a resumed run is the same)
    compensated  what rounding took is kept in a buffer of the same dtype and added to the next move (Kahan)

One that is kept in int8 (`core.stored_weight`, Q-GaLore's) is decoded, moved in float32 and coded again, each row with
its scale anew; "stochastic" rounds its codes up or down likewise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fallow.core.errors import ConfigError
from fallow.core.small_floats import to_bfloat16, uniform
from fallow.core.stored_weight import Store, of_parameter
from fallow.core.weight_codes import INT8
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


def check_stored(sites: Iterable[Site]) -> None:
    """ConfigError where a weight that is kept as a code would not be written by `move_weight`, or not well."""
    for site in sites:
        store = of_parameter(site.param)
        if store is None:
            continue
        if store.mode != "int8" or store.host is not None or store.index is not None:
            raise ConfigError(
                f"{site.name} is kept as {store.mode}, in which all of it cannot be trained; keep it in its own dtype, "
                "or as int8 on the device (fallow.QGaLore(model, weights='int8'))"
            )
        if site.rank is None or site.group["basis"].whole:
            raise ConfigError(f"{site.name} is kept as int8 and not projected; keep it in its own dtype")
        if site.group["rounding"] == "compensated":
            raise ConfigError(f"rounding='compensated' would keep {site.name} dense beside its int8; take 'stochastic'")


def begin_rounding(site: Site) -> None:
    """What `compensated` keeps: one number of the weight's dtype for each of its entries."""
    if site.group["rounding"] == "compensated" and site.param.dtype != site.work:
        site.state["lost"] = torch.zeros_like(site.data)


def move_weight(site: Site, move: Move, lr: Any, decay: Any) -> None:
    """Move W (d, n), or a plain tensor of any shape; the tensors of the move may be overwritten.

    `lr` may be a tensor on the weight's device; `decay` is the share of W that goes, lr wd.
    """
    if move.lift is not None:
        move.lift.mul_(lr)
    if move.along is not None:
        move.along = move.along * lr
    if move.dense is not None:
        move.dense.mul_(lr)
    if (store := of_parameter(site.param)) is not None:
        _move_stored(site, store, move, decay)
        return
    weight = site.data if site.plain else site.weight()
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


def _move_stored(site: Site, store: Store, move: Move, decay: Any) -> None:
    """Decode, move, code a block of rows at a time."""
    dense = store.dense(site.work)
    _move(site, site.matrix(dense), move, decay)
    matrix, parts = dense.view(store.matrix_shape), store.parts
    assert parts is not None
    height = max(1, BLOCK.get(dense.device.type, BLOCK_ON_ACCELERATOR) // matrix.shape[1])
    for start in range(0, matrix.shape[0], height):
        rows = slice(start, start + height)
        dither = None
        if site.group["rounding"] == "stochastic":
            dither = uniform(matrix[rows], site.state["age"] + site.index, start * matrix.shape[1])
        for name, part in INT8.encode(matrix[rows], dither).items():
            parts[name][rows] = part
    store.fingerprint = ""


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
