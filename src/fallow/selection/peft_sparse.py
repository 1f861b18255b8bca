"""Between the two worlds: a PEFT adapter as a sparse adapter (`fallow.SparseDelta`), and back.

Sparse adapters are smaller (indices take a byte or two), hold biases and norms too, and show in a model without
wrapping it; PEFT adapters work with whatever knows PEFT. Changes are the same float32 numbers in both.
"""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fallow.core.errors import AdapterError, ConfigError, nearest
from fallow.core.files import fingerprint, read_tensors
from fallow.core.peft_host import PREFIX, FallowConfig, FallowLayer
from fallow.core.select import named_weights
from fallow.core.sparse import Entry, SparseDelta, weights_file
from fallow.selection.peft_config import EntriesConfig
from fallow.selection.peft_entries import Entries

KEY = re.compile(rf"(?:base_model\.model\.)?(?P<path>.+)\.{PREFIX}delta\.(?P<tensor>\w+)")
TENSORS = ("in_proj_weight", "weight")


def to_sparse(
    source: nn.Module | str | PathLike[str], base: nn.Module | None = None, adapter_name: str = "default"
) -> SparseDelta:
    """A PEFT adapter of chosen entries as a sparse adapter, at scale 1.

    `source`: a model that holds it, or its folder; then `base` is the model it was trained on, which is only read.
    AdapterError where there is no such adapter, or the base is another.
    """
    if not isinstance(source, nn.Module):
        if base is None:
            raise ConfigError("base= is needed with a folder: the model that the adapter was trained on")
        return _from_folder(Path(source), base)
    model = source.get_base_model() if isinstance(source, PeftModel) else source
    entries, config = {}, getattr(source, "peft_config", {}).get(adapter_name)
    for path, layer in model.named_modules():
        if not isinstance(layer, FallowLayer) or adapter_name not in layer.fallow_delta:
            continue
        if layer.merged:
            raise ConfigError(f"adapter '{adapter_name}' is merged; call unmerge_adapter() first")
        layer.settle()
        delta = layer.fallow_delta[adapter_name]
        if not isinstance(delta, Entries):
            raise AdapterError(f"adapter '{adapter_name}' is no choice of entries but {type(delta).__name__}")
        name = f"{path.replace('.base_layer', '')}.{layer.tensor}"
        entries[name] = _entry(name, delta, layer.parameter)
    if not entries or not isinstance(config, FallowConfig):
        held = getattr(source, "peft_config", {})
        raise AdapterError(f"the model has no adapter '{adapter_name}' of chosen entries{nearest(adapter_name, held)}")
    return SparseDelta(entries, "delta", _told(config))


def from_sparse(
    adapter: SparseDelta | str | PathLike[str], model: nn.Module, adapter_name: str = "default", force: bool = False
) -> PeftModel:
    """The model with a sparse adapter as a PEFT adapter, ready to be trained on, switched or saved.

    `model`: its base, which is wrapped, or a PeftModel of this package, which gets one more adapter. AdapterError where
    the adapter is of another base (unless `force`) or changes what no module's weight is, such as a bias.
    """
    delta = adapter if isinstance(adapter, SparseDelta) else SparseDelta.load(Path(adapter))
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {path.replace(".base_layer", ""): m for path, m in inner.named_modules() if isinstance(m, FallowLayer)}
    for layer in layers.values():
        layer.settle(layer.merged_adapters)
    if not isinstance(model, PeftModel):
        delta.check(model, force)
    paths = {name: _module_of(name) for name in delta.entries}
    made = {"entries": {paths[name]: entry.index.numel() for name, entry in delta.entries.items()}, "threshold": None}
    pattern = "|".join(re.escape(path) for path in paths.values())
    config = EntriesConfig(target_modules=pattern, made=made)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(model, config, adapter_name=adapter_name)
    layers = {
        f"{path.replace('.base_layer', '')}.{layer.tensor}": layer
        for path, layer in model.get_base_model().named_modules()
        if isinstance(layer, FallowLayer) and adapter_name in layer.fallow_delta
    }
    for name, entry in delta.entries.items():
        held, weight = layers[name].fallow_delta[adapter_name], layers[name].parameter
        assert isinstance(held, Entries)
        held.index.copy_(entry.index)
        held.bind(weight, f"'{name}'")
        with torch.no_grad():
            held.values.copy_(delta.deltas(name, held.first))
    return model


def _entry(name: str, delta: Entries, weight: Tensor) -> Entry:
    if not delta.bound:
        delta.bind(weight, f"'{name}'")
    dtype = str(weight.dtype).removeprefix("torch.")
    change = delta.change().detach().to("cpu", copy=True)
    return Entry(delta.index.cpu().clone(), change, tuple(weight.shape), dtype, fingerprint(weight))


def _told(config: FallowConfig) -> dict[str, Any]:
    """What the sparse file says of the method: plain JSON values that are set."""
    fields = config.to_dict()
    own = set(fields) - set(EntriesConfig().to_dict()) | {"seed"}
    kept = {name: value for name, value in fields.items() if name in own and value is not None}
    return {"method": config.method, "from": "PEFT", **kept}


def _module_of(name: str) -> str:
    path, _, tensor = name.rpartition(".")
    if tensor not in TENSORS or not path:
        raise AdapterError(
            f"the adapter changes '{name}', which is no module's weight; PEFT adapters hold weights alone: train with "
            "include=r'weight$', or use fallow.Adapters"
        )
    return path


def _from_folder(folder: Path, base: nn.Module) -> SparseDelta:
    tensors, _ = read_tensors(weights_file(folder))
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, EntriesConfig):
        raise AdapterError(f"{folder} holds an adapter of {config.peft_type}, not chosen entries of Fallow's")
    held: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if match := KEY.fullmatch(key):
            held.setdefault(match["path"].replace(".base_layer", ""), {})[match["tensor"]] = value
    named, entries = named_weights(base), {}
    for path, parts in held.items():
        name = next((f"{path}.{tensor}" for tensor in TENSORS if f"{path}.{tensor}" in named), None)
        if (
            name is None
            or not {"values", "index", "base"} <= set(parts)
            or parts["values"].shape != parts["index"].shape
        ):
            lacks = f"{type(base).__name__} has no such weight" if name is None else "its tensors do not fit"
            raise AdapterError(f"{folder} trains '{path}', but {lacks}; give the base and the whole adapter")
        delta = Entries(parts["index"], parts["values"].dtype, config.check_base)
        delta.values.data.copy_(parts["values"])
        delta.base.copy_(parts["base"])
        entries[name] = _entry(name, delta.to(named[name].device), named[name].detach())
    if not entries:
        raise AdapterError(f"{folder} holds no entries of Fallow's (no key has '{PREFIX}delta')")
    return SparseDelta(entries, "delta", _told(config))
