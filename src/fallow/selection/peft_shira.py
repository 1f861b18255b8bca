"""The adapters of PEFT's SHiRA: read, as `SHiRA.from_peft`, to go on with them here, without PEFT's clone of every
weight in each forward pass; and written, as `SHiRA.to_peft`.

PEFT asks for r (in + out) entries in every layer, with one r. Where there are fewer, entries of value 0 fill up.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from fallow.core.errors import AdapterError
from fallow.core.files import atomic_directory, fingerprint, read_tensors, write_json, write_tensors
from fallow.core.select import index_dtype, named_weights
from fallow.core.sparse import CONFIG, WEIGHTS, Entry, SparseDelta, weights_file


def read_peft_shira(folder: str | Path, model: nn.Module) -> SparseDelta:
    """Read an adapter that PEFT's SHiRA saved (`shira_weight` (k,), `shira_indices` (2, k) of rows and columns).

    `model`: the base, for shapes and fingerprints. Returns an adapter to save, load or combine. Raises AdapterError
    where the file is broken, lacks its indices, or names layers that the model lacks.
    """
    tensors, _ = read_tensors(weights_file(Path(folder)))
    named = named_weights(model)
    entries = {}
    for key, values in tensors.items():
        if not key.endswith(".shira_weight"):
            continue
        layer = key.removeprefix("base_model.model.").removesuffix(".shira_weight")
        pairs, weight = tensors.get(key.replace("shira_weight", "shira_indices")), named.get(f"{layer}.weight")
        if pairs is None or weight is None or pairs.shape != (2, values.numel()):
            lacks = f"{type(model).__name__} has no '{layer}.weight'" if weight is None else "its indices do not fit"
            raise AdapterError(f"{folder} trains '{layer}', but {lacks}; give the base and the whole adapter")
        rows, columns = weight.shape
        if values.numel() and bool(((pairs < 0) | (pairs >= torch.tensor([[rows], [columns]]))).any()):
            raise AdapterError(f"{folder} trains entries outside of '{layer}' {(rows, columns)}; give its base")
        flat, order = (pairs[0].long() * columns + pairs[1].long()).sort()
        dtype = str(weight.dtype).removeprefix("torch.")
        index = flat.to(index_dtype(weight.numel()))
        entries[f"{layer}.weight"] = Entry(index, values[order].float(), (rows, columns), dtype, fingerprint(weight))
    if not entries:
        raise AdapterError(f"{folder} holds no layer of PEFT's SHiRA (no key ends in 'shira_weight')")
    return SparseDelta(entries, "delta", {"method": "shira", "mask": "rand", "from": "PEFT"})


def write_peft_shira(delta: SparseDelta, folder: str | Path) -> Path:
    """Write a sparse adapter of linear layers' weights as PEFT's SHiRA, which loads it; returns the folder.

    Raises AdapterError for one that stores values or changes other tensors than matrices called `weight`, and where a
    layer would have more entries than its weight at the rank that the others need.
    """
    folder = Path(folder)
    if delta.store != "delta":
        raise AdapterError("the adapter stores values, and PEFT's SHiRA changes; convert it beside its base first")
    for name, entry in delta.entries.items():
        if not name.endswith(".weight") or len(entry.shape) != 2:
            raise AdapterError(f"the adapter changes '{name}' {entry.shape}, and PEFT's SHiRA linear layers alone")
    rank = max((-(-entry.index.numel() // sum(entry.shape)) for entry in delta.entries.values()), default=0) or 1
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in delta.entries.items():
        wanted = rank * sum(entry.shape)
        if wanted > entry.numel:
            raise AdapterError(
                f"'{name}' {entry.shape} would have {wanted} entries at the rank {rank} that another layer needs, more "
                "than it has; PEFT's SHiRA has one rank for all: train each kind of layer apart"
            )
        missing = wanted - entry.index.numel()
        flat = torch.cat([entry.index.long(), torch.zeros(missing, dtype=torch.long)])
        place = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{place}.shira_weight"] = torch.cat([entry.values.float(), torch.zeros(missing)])
        tensors[f"{place}.shira_indices"] = torch.stack([flat // entry.shape[1], flat % entry.shape[1]]).int()
    modules = "|".join(re.escape(name.removesuffix(".weight")) for name in delta.entries)
    with atomic_directory(folder) as partial:
        write_tensors(partial / WEIGHTS, tensors, {"format": "pt"})
        config = {"peft_type": "SHIRA", "r": rank, "mask_type": "random", "random_seed": 0, "target_modules": modules}
        write_json(partial / CONFIG, config | {"inference_mode": True})
    return folder
