"""An adapter of another size: LoRA of another rank, or a sparse adapter of fewer entries.

resize("community.safetensors", Path("small.safetensors"), truncation=Truncation(rank=8))
resize("runs/sara-1/adapter", Path("small.safetensors"), most=Most(fraction=0.5))
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from fallow.core.errors import AdapterError, ConfigError
from fallow.core.linalg import Truncation
from fallow.core.sparse import Entry, SparseDelta
from fallow.recipes import convert
from fallow.recipes.adapter_files import kind_of, locate
from fallow.recipes.approximation import Losses, Most, largest, resized
from fallow.recipes.formats.layers import Adapter, Dense, Factors, Layers, evened
from fallow.recipes.formats.patterns import whole

RANK, ALPHA = "ss_network_dim", "ss_network_alpha"  # kohya's metadata


def resize(
    path: str | Path,
    output: Path,
    *,
    truncation: Truncation | None = None,
    most: Most | None = None,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write an adapter of another size in the format that it has; the report is that of `convert`.

    `truncation`: of LoRA, `most`: of a sparse adapter, whose `fraction` is a share of its entries. `base`: the
    checkpoint, for sparse adapters that store values. Raises ConfigError for what the kind of adapter has no use for.
    """
    kind = kind_of(path)
    if kind == "sparse":
        if truncation is not None or most is None or most == Most():
            raise ConfigError(f"{path} is a sparse adapter, which has no rank; give --fraction 0.5 or --budget 100000")
        convert.check_output(output, "fallow", overwrite)
        return _sparse(path, output, most, base)
    if truncation is None or (most is not None and most != Most()):
        raise ConfigError(f"{path} is no sparse adapter; give the --rank 8 or the --energy 0.9 that it shall have")
    adapter = convert.load(path)
    if adapter.format == "fallow":
        raise ConfigError(f"{path} is a directory of sparse adapters; resize each of them, {path}/unet and the others")
    convert.check_output(output, adapter.format, overwrite)
    losses = Losses()
    made = _factors(adapter, truncation, dtype, losses)
    written = convert.write(made, adapter.format, output)
    return {"from": adapter.format, **convert.report(written, adapter.format, losses, [])}


def _factors(adapter: Adapter, how: Truncation, dtype: torch.dtype | None, losses: Losses) -> Adapter:
    parts: dict[str, Layers] = {}
    ranks: set[int] = set()
    for part, name, layer in adapter.layers():
        if isinstance(layer, Dense):
            raise AdapterError(
                f"'{name}' has a full change and no rank; make factors of it with: fallow adapter convert --to kohya"
            )
        made, norm, missing = resized(layer, how, dtype)
        losses.add(name if len(adapter.parts) == 1 else f"{part}.{name}", norm, missing, was=layer.rank, rank=made.rank)
        parts.setdefault(part, {})[name] = made
        ranks.add(made.rank)
    foreign = dict(adapter.foreign)
    result = Adapter(adapter.format, parts, adapter.base, adapter.notes, foreign)
    if adapter.format.startswith("kohya"):
        result = evened(result)
    alphas = {layer.alpha for *_, layer in result.layers() if isinstance(layer, Factors)}
    for key, values in ((RANK, ranks), (ALPHA, alphas)):
        if key in foreign:
            foreign[key] = str(whole(values.pop())) if len(values) == 1 else "Dynamic"
    return result


def _sparse(path: str | Path, output: Path, most: Most, base: str | None) -> dict[str, Any]:
    read = SparseDelta.load(locate(path))
    delta = convert.with_changes(read, path, base)
    kept = {}
    losses = Losses()

    def changes() -> Any:
        return ((name, entry.values) for name, entry in delta.entries.items())

    for name, values, index in largest(changes, delta.trained, most):
        entry, at = delta.entries[name], index.long()
        norm, held = float(values.double().norm()), float(values[at].double().norm())
        losses.add(name, norm, math.sqrt(max(norm**2 - held**2, 0.0)), was=values.numel(), entries=at.numel())
        if at.numel():
            stored = read.entries[name].values[at]  # values stay values
            kept[name] = Entry(entry.index[at], stored, entry.shape, entry.dtype, entry.fingerprint)
    notes = convert.other_metadata(locate(path))
    written = SparseDelta(kept, read.store, read.metadata).save(output, notes=notes)
    return {"from": "fallow", **convert.report(written, "fallow", losses, [])}
