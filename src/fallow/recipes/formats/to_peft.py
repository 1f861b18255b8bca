"""Our adapters as PEFT's own files of the same method: `fallow.to_peft(model, "style")`.

The way back of `from_peft`: tensors are the same numbers. What PEFT has another method for, or none, becomes a plain
LoRA by `fallow.to_lora`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fallow.core.errors import ConfigError
from fallow.core.fused import Fused
from fallow.core.held_deltas import Held, HeldAdapter, held_adapter
from fallow.core.views import ConvView, TransposedView
from fallow.deltas.dora import DoRA
from fallow.deltas.lora import LoRA
from fallow.deltas.randlora import RandLoRA, reordered
from fallow.recipes.adapter_directory import PREFIX
from fallow.recipes.formats.patterns import settings, whole
from fallow.recipes.formats.plain_lora import lora_tensors, refuse_for_lora, write_folder

Written = tuple[dict[str, Any], dict[str, Tensor]]


@torch.no_grad()
def to_peft(model: nn.Module, path: str | PathLike[str], adapter_name: str = "default") -> Path:
    """Write a LoRA, DoRA, VeRA, RandLoRA or Bone adapter of either host as PEFT's own; returns the folder.

    ConfigError for other methods, for options that PEFT's method does not have (named), and for layers that PEFT does
    otherwise; nothing is then written.
    """
    held = held_adapter(model, adapter_name)
    if held.method not in WRITERS:
        raise ConfigError(
            f"PEFT has no method like '{held.method}', as it has of {', '.join(WRITERS)}; fallow.to_lora writes a "
            "plain LoRA of it"
        )
    title, write = WRITERS[held.method]
    for one in held.deltas:
        refuse_for_lora(one, title)
        if isinstance(one.delta, Fused):
            raise ConfigError(f"'{one.key}' has a Delta for each projection, which PEFT has not; give fallow.to_lora")
        if held.method not in ("lora", "dora"):
            _refuse_other_layers(held.method, title, one)
    config, tensors = write(held)
    write_folder(Path(path), held, config, tensors, title, {"method": title.lower(), "from": held.method})
    return Path(path)


def _refuse_other_layers(method: str, title: str, one: Held) -> None:
    turned = isinstance(one.view, TransposedView) and method == "bone"
    if one.view.kind != "linear" or turned:
        raise ConfigError(f"'{one.key}' is a {type(one.layer).__name__}, for which PEFT has no {title}")


def _lora(held: HeldAdapter) -> Written:
    layers: dict[str, tuple[int, float]] = {}
    tensors: dict[str, Tensor] = {}
    deltas = [(one, cast(LoRA, one.delta)) for one in held.deltas]
    rs = all(delta.o.scaling == "rslora" for _, delta in deltas)
    for one, delta in deltas:
        rank = delta.A.shape[0]
        given = float(rank if delta.o.alpha is None else delta.o.alpha)
        # where some are scaled by alpha / sqrt(r) and some are not, alpha takes up the difference
        alpha = given if rs or delta.o.scaling == "standard" else given * math.sqrt(rank)
        b, a = delta.with_start(delta.B, delta.A)  # what a start took out of W is ranks more at the same scale
        more = a.shape[0] / rank
        layers[one.key] = a.shape[0], alpha * (math.sqrt(more) if rs else more)
        tensors |= lora_tensors(one, a, b)
        if isinstance(delta, DoRA):
            shape = (1, -1, *[1] * len(one.view.kernel[1:])) if isinstance(one.view, ConvView) else (-1,)
            tensors[f"{PREFIX}{one.key}.lora_magnitude_vector"] = delta.magnitude.reshape(shape)
    told = settings(layers, dora=held.method == "dora") | {"use_rslora": rs}
    return told | {"lora_dropout": float(getattr(deltas[0][1].o, "dropout", 0.0))}, tensors


def _vera(held: HeldAdapter) -> Written:
    o = _one_for_all(held, "VeRA", ("rank", "dropout", "d_initial", "save_projection"))
    tensors: dict[str, Tensor] = {}
    for one in held.deltas:
        tensors[f"{PREFIX}{one.key}.vera_lambda_b"] = cast(Tensor, one.delta.b)
        tensors[f"{PREFIX}{one.key}.vera_lambda_d"] = cast(Tensor, one.delta.d)
    if o.save_projection:
        tensors |= {f"base_model.vera_{name}": cast(Tensor, getattr(held.common, name)) for name in "AB"}
    told = {"r": o.rank, "vera_dropout": o.dropout, "d_initial": o.d_initial, "save_projection": o.save_projection}
    return {"peft_type": "VERA"} | told | {"projection_prng_key": held.seed}, tensors


def _randlora(held: HeldAdapter) -> Written:
    o = _one_for_all(held, "RandLoRA", ("rank", "alpha", "scaling", "pairing", "dropout", "zeros"))
    deltas = [(one, cast(RandLoRA, one.delta)) for one in held.deltas]
    counts = {delta.bases for _, delta in deltas}
    if len(counts) > 1 and (o.pairing != "peft" or o.scaling != "peft"):
        raise ConfigError(
            f"layers of {sorted(counts)} bases are scaled and paired otherwise in PEFT's RandLoRA; train with "
            "scaling='peft', pairing='peft', or give fallow.to_lora"
        )
    tensors: dict[str, Tensor] = {}
    for one, delta in deltas:
        tensors[f"{PREFIX}{one.key}.randlora_lambda"] = delta.lambda_.mT
        tensors[f"{PREFIX}{one.key}.randlora_gamma"] = delta.gamma
    first, rank = deltas[0][1], int(o.rank)
    a, b = (first.shared(name) for name in first.names)
    if o.pairing != "peft":
        b = reordered(b[:, : first.columns], first.bases, rank)
    # PEFT's bases are as large as a layer of the most outputs and the most inputs, which there may not be
    outputs, inputs = (max(one.view.shape[side] for one in held.deltas) for side in (0, 1))
    small, large = min(outputs, inputs), max(outputs, inputs)
    tensors["base_model.randlora_A"] = _padded(a, rank, small).unsqueeze(1)
    tensors["base_model.randlora_B"] = _padded(b, large, -(-small // rank) * rank).unflatten(1, (-1, rank))
    told = {"r": rank, "randlora_alpha": whole(first.scale * rank), "randlora_dropout": o.dropout}
    return {"peft_type": "RANDLORA"} | told | {"projection_prng_key": held.seed, "save_projection": True}, tensors


def _miss(held: HeldAdapter) -> Written:
    o = _one_for_all(held, "MiSS", ("rank", "kind", "mini_rank", "group", "dropout"))
    if o.kind == "bat" and o.group == "in":
        raise ConfigError("group='in' of kind='bat' is not in PEFT's MiSS; give fallow.to_lora with a rank")
    tensors: dict[str, Tensor] = {}
    for one in held.deltas:
        if o.rank > one.view.shape[1]:
            raise ConfigError(f"rank={o.rank} is above the inputs of '{one.key}', which PEFT's MiSS refuses")
        tensor = one.delta.blocks if o.kind == "bat" else one.delta.shared_block
        tensors[f"{PREFIX}{one.key}.miss_block"] = cast(Tensor, tensor)
    start = {"miss": True, "mini": "mini", "bat": "bat"}[o.kind]
    told = {"r": o.rank, "miss_dropout": o.dropout, "init_weights": start}
    return {"peft_type": "MISS"} | told | ({"mini_r": o.mini_rank} if o.kind == "mini" else {}), tensors


WRITERS: dict[str, tuple[str, Callable[[HeldAdapter], Written]]] = {
    "lora": ("LoRA", _lora),
    "dora": ("DoRA", _lora),
    "vera": ("VeRA", _vera),
    "randlora": ("RandLoRA", _randlora),
    "bone": ("MiSS", _miss),
}


def _one_for_all(held: HeldAdapter, title: str, names: tuple[str, ...]) -> Any:
    """The options, which PEFT's method has for all layers together."""
    first = held.deltas[0].delta.o
    for one in held.deltas:
        for name in names:
            if getattr(one.delta.o, name) != getattr(first, name):
                raise ConfigError(
                    f"'{one.key}' has {name}={getattr(one.delta.o, name)!r} and '{held.deltas[0].key}' "
                    f"{getattr(first, name)!r}; PEFT's {title} has one for all layers: give fallow.to_lora"
                )
    return first


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The leading part of this size; what is not there is zero, and of no layer."""
    made = matrix.new_zeros(rows, columns)
    part = matrix[:rows, :columns]
    made[: part.shape[0], : part.shape[1]] = part
    return made
