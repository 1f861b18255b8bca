"""Adapters from one file format into another.

convert("style", "kohya", Path("style.safetensors"))
convert("community.safetensors", "fallow", Path("style.safetensors"), most=Most(fraction=0.05))

    from \\ to      peft, diffusers, kohya            lycoris-diff       fallow (sparse)
    factors        the same numbers                  multiplied out     multiplied out, the largest entries kept
    full changes   by singular values (Truncation)   the same numbers   those that are not zero, or the largest
    sparse         by singular values (Truncation)   filled with zeros  the same numbers
    ours           as factors; others by Truncation  multiplied out     multiplied out, the largest entries kept
    PEFT's VeRA, RandLoRA and MiSS as ours, its SHiRA as sparse, all beside their base

Between the formats of one column of kinds nothing is rounded: there and back is the same, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from torch import Tensor

from fallow.core.errors import AdapterError, ConfigError, nearest
from fallow.core.linalg import Truncation
from fallow.core.sparse import CONFIG, WEIGHTS, Entry, SparseDelta, weights_file
from fallow.recipes.adapter_directory import NETWORKS, header, new_directory, opened
from fallow.recipes.adapter_files import adapter_size, kind_of, locate
from fallow.recipes.adapters import unused
from fallow.recipes.approximation import Losses, Most, factored, largest
from fallow.recipes.checkpoint_tensors import Stored, network_tensors, real
from fallow.recipes.formats import by_base, deltas, peft, reading, writing
from fallow.recipes.formats.layers import Adapter, Dense, Factors, Format, Layers, different_alphas, evened, part_of

FORMATS = get_args(Format)
FACTORS = ("peft", "diffusers", "kohya", "kohya-ldm")
ALPHAS = "diffusers takes one alpha for all attentions of kohya files, which differ here; give --to diffusers or --rank"
LEAVES_DORA = "diffusers leaves out DoRA's magnitudes of kohya's files; it reads its own format, or give --rank"
MOST_ENTRIES = 2**32  # of one weight; a file may claim any shape


def convert(
    path: str | Path,
    to: str,
    output: Path,
    *,
    truncation: Truncation | None = None,
    most: Most | None = None,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write an adapter in another format (JSON-able report: written, format, trained, bytes, error, layers, remarks).

    `truncation`: for changes that are no factors and shall become such, and for weight parameterizations whose factors
    shall have fewer ranks; `most`: for changes that shall become sparse. `base`: the checkpoint, for sparse adapters
    that store values, and weight parameterizations whose change depends on it. `dtype`: of the factors written, None is
    as they are.
    Raises ConfigError for an output that is in use or not of the format, AdapterError for what cannot be converted.
    """
    check_format(to)
    check_output(output, to, overwrite)
    losses = Losses()
    remarks: list[str] = []
    if (kind := by_base.type_of(place := locate(path))) in by_base.OURS:
        with TemporaryDirectory() as room:
            by_base.as_ours(place, base_weights(base), Path(room))
            told = convert(room, to, output, truncation=truncation, most=most, base=base, dtype=dtype, overwrite=True)
        return {**told, "from": f"PEFT's {kind}"}
    if deltas.is_one(place):
        adapter = deltas.read(place, to, losses, base=base_weights(base), how=truncation if to in FACTORS else None)
    else:
        adapter = load(path, base)
    if to == "fallow":
        written = write_sparse(adapter, most or Most(), losses, output)
    else:
        if most is not None and most != Most():
            raise ConfigError(f"a fraction or budget of entries is kept by sparse adapters, and {to} is none")
        if to in FACTORS:
            adapter, remarks = with_factors(adapter, truncation, dtype, losses)
            if to.startswith("kohya") and different_alphas(adapter):
                if deltas.is_one(place) and (truncation is not None or adapter.notes["method"] not in ("lora", "dora")):
                    adapter = evened(adapter)  # nothing of what was trained goes over bit for bit anyway
                else:
                    remarks.append(ALPHAS)
            if to.startswith("kohya") and any(
                getattr(one, "magnitude", None) is not None for *_, one in adapter.layers()
            ):
                remarks.append(LEAVES_DORA)
        written = write(adapter if dtype is None else in_dtype(adapter, dtype), to, output)
    origin = adapter.notes["method"] if deltas.is_one(place) else adapter.format
    return {"from": origin, **report(written, to, losses, remarks)}


