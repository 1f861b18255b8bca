"""PEFT's directories: adapter_config.json and adapter_model.safetensors, one for each part of the pipeline.

An adapter of one part is the directory itself; of several, a directory of such directories with the names of the parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fallow.catalogue import methods
from fallow.core.errors import AdapterError, nearest
from fallow.core.files import write_json, write_tensors
from fallow.core.sparse import CONFIG, WEIGHTS
from fallow.recipes.adapter_directory import (
    PARTS,
    PEFT_USE,
    PREFIX,
    card,
    new_directory,
    noted,
    noted_in,
    opened,
    read_config,
)
from fallow.recipes.formats.layers import Adapter, Dense, Factors, Layer, finite, part_of, plain, prefixed
from fallow.recipes.formats.patterns import settings
from fallow.recipes.formats.single_file import alpha_rule, split

# Settings of LoRA under which the file is not all that changes, or changes other things than weights of layers.
REFUSED = {
    "bias": ("none", "trained biases"),
    "lora_bias": (False, "trained biases"),
    "modules_to_save": (None, "modules that were trained whole"),
    "layer_replication": (None, "layers that were doubled"),
    "target_parameters": (None, "parameters that are no layer's"),
    "trainable_token_indices": (None, "trained tokens"),
    "fan_in_fan_out": (False, "transposed weights"),
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that take what they give from the base


def parts_in(folder: Path) -> list[str]:
    """The parts of a directory that holds one PEFT directory for each; [] where it is none such."""
    return [part for part in PARTS if (folder / part / CONFIG).is_file() and (folder / part / WEIGHTS).is_file()]


def read(folder: Path, part: str | None = None) -> Adapter:
    """A PEFT LoRA directory, or one of several. `part`: what it changes, where its names do not tell.

    Raises AdapterError where it is broken, of another method, or holds what no other format has a place for.
    """
    if not (folder / CONFIG).is_file() and (held := parts_in(folder)):
        found = [read(folder / one, one) for one in held]
        return Adapter(
            "peft",
            {part: layers for one in found for part, layers in one.parts.items()},
            {part: base for one in found for part, base in one.base.items()},
            found[0].notes,
            found[0].foreign,
        )
    config = read_config(folder)
    kind = config.get("peft_type")
    if kind == "FALLOW":
        raise AdapterError(_of_ours(folder, str(config.get("method"))))
    if kind != "LORA":
        raise AdapterError(
            f"{folder} is PEFT's {kind}; only its LORA, VERA, RANDLORA, MISS and SHIRA have another format: merge it "
            "instead"
        )
    for name, (usual, what) in REFUSED.items():
        value = config.get(name)
        if value not in (usual, None, False, [], {}):
            raise AdapterError(f"{folder} has {what} ({name}={value!r}), which other formats have no place for")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise AdapterError(
            f"{folder} began with init_lora_weights={start!r}, which changes the base too; save it with PEFT's "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    return _of_tensors(folder, config, part)


def _of_ours(folder: Path, method: str) -> str:
    """What is to be done with an adapter of Fallow's type where one of PEFT's own is wanted."""
    homes = {card.slug: card.home for card in methods() if card.ready and card.home}
    if method not in homes:
        return (
            f"{folder} is of method='{method}', which this Fallow does not know{nearest(method, homes)}; update Fallow"
        )
    if homes[method].startswith("fallow.selection."):
        return (
            f"{folder} holds entries of weights ({method}); fallow.to_sparse makes a sparse adapter of it, or merge it"
        )
    return f"{folder} is of Fallow's '{method}'; fallow adapter convert makes a LoRA of it, or merge it"


def _of_tensors(folder: Path, config: Mapping[str, Any], part: str | None) -> Adapter:
    file = folder / WEIGHTS
    roles: dict[str, dict[str, Tensor]] = {}
    with opened(file) as found:
        metadata = dict(found.metadata() or {})
        for key in found.keys():  # noqa: SIM118
            known = split(key)
            if known is None or known.role not in ("down", "up", "magnitude"):
                raise AdapterError(f"{file} holds '{key}', which other formats have no place for")
            layer = known.layer.removeprefix(PREFIX)
            roles.setdefault(layer, {})[known.role] = finite(key, found.get_tensor(key), file)
    alpha = alpha_rule(folder, config)
    layers: dict[str, Layer] = {}
    for layer, one in roles.items():
        if not {"down", "up"} <= one.keys() or one["up"].shape[1:2] != one["down"].shape[:1] or one["down"].ndim < 2:
            raise AdapterError(f"{file} is broken at '{layer}': it has no fitting pair of factors; copy it again")
        rank = one["down"].shape[0]
        magnitude = one.get("magnitude")
        layers[plain(f"{layer}.weight")] = Factors(
            one["down"], one["up"], alpha(layer, rank), None if magnitude is None else magnitude.flatten()
        )
    if not layers:
        raise AdapterError(f"{file} holds no tensor; train or copy it again")
    told = noted_in(file, metadata)
    part = part or part_of(layers)
    foreign = {name: value for name, value in metadata.items() if name not in ("format", "fallow")}
    base = {part: told["base"]} if isinstance(told.get("base"), dict) and told["base"] else {}
    notes = told.get("metadata", {})
    return Adapter("peft", {part: layers}, base, notes if isinstance(notes, dict) else {}, foreign)


def write(adapter: Adapter, folder: Path) -> Path:
    """Write an adapter as a PEFT directory, or as one for each part; AdapterError for changes that are no factors."""
    for part, name, layer in adapter.layers():
        if isinstance(layer, Dense):
            raise AdapterError(f"'{part}.{name}' has a full change, which PEFT's LoRA has no place for; give a rank")
    with new_directory(folder) as partial:
        single = len(adapter.parts) == 1
        for part, layers in adapter.parts.items():
            inner = partial if single else partial / part
            inner.mkdir(exist_ok=True)
            _write_part(inner, part, layers, adapter)
    return folder


def _write_part(folder: Path, part: str, layers: Mapping[str, Layer], adapter: Adapter) -> None:
    factors = {name.removesuffix(".weight"): one for name, one in layers.items() if isinstance(one, Factors)}
    dora = any(one.magnitude is not None for one in factors.values())
    if dora and any(one.magnitude is None for one in factors.values()):
        raise AdapterError(f"some layers of {part} have DoRA's magnitudes and some do not, which PEFT cannot say")
    encoder = part.startswith("text_encoder")
    told = settings({name: (f.rank, f.alpha) for name, f in factors.items()}, dora, anchored=not encoder)
    config = {**told, "bias": "none", "inference_mode": True, "task_type": None, "base_model_name_or_path": None}
    if part == "text_encoder_2" or (part == "text_encoder" and "text_encoder_3" in adapter.parts):
        # CLIP with a projection keeps the prefix in all versions of transformers; the settings above fit both
        factors = {prefixed(name): one for name, one in factors.items()}
    write_tensors(
        folder / WEIGHTS,
        {PREFIX + key: value for key, value in tensors(factors).items()},
        {**adapter.foreign, **noted(adapter.base.get(part, {}), adapter.notes)},
    )
    write_json(folder / CONFIG, config)
    use = PEFT_USE.replace("pipeline.unet", f"pipeline.{part}")
    (folder / "README.md").write_text(card("LoRA", adapter.notes, use), encoding="utf-8")


def tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """`<layer>.lora_A.weight`, `.lora_B.weight` and, for DoRA, `.lora_magnitude_vector`."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()  # the parts of a fused layer have one down, of which each gets a copy
    for layer, one in factors.items():
        place = one.down.data_ptr()
        found[f"{layer}.lora_A.weight"] = one.down.clone() if place in seen else one.down
        seen.add(place)
        ones = [1] * (one.down.ndim - 2)
        found[f"{layer}.lora_B.weight"] = one.up.view(*one.up.shape[:2], *ones)
        if one.magnitude is not None:
            shape = (1, -1, *ones) if ones else (-1,)
            found[f"{layer}.lora_magnitude_vector"] = one.magnitude.view(shape)
    return found


def told_settings(adapter: Adapter) -> str:
    """diffusers' `lora_adapter_metadata`: the settings of all parts in one JSON table."""
    told: dict[str, Any] = {}
    for part, layers in adapter.parts.items():
        factors = {name.removesuffix(".weight"): one for name, one in layers.items() if isinstance(one, Factors)}
        dora = any(one.magnitude is not None for one in factors.values())
        encoder = part.startswith("text_encoder")
        found = settings({name: (f.rank, f.alpha) for name, f in factors.items()}, dora, anchored=not encoder)
        told |= {f"{part}.{key}": value for key, value in found.items() if key != "peft_type"}
    return json.dumps(told, indent=2, sort_keys=True)
