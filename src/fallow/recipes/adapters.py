"""What can be done with finished adapters: look inside, merge into a base, combine several, see how two differ.

describe("runs/sara-blueprint-1/adapter")
merge_into("mini-sd", [("a.safetensors", 0.6), ("b.safetensors", 0.6)], Path("merged"))
combine([("a.safetensors", 0.6), ("b.safetensors", 0.6)], Path("both.safetensors"))
differ("a.safetensors", "b.safetensors")
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fallow import assets
from fallow.core import sparse
from fallow.core.errors import AdapterError, ConfigError, ModelError
from fallow.core.files import atomic_directory
from fallow.core.linalg import of_product
from fallow.core.sparse import WEIGHTS, SparseDelta
from fallow.recipes.adapter_directory import PREFIX, header, opened, read_config, shapes_in
from fallow.recipes.adapter_files import adapter_size, kind_of, locate
from fallow.recipes.checkpoint_tensors import tensors_in
from fallow.recipes.formats import deltas, peft, reading
from fallow.recipes.formats.layers import Adapter, Factors
from fallow.recipes.pipelines import apply_adapters, load_pipeline, quietly
from fallow.recipes.run_directory import refuse_read_only
from fallow.report.run import block_of

# Settings of PEFT's adapter_config.json that say what was trained; the others are of no interest to most.
PEFT_SETTINGS = ("peft_type", "r", "lora_alpha", "alpha", "target_modules", "use_dora", "use_rslora")

# -- looking inside ---------------------------------------------------------------------------------------------------


def describe(path: str | Path) -> dict[str, Any]:
    """What an adapter of any kind holds (JSON-able).

    `facts`: kind, method, trained entries, tensors, bytes, and what its training noted. `blocks`: for each block of the
    network `trained` entries, `numel` of its adapted weights, `norm` and `largest` of the changes; None where the file
    alone cannot tell. `layers`: layer, shape, rank and alpha of each in a file of another program.
    `notes`: what the file tells other tools. `remarks`: sentences. Raises AdapterError.
    """
    place, kind = locate(path), kind_of(path)
    trained, size = adapter_size(place)
    layers: list[dict[str, Any]] = []
    if kind in ("peft", "delta") and deltas.is_one(place):
        found = deltas.saved(place)
        trained = found.trained()
        facts, blocks, remarks, layers = _describe_delta(found)
    elif kind == "sparse":
        facts, blocks, remarks = _describe_sparse(SparseDelta.load(place))
    elif kind == "parts":
        facts, blocks, remarks, layers = _describe_parts(place)
    elif kind == "file":
        facts, blocks, remarks, layers = _describe_layers(reading.read(place))
    else:
        facts, blocks, remarks = _describe_dense(place, kind)
    told = {"kind": kind, "trained": trained, "bytes": size}
    told |= {name: value for name, value in facts.items() if name not in told and value is not None}
    return {"facts": told, "blocks": blocks, "layers": layers, "notes": notes_in(place), "remarks": remarks}


def notes_in(place: Path) -> dict[str, str]:
    """What an adapter's file tells other tools, `modelspec.*` and `ss_*`; of one in several parts, its first file."""
    files = [place] if place.is_file() else [place / WEIGHTS, *sorted(place.glob(f"*/{WEIGHTS}"))]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return {}
    with opened(file) as found:
        told = found.metadata() or {}
    return {name: told[name] for name in sorted(told) if name.startswith(("modelspec.", "ss_"))}


def _describe_sparse(delta: SparseDelta) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    blocks: dict[str, dict[str, Any]] = {}
    known = delta.store == "delta"
    for name, entry in delta.entries.items():
        block = blocks.setdefault(
            block_of(name),
            {"trained": 0, "numel": 0, "norm": 0.0 if known else None, "largest": 0.0 if known else None},
        )
        block["trained"] += entry.index.numel()
        block["numel"] += entry.numel
        if known and entry.values.numel():
            block["norm"] = math.hypot(block["norm"], float(entry.values.double().norm()))
            block["largest"] = max(block["largest"], float(entry.values.abs().max()))
    numel = sum(entry.numel for entry in delta.entries.values())
    remarks = []
    if not known:
        remarks.append("it stores the trained values; how far they moved is known only beside the base")
    if any(not entry.fingerprint for entry in delta.entries.values()):
        remarks.append("it has no fingerprint of its base, so that another base is not noticed")
    facts = {
        "tensors": len(delta.entries),
        "numel": numel,
        "share": delta.trained / numel if numel else None,
        "store": delta.store,
        "norm": math.hypot(*(b["norm"] for b in blocks.values())) if known else None,
        "largest": max((b["largest"] for b in blocks.values()), default=0.0) if known else None,
    }
    return {**delta.metadata, **facts}, blocks, remarks


