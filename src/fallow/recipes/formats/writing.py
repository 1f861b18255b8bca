"""Writing an adapter as one safetensors file of diffusers, kohya or LyCORIS."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fallow.core.errors import AdapterError
from fallow.core.files import write_tensors
from fallow.recipes.adapter_directory import NETWORKS, VERSION
from fallow.recipes.formats import fused, names, peft
from fallow.recipes.formats.layers import Adapter, Dense, Factors, Layer, Layers, prefixed
from fallow.recipes.formats.single_file import LORA_METADATA

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
STALE = ("sshs_model_hash", "sshs_legacy_hash")  # of the tensors of the file that this one comes from


def write(adapter: Adapter, format: str, file: Path) -> Path:
    """Write `file`. AdapterError where the format has no place for something in the adapter."""
    if format == "diffusers":
        tensors = _diffusers(adapter)
    elif format == "lycoris-diff":
        tensors = _flat(adapter, "kohya", dense=True)
    else:
        tensors = _flat(adapter, format, dense=False)
    metadata = _metadata(adapter)
    if format == "diffusers":
        metadata[LORA_METADATA] = peft.told_settings(adapter)
    write_tensors(file, tensors, metadata)
    return file


def _metadata(adapter: Adapter) -> dict[str, str]:
    main = next((part for part in adapter.parts if part in NETWORKS), None)
    told: dict[str, Any] = {"version": VERSION, "base": adapter.base.get(main or "", {}), "metadata": adapter.notes}
    others = {part: base for part, base in adapter.base.items() if part != main and base}
    if others:
        told["parts"] = others
    kept = {name: value for name, value in adapter.foreign.items() if name not in STALE}
    return {**kept, "format": "pt", "fallow": json.dumps(told)}


def _diffusers(adapter: Adapter) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part, layers in adapter.parts.items():
        factors = {name.removesuffix(".weight"): _factors(part, name, one, "diffusers") for name, one in layers.items()}
        if part.startswith("text_encoder"):
            factors = {prefixed(name): one for name, one in factors.items()}
        tensors |= {f"{part}.{key}": value for key, value in peft.tensors(factors).items()}
    return tensors


def _factors(part: str, name: str, layer: Layer, format: str) -> Factors:
    if isinstance(layer, Dense):
        raise AdapterError(
            f"'{part}.{name}' has a full change, and {format} holds factors; give a rank or an energy, which makes them"
        )
    return layer


# -- kohya and LyCORIS -----------------------------------------------------------------------------------------------


def _flat(adapter: Adapter, format: str, *, dense: bool) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part, layers in adapter.parts.items():
        if part in NETWORKS:
            layers, prefix = _original(layers, format) if not dense else layers, "lora_unet_"
        else:
            layers, prefix = {f"{prefixed(name)}": one for name, one in layers.items()}, _encoder(adapter, part)
        for name, layer in layers.items():
            tensors |= _dense(prefix, part, name, layer) if dense else _pair(prefix, part, name, layer, format)
    return tensors


def _encoder(adapter: Adapter, part: str) -> str:
    """kohya's prefix of a text encoder: te where there is one, te1 and te2 where the model has two."""
    network = next((layers for one, layers in adapter.parts.items() if one in NETWORKS), {})
    if part == "text_encoder":
        # a second transformer block in one attention is SDXL's, and SD 1 and 2 are UNets
        several = "text_encoder_2" in adapter.parts or "transformer" in adapter.parts
        several |= any(".transformer_blocks.1." in name for name in network)
        return "lora_te1_" if several else "lora_te_"
    if part == "text_encoder_2" and "transformer" in adapter.parts and fused.is_flux(network):
        return "lora_te3_"  # T5, which kohya numbers as in Stable Diffusion 3
    return f"lora_te{part[-1]}_"


def _pair(prefix: str, part: str, name: str, layer: Layer, format: str) -> dict[str, Tensor]:
    one = _factors(part, name, layer, format)
    place = prefix + name.removesuffix(".weight").replace(".", "_")
    alpha = torch.tensor(one.alpha, dtype=torch.float64)
    exact = alpha.to(one.down.dtype)
    found = {
        f"{place}.lora_down.weight": one.down,
        f"{place}.lora_up.weight": one.up.view(*one.up.shape[:2], *[1] * (one.down.ndim - 2)),
        f"{place}.alpha": exact if float(exact) == one.alpha else alpha.float(),
    }
    if one.magnitude is not None:
        found[f"{place}.dora_scale"] = one.magnitude.view(-1, *[1] * (one.down.ndim - 1))
    return found


def _dense(prefix: str, part: str, name: str, layer: Layer) -> dict[str, Tensor]:
    """A change in full. What LyCORIS calls it depends on whether the layer is a normalisation."""
    if isinstance(layer, Factors):
        if layer.magnitude is not None:
            raise AdapterError(f"'{part}.{name}' is DoRA, whose change depends on the base; merge it instead")
        change = layer.change()
    else:
        change = layer.read()
    place, _, role = name.rpartition(".")
    if role not in ("weight", "bias"):
        raise AdapterError(f"'{part}.{name}' is no weight or bias of a layer, and LyCORIS has no place for it")
    norm = "norm" in place.rsplit(".", 1)[-1] and change.ndim == 1
    key = {"weight": "w_norm", "bias": "b_norm"}[role] if norm else {"weight": "diff", "bias": "diff_b"}[role]
    return {f"{prefix}{place.replace('.', '_')}.{key}": change}


def _original(layers: Layers, format: str) -> Layers:
    """The layers of a network under the names that kohya's trainer has for them."""
    if format == "kohya-ldm":
        return _ldm(layers)
    if fused.is_flux(layers) or all(name.startswith("transformer_blocks.") for name in layers):
        return _fused(layers)
    return layers


def _ldm(layers: Layers) -> Layers:
    attended = {
        (side, int(number))
        for side, number, sort, *_ in (name.split(".", 3) for name in layers if name.count(".") > 2)
        if side == "up_blocks" and sort == "attentions"
    }
    found: Layers = {}
    for name, layer in layers.items():
        place, _, role = name.rpartition(".")
        original = names.to_ldm(place, attended)
        if original is None:
            raise AdapterError(f"'{name}' has no name in the original Stable Diffusion network; give --to kohya")
        found[f"{original}.{role}"] = layer
    return found


def _fused(layers: Layers) -> Layers:
    """Layers of FLUX or Stable Diffusion 3 as their authors have them; all or none, so that no file mixes names."""
    flux = fused.is_flux(layers)
    groups: dict[str, dict[int, Factors]] = {}
    for name, layer in layers.items():
        found = fused.original_of(name.removesuffix(".weight"), flux)
        if found is None:
            return layers
        groups.setdefault(found[0], {})[found[1]] = _factors("transformer", name, layer, "kohya")
    return {f"{name}.weight": _joined(name, given, flux) for name, given in groups.items()}


def _joined(original: str, given: Mapping[int, Factors], flux: bool) -> Factors:
    count = fused.members(original, flux)
    one = given[0] if count == 1 else fused.stack(original, given, count)
    rows, columns = one.up.shape[0], one.down.shape[1]
    if fused.parts(original, rows, columns)[0][1].swapped:  # type: ignore[index]  # its name is of the table
        one = Factors(
            one.down, fused.swap(one.up), one.alpha, None if one.magnitude is None else fused.swap(one.magnitude)
        )
    return one
