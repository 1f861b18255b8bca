"""PEFT's VeRA, RandLoRA, MiSS and SHiRA, whose files do not tell what their layers are: read beside their base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from fallow.core.errors import AdapterError
from fallow.core.sparse import CONFIG, WEIGHTS, SparseDelta
from fallow.recipes.adapter_directory import PREFIX, read_config, shapes_in
from fallow.recipes.formats.deltas import Read
from fallow.recipes.formats.from_peft import from_peft
from fallow.recipes.formats.layers import plain
from fallow.recipes.formats.peft_methods import READERS, read_foreign
from fallow.selection.peft_shira import read_peft_shira

OURS = tuple(sorted(set(READERS) - {"LORA"}))
SPARSE = "SHIRA"
Base = Mapping[str, Read]


def type_of(place: Path) -> str | None:
    """PEFT's name of the method in a folder, where it is one that is read here."""
    if not (place / CONFIG).is_file() or not (place / WEIGHTS).is_file():
        return None
    kind = read_config(place).get("peft_type")
    return kind if kind in (*OURS, SPARSE) else None


def as_ours(place: Path, base: Base | None, folder: Path) -> None:
    """Write the adapter as a folder of the weight parameterization that it is. AdapterError where base is needed."""
    known = _needed(place, base)
    model = from_peft(place, _layers(place, read_foreign(place).layers, known))
    model.save_pretrained(str(folder), save_embedding_layers=False)


def as_sparse(place: Path, base: Base | None) -> SparseDelta:
    """PEFT's SHiRA. AdapterError where its base is needed, or is another."""
    known, mark = _needed(place, base), ".shira_weight"
    names = (name for name in shapes_in(place / WEIGHTS) if name.endswith(mark))
    layers = [name.removeprefix(PREFIX).removesuffix(mark) for name in names]
    return read_peft_shira(place, _layers(place, layers, known))


def _needed(place: Path, base: Base | None) -> Base:
    if base is None:
        kind = read_config(place).get("peft_type")
        raise AdapterError(f"{place} is PEFT's {kind}, which does not tell its layers' shapes; give --base MODEL")
    return base


def _layers(place: Path, names: Iterable[str], base: Base) -> nn.Module:
    """The layers of these names alone, at their places, with the base's weights."""
    root = nn.Module()
    for name in names:
        read = base.get(plain(f"{name}.weight"))
        weight = None if read is None else read()
        if weight is None or weight.dim() != 2:
            raise AdapterError(f"{place} adapts '{name}', which is no linear layer of the base; give the right --base")
        *path, last = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        parent.add_module(last, layer)
    return root