def _describe_dense(place: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Of kinds whose files hold no changes: factors of PEFT's, or all the weights."""
    shapes = shapes_in(place / WEIGHTS)
    noted = header(place / WEIGHTS)
    blocks: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        block = blocks.setdefault(
            block_of(name.removeprefix(PREFIX)),
            {"trained": 0, "numel": 0 if kind == "full" else None, "norm": None, "largest": None},
        )
        block["trained"] += size
        if kind == "full":
            block["numel"] += size
    facts = dict(noted.get("metadata", {}))
    remarks = []
    if kind == "peft":
        config = read_config(place)
        facts |= {key: config[key] for key in PEFT_SETTINGS if config.get(key) not in (None, False)}
        remarks.append("trained counts the entries of PEFT's factors; what they change is known only when merged")
    else:
        remarks.append("it holds all weights; how far they moved is told by fallow adapter diff BASE/unet THIS")
    if not noted.get("base"):
        remarks.append("it has no fingerprint of its base, so that another base is not noticed")
    return {**facts, "tensors": len(shapes)}, blocks, remarks


def _describe_delta(
    found: deltas.Saved,
) -> tuple[dict[str, Any], dict[str, Any], list[str], list[dict[str, Any]]]:
    """Of a weight parameterization, by what its file tells; norms would need the base for some, and are left out."""
    blocks: dict[str, dict[str, Any]] = {}
    layers: list[dict[str, Any]] = []
    for name, layer in found.layers.items():
        size = sum(tensor.numel() for tensor in layer.tensors.values())
        shape = layer.layout["shape"] if layer.layout else None
        block = blocks.setdefault(
            block_of(name), {"trained": 0, "numel": 0 if shape else None, "norm": None, "largest": None}
        )
        block["trained"] += size
        if shape and block["numel"] is not None:
            block["numel"] += math.prod(shape)
        rank, alpha = (getattr(layer.options, key, None) for key in ("rank", "alpha"))
        told = "x".join(map(str, shape)) if shape else "?"
        layers.append({"layer": name, "shape": told, "rank": rank, "alpha": alpha})
    ranks = sorted({one["rank"] for one in layers if isinstance(one["rank"], int)})
    facts = {
        **found.notes,
        "method": found.method.name,
        "options": found.options,
        "ranks": ranks or None,
        "seed": found.seed,
        "tensors": sum(len(layer.tensors) for layer in found.layers.values()) + len(found.common),
        "layers": len(found.layers),
        "base": found.sample or (f"fingerprints of {len(found.base)} weights" if found.base else None),
    }
    remarks = ["blocks count the entries of the file, also frozen ones; trained is what was trained"]
    if not facts["base"]:
        remarks.append("it has no fingerprint of its base, so that another base is not noticed")
    return facts, blocks, remarks, layers


def _describe_parts(
    place: Path,
) -> tuple[dict[str, Any], dict[str, Any], list[str], list[dict[str, Any]]]:
    """Of a directory with an adapter for each part: what each holds, under the part's name."""
    each = {part: describe(place / part) for part in peft.parts_in(place)}
    facts = next(iter(each.values()))["facts"] | {"parts": {part: one["facts"]["kind"] for part, one in each.items()}}
    blocks = {f"{part}.{name}": block for part, one in each.items() for name, block in one["blocks"].items()}
    layers = [{**of, "layer": f"{part}.{of['layer']}"} for part, one in each.items() for of in one["layers"]]
    remarks = list(dict.fromkeys(remark for one in each.values() for remark in one["remarks"]))
    return facts, blocks, remarks, layers


def _describe_layers(
    adapter: Adapter,
) -> tuple[dict[str, Any], dict[str, Any], list[str], list[dict[str, Any]]]:
    """Of files of diffusers, kohya and LyCORIS, and of PEFT directories of several parts."""
    blocks: dict[str, dict[str, Any]] = {}
    layers: list[dict[str, Any]] = []
    several, dora = len(adapter.parts) > 1, False
    for part, name, layer in adapter.layers():
        block = blocks.setdefault(
            f"{part}.{block_of(name)}" if several else block_of(name),
            {"trained": 0, "numel": 0, "norm": 0.0, "largest": None},
        )
        block["trained"] += layer.trained
        block["numel"] += math.prod(layer.shape)
        rank = alpha = None
        if isinstance(layer, Factors):
            rank, alpha = layer.rank, layer.alpha
            dora |= layer.magnitude is not None
            norm = abs(layer.scale) * float(of_product(*layer.matrices())[1].norm())
        else:
            norm = float(layer.read().double().norm())
        block["norm"] = math.hypot(block["norm"], norm)
        place = f"{part}.{name}" if several else name
        layers.append({"layer": place, "shape": "x".join(map(str, layer.shape)), "rank": rank, "alpha": alpha})
    ranks = sorted({one["rank"] for one in layers if one["rank"]})
    alphas = sorted({one["alpha"] for one in layers if one["alpha"] is not None})
    facts = {
        "format": adapter.format,
        "parts": list(adapter.parts),
        "tensors": len(layers),
        "ranks": ranks or None,
        "alphas": alphas or None,
        "use_dora": dora or None,
        "metadata": adapter.foreign or None,
    }
    remarks = ["norms are of the factors' products, which DoRA then scales"] if dora else []
    if not any(adapter.base.values()):
        remarks.append("it has no fingerprint of its base, so that another base is not noticed")
    return {**adapter.notes, **facts}, blocks, remarks, layers


# -- combining --------------------------------------------------------------------------------------------------------


def combine(adapters: Sequence[tuple[str, float]], output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the sum of scale x change of sparse adapters of one base as one adapter; `written`, `trained`, `bytes`.

    `output`: NAME.safetensors for one file, any other name for an adapter directory. Raises ConfigError where that is
    in use, AdapterError for adapters that are not sparse, are broken, or are of different bases.
    """
    if not adapters:
        raise ConfigError("there is no adapter to combine; give one or more of PATH[:SCALE]")
    unused(output, overwrite, directory=output.suffix != ".safetensors")
    for path, _ in adapters:
        if (kind := kind_of(path)) != "sparse":
            raise AdapterError(
                f"{path} is of kind {kind}, and only sparse adapters can be combined into one; put several of any kind "
                "into a model with: fallow adapter merge"
            )
    read = [(SparseDelta.load(locate(path)), scale) for path, scale in adapters]
    same = {
        key: value
        for key, value in read[0][0].metadata.items()
        if key != "method" and all(delta.metadata.get(key) == value for delta, _ in read)
    }
    made = sparse.combine(read, **same)
    written = made.save(output)
    trained, size = adapter_size(written)
    return {"written": str(written), "trained": trained, "bytes": size}


# -- comparing --------------------------------------------------------------------------------------------------------


def differ(first: str | Path, second: str | Path) -> dict[str, Any]:
    """How two sparse adapters of one base, or two checkpoints, differ (JSON-able).

    Adapters: {"kind": "adapters", "shared", "first_trained", "second_trained" entries, "cosine" of the changes,
    "tensors": the same by weight}; cosine is None where one stores values instead of changes. Checkpoints:
    {"kind": "checkpoints"} and what `compare_checkpoints` tells. Raises AdapterError or ModelError.
    """
    places = [_adapter_or_checkpoint(path) for path in (first, second)]
    are_sparse = [sparse.is_sparse(place) for place in places]
    if all(are_sparse):
        return _differ_sparse(*places)
    if any(are_sparse):
        one, other = (first, second) if are_sparse[0] else (second, first)
        raise AdapterError(f"{one} is a sparse adapter and {other} is none; give two of the same kind")
    return {"kind": "checkpoints", **compare_checkpoints(*places)}


def _adapter_or_checkpoint(path: str | Path) -> Path:
    place = Path(path).expanduser()
    return locate(place) if place.exists() else place


def _differ_sparse(first: Path, second: Path) -> dict[str, Any]:
    one, other = SparseDelta.load(first), SparseDelta.load(second)
    found = sparse.overlap(one, other)
    changes = one.store == other.store == "delta"

    def told(part: Mapping[str, float]) -> dict[str, Any]:
        return {
            "shared": int(part["shared"]),
            "first_trained": int(part["first"]),
            "second_trained": int(part["second"]),
            "cosine": part["cosine"] if changes else None,
        }

    return {
        "kind": "adapters",
        "first": str(first),
        "second": str(second),
        **told(found[""]),
        "tensors": {name: told(part) for name, part in found.items() if name},
    }


def compare_checkpoints(first: Path, second: Path) -> dict[str, Any]:
    """Which entries differ between two checkpoints: safetensors files, or directories of them (a model, a pipeline).

    One tensor of each is read at a time. Returns `tensors` (name -> changed, numel, largest, relative) for those that
    differ, `changed` and `total` entries, `relative` = ||b - a|| / ||a||, and the names that only one of them has.
    Raises ModelError where one cannot be read, or tensors of one name differ in shape.
    """
    a, b = tensors_in(first), tensors_in(second)
    tensors: dict[str, dict[str, Any]] = {}
    changed = total = 0
    moved = size = 0.0
    for name in a:
        if name not in b:
            continue
        x, y = _tensor(*a[name]), _tensor(*b[name])
        if x.shape != y.shape:
            raise ModelError(
                f"{name} is {tuple(x.shape)} in {first} and {tuple(y.shape)} in {second}; give checkpoints of one model"
            )
        different = int((x != y).sum()) if x.is_floating_point() or x.dtype == y.dtype else x.numel()
        total += x.numel()
        wide = x.double()
        norm = float(wide.norm())
        size += norm**2
        if different:
            delta = y.double() - wide
            moved += float(delta.norm()) ** 2
            changed += different
            tensors[name] = {
                "changed": different,
                "numel": x.numel(),
                "largest": float(delta.abs().max()),
                "relative": float(delta.norm()) / norm if norm else float("inf"),
            }
    return {
        "first": str(first),
        "second": str(second),
        "changed": changed,
        "total": total,
        "relative": (moved / size) ** 0.5 if size else 0.0,
        "only_in_first": sorted(a.keys() - b.keys()),
        "only_in_second": sorted(b.keys() - a.keys()),
        "tensors": tensors,
    }


def _tensor(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(key)


# -- merging ----------------------------------------------------------------------------------------------------------


def merge_into(
    model: str,
    adapters: Sequence[tuple[str, float]],
    output: Path,
    *,
    force: bool = False,
    overwrite: bool = False,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Write the base with the adapters merged into it as a full pipeline directory, which diffusers loads alone.

    Raises ConfigError where `output` is in use, or is the base itself (which is never written over); AdapterError and
    ModelError as loading does. What is written appears under its name only when it is complete.
    """
    if not adapters:
        raise ConfigError("there is no adapter to merge; give one or more of PATH[:SCALE]")
    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise ConfigError(f"dtype={dtype} is unknown; give float32, float16 or bfloat16")
    _free(output, overwrite, model)
    pipeline = load_pipeline(model, device="cpu")
    apply_adapters(pipeline, list(adapters), force=force)
    with quietly():
        pipeline.to(kinds[dtype])
    with atomic_directory(output) as partial, quietly():
        pipeline.save_pretrained(partial, safe_serialization=True)
    return {"written": str(output), "bytes": sum(file.stat().st_size for file in output.rglob("*") if file.is_file())}


def _free(output: Path, overwrite: bool, model: str) -> None:
    """ConfigError unless a pipeline may be written there: not the base, nor in or around it, nothing that is none."""
    base = assets.MINI_SD if model == "mini-sd" else Path(model).expanduser()
    base, target = base.resolve(), output.resolve()
    if base.exists() and (target == base or target in base.parents or base in target.parents):
        raise ConfigError(
            f"--output {output} is, or lies in or around, the base {model}, which is never written over; give another"
        )
    unused(output, overwrite, directory=True)
    if output.is_dir() and any(output.iterdir()) and not (output / "model_index.json").is_file():
        raise ConfigError(f"--output {output} holds something that is no pipeline, which is kept; give another place")


def unused(output: Path, overwrite: bool, *, directory: bool) -> None:
    """ConfigError where something is there already: of the other sort, or of the same sort unless `overwrite`."""
    if not output.exists():
        above = next(place for place in output.absolute().parents if place.exists())
        if above.is_dir():
            refuse_read_only(above)
        return
    if output.is_dir() != directory:
        sort = "file" if directory else "folder"
        raise ConfigError(f"--output {output} is a {sort} already; give another place")
    if (not directory or any(output.iterdir())) and not overwrite:
        raise ConfigError(f"--output {output} exists already; give another place, or --overwrite")