def base_weights(base: str | None) -> dict[str, deltas.Read] | None:
    """By weight name, how to read it from a checkpoint; None for none. ModelError where there is none."""
    if base is None:
        return None
    parts, _ = network_tensors(base)
    return {name: stored.read for part in reversed(list(parts)) for name, stored in parts[part].items()}


def check_format(to: str) -> None:
    """ConfigError for a format that is unknown."""
    if to not in FORMATS:
        raise ConfigError(f"to={to} is no format that Fallow writes{nearest(to, FORMATS)}")


def check_output(output: Path, to: str, overwrite: bool) -> None:
    """ConfigError where the output is in use, or has a name that the format has no use for."""
    file = output.suffix == ".safetensors"
    if to == "peft" and file:
        raise ConfigError(f"--output {output} is a file, and PEFT's adapters are directories; give a folder")
    if to in ("kohya", "kohya-ldm", "lycoris-diff") and not file:
        raise ConfigError(f"--output {output} must be a file for {to}; give NAME.safetensors")
    unused(output, overwrite, directory=not file)
    if output.is_dir() and any(output.iterdir()):
        known = (CONFIG, writing.DIFFUSERS_FILE)
        if not any((output / name).is_file() for name in known) and not peft.parts_in(output):
            raise ConfigError(f"--output {output} holds something that is no adapter, and is kept; give another place")


def report(written: Path, to: str, losses: Losses, remarks: list[str]) -> dict[str, Any]:
    """What is told of an adapter that has been written."""
    trained, size = adapter_size(written)
    told = {"written": str(written), "format": to, "trained": trained, "bytes": size}
    return {**told, "error": losses.error, "layers": losses.layers, "remarks": remarks}


def write(adapter: Adapter, to: str, output: Path) -> Path:
    """Write an adapter of factors or full changes in any format but the sparse one."""
    if to == "peft":
        return peft.write(adapter, output)
    if to == "diffusers" and output.suffix != ".safetensors":
        writing.write(adapter, to, output / writing.DIFFUSERS_FILE)
        return output
    return writing.write(adapter, to, output)


