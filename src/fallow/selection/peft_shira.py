"""Reads the adapters that PEFT's SHiRA saves, as `SHiRA.from_peft`: to go on with them here, without PEFT's clone of
every weight in each forward pass.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fallow.core.errors import AdapterError
from fallow.core.files import fingerprint, read_tensors
from fallow.core.select import index_dtype, named_weights
from fallow.core.sparse import Entry, SparseDelta, weights_file


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