def in_dtype(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """The adapter with factors of this dtype; full changes are left as they are."""
    parts: dict[str, Layers] = {}
    for part, name, layer in adapter.layers():
        if isinstance(layer, Factors):
            magnitude = None if layer.magnitude is None else layer.magnitude.to(dtype)
            layer = Factors(layer.down.to(dtype), layer.up.to(dtype), layer.alpha, magnitude)
        parts.setdefault(part, {})[name] = layer
    return Adapter(adapter.format, parts, adapter.base, adapter.notes, adapter.foreign)


# -- from and to sparse adapters --------------------------------------------------------------------------------------


def load(path: str | Path, base: str | None = None) -> Adapter:
    """An adapter of any kind, as factors and full changes. `base`: for those that store values and not changes."""
    place, kind = locate(path), kind_of(path)
    if kind == "delta":
        raise AdapterError(f"{path} is of this package's own host; convert it first: fallow adapter convert --to peft")
    if kind == "full":
        return _of_full(place, path, base)
    if kind == "sparse":
        return of_sparse(with_changes(SparseDelta.load(place), path, base), foreign=other_metadata(place))
    if kind == "parts":
        return _of_parts(place, base)
    if kind == "peft" and by_base.type_of(place) == by_base.SPARSE:
        return of_sparse(by_base.as_sparse(place, base_weights(base)))
    return reading.read(place)


def _of_full(place: Path, path: str | Path, base: str | None) -> Adapter:
    """All weights, as what they differ by from the checkpoint `base`; read one at a time."""
    if base is None:
        raise AdapterError(f"{path} holds all weights, whose changes are known only beside the base; give --base MODEL")
    made = network_tensors(place)[0]
    part, tuned = next(iter(made.items()))
    known = network_tensors(base)[0].get(part, {})
    layers: Layers = {}
    for name, stored in tuned.items():
        if name not in known or known[name].shape != stored.shape:
            raise AdapterError(f"{path} has '{name}' {stored.shape}, which {base} has not; give the right --base")
        layers[name] = Dense(partial(_difference, name, stored, known[name]), stored.shape)
    noted = header(place / WEIGHTS)
    prints = noted.get("base", {})
    return Adapter("fallow", {part: layers}, {part: prints} if prints else {}, noted.get("metadata", {}))


def _difference(name: str, tuned: Stored, base: Stored) -> Tensor:
    return real(tuned.read(), name, tuned.file) - real(base.read(), name, base.file)


def _of_parts(place: Path, base: str | None) -> Adapter:
    """A directory of adapters of several parts, which may be of different kinds."""
    made = Adapter("peft", {})
    for part in peft.parts_in(place):
        inner = place / part
        if kind_of(inner) == "sparse":
            one = of_sparse(with_changes(SparseDelta.load(inner), inner, base, part), part, other_metadata(inner))
        elif kind_of(inner) == "peft":
            one = peft.read(inner, part)
        else:
            one = _of_full(inner, inner, base)
        made.parts |= one.parts
        made.base |= one.base
        made.notes, made.foreign, made.format = made.notes or one.notes, made.foreign or one.foreign, one.format
    return made


def with_changes(delta: SparseDelta, path: str | Path, base: str | None, part: str | None = None) -> SparseDelta:
    """The adapter storing changes; one that stores values is compared with the checkpoint `base`."""
    if delta.store == "delta":
        return delta
    if base is None:
        raise AdapterError(f"{path} stores values, whose changes are known only beside the base; give --base MODEL")
    parts, _ = network_tensors(base)
    found = next((parts[one] for one in ([part] if part else NETWORKS) if one in parts), {})
    entries = {}
    for name, entry in delta.entries.items():
        if name not in found or found[name].shape != entry.shape:
            raise AdapterError(f"{path} changes '{name}' {entry.shape}, which {base} has not; give the right --base")
        weight = real(found[name].read(), name, base).flatten()
        values = entry.values.to(weight.dtype) - weight[entry.index.long()]
        entries[name] = Entry(entry.index, values, entry.shape, entry.dtype, entry.fingerprint)
    return SparseDelta(entries, "delta", delta.metadata)


def other_metadata(place: Path) -> dict[str, str]:
    """What a sparse adapter's file says for other tools (`modelspec.*`, `ss_*`)."""
    with opened(weights_file(place)) as found:
        told = found.metadata() or {}
    return {name: value for name, value in told.items() if name not in ("format", "version", "fallow")}


def of_sparse(delta: SparseDelta, part: str | None = None, foreign: Mapping[str, str] | None = None) -> Adapter:
    """A sparse adapter's changes in full. `part`: what it changes, where its names do not tell."""
    part = part or part_of(delta.entries)
    layers: Layers = {name: Dense(partial(filled, entry), entry.shape) for name, entry in delta.entries.items()}
    base = {name: [entry.fingerprint, entry.dtype] for name, entry in delta.entries.items() if entry.fingerprint}
    return Adapter("fallow", {part: layers}, {part: base} if base else {}, dict(delta.metadata), dict(foreign or {}))


def filled(entry: Entry) -> Tensor:
    """The change in full. Entries that were trained and did not move are -0.0, by which they are known again."""
    if entry.numel > MOST_ENTRIES:
        raise AdapterError(f"the adapter tells of a weight of {entry.shape}, which no model has; copy it again")
    change = torch.zeros(entry.numel, dtype=entry.values.dtype)
    change[entry.index.long()] = torch.where(entry.values == 0, -0.0, entry.values)
    return change.view(entry.shape)


def write_sparse(adapter: Adapter, most: Most, losses: Losses, output: Path) -> Path:
    """Write the changes as a sparse adapter; of several parts, as a directory of one for each.

    A fraction is of each part's entries; a budget is for one part alone.
    """
    notes = {name: value for name, value in adapter.foreign.items() if name not in writing.STALE}
    if len(adapter.parts) == 1 and next(iter(adapter.parts)) in NETWORKS:
        return sparse_of(adapter, next(iter(adapter.parts)), most, losses).save(output, notes=notes)
    if output.suffix == ".safetensors":
        raise ConfigError(
            f"--output {output} is a file, and an adapter of {', '.join(adapter.parts)} is one for each in a folder; "
            "give a folder"
        )
    if most.budget is not None:
        raise ConfigError(f"budget={most.budget} is for one part, and the adapter has several; give --fraction")
    made = {part: sparse_of(adapter, part, most, losses) for part in adapter.parts}
    with new_directory(output) as partial:
        for part, delta in made.items():
            delta.save(partial / part, notes=notes)
    return output


def sparse_of(adapter: Adapter, part: str, most: Most, losses: Losses) -> SparseDelta:
    """A sparse adapter of one part's changes: the entries that change, or the largest. AdapterError for DoRA."""
    layers = adapter.parts[part]
    several = len(adapter.parts) > 1
    for name, layer in layers.items():
        if isinstance(layer, Factors) and layer.magnitude is not None:
            raise AdapterError(f"'{name}' is DoRA, whose change depends on the base; merge it, then extract from that")

    def changes() -> Iterator[tuple[str, Tensor]]:
        for name, layer in layers.items():
            yield name, layer.read().float() if isinstance(layer, Dense) else layer.change()

    total = sum(math.prod(layer.shape) for layer in layers.values())
    base = adapter.base.get(part, {})
    entries = {}
    for name, change, index in largest(changes, total, most):
        if most == Most() and isinstance(layers[name], Dense):
            flat = change.flatten()
            index = (flat.ne(0) | flat.signbit()).nonzero().view(-1).to(index.dtype)
        values = change.flatten()[index.long()].float() + 0.0  # -0.0 + 0.0 is 0.0
        kept = float(values.double().norm())
        norm = float(change.double().norm())
        place = f"{part}.{name}" if several else name
        losses.add(place, norm, math.sqrt(max(norm**2 - kept**2, 0.0)), entries=index.numel())
        if index.numel():
            told = base.get(name, ["", "float32"])
            entries[name] = Entry(index, values, tuple(change.shape), told[1], told[0])
    return SparseDelta(entries, "delta", {"method": "converted", **adapter.notes})


# -- to factors -------------------------------------------------------------------------------------------------------


def with_factors(
    adapter: Adapter, how: Truncation | None, dtype: torch.dtype | None, losses: Losses
) -> tuple[Adapter, list[str]]:
    """The adapter with every change as factors, and remarks on what has no such: biases, norms, embeddings."""
    parts: dict[str, Layers] = {}
    left = 0.0
    names: list[str] = []
    for part, name, layer in adapter.layers():
        if isinstance(layer, Factors):
            parts.setdefault(part, {})[name] = layer
            continue
        if how is None:
            raise ConfigError(
                f"'{name}' has a full change, which factors can only come near to; give --rank 16 or --energy 0.9"
            )
        change = real(layer.read(), name, "the adapter")
        if not takes_factors(name, change.shape):
            names.append(name)
            left += float(change.double().square().sum())
            continue
        if bool(change.any()):
            made, norm, missing = factored(change, how, dtype or torch.float32)
            losses.add(name, norm, missing, rank=made.rank)
            parts.setdefault(part, {})[name] = made
    if not parts:
        raise AdapterError("no weight of a linear layer or a convolution changes, so that there is nothing to factor")
    remarks = [left_out(names, left, left + losses.square)] if names and left else []
    return Adapter(adapter.format, parts, adapter.base, adapter.notes, adapter.foreign), remarks


def takes_factors(name: str, shape: torch.Size | tuple[int, ...]) -> bool:
    """Whether a weight is that of a linear layer or a convolution, as far as name and shape tell."""
    return name.endswith(".weight") and 2 <= len(shape) <= 5 and "embeddings." not in name and name[:7] != "shared."


def left_out(names: list[str], square: float, of: float) -> str:
    """The sentence on what LoRA has no place for."""
    share = 100 * square / of if of else 0.0
    return (
        f"{len(names)} biases, norms and embeddings, such as {names[0]}, have no factors and are left out: "
        f"{share:.3g}% of the squared change"
    )
