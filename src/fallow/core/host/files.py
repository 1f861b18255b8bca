"""An adapter as files: `adapter_model.safetensors`, and `adapter_config.json`, which says the same as its metadata.

    <module>.adapters.<tensor>     what a layer has; a Parameter that its module reads: <module>.adapters_<its name>.
    adapters_shared.<tensor>       what all layers of the adapter share

The config tells the method, its options, and for each weight its shape, its dtype, its fingerprint and the options that
differ. Frozen random tensors are not in the file; they are drawn again from the seed. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fallow.core.accompany import penalty_of
from fallow.core.delta import REGISTRY, Delta, make_options
from fallow.core.distributed import rank
from fallow.core.errors import AdapterError, ConfigError, nearest
from fallow.core.files import (
    atomic_directory,
    fingerprint,
    matches,
    parse_json,
    read_tensors,
    refuse_not_finite,
    write_json,
    write_tensors,
)
from fallow.core.foreign_codes import is_coded
from fallow.core.fused import Fused
from fallow.core.host.adapters import finish
from fallow.core.host.holder import SHARED, Blocks, Prepared, Spec, check_name, needed, prepare, refuse_merged
from fallow.core.host.layer import Adapters, sites, weight_at
from fallow.core.host.placing import install
from fallow.core.host.targets import Spot, check_weight, spots
from fallow.core.layouts import layout
from fallow.core.sharded import whole

FORMAT, VERSION = "fallow-delta", 1
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save(model: nn.Module, path: str | Path, name: str = "default") -> Path:
    """Write an adapter as `*.safetensors` in one file, any other path as a directory; returns the path.

    With several processes all must call it; the first one writes. AdapterError where a value is no number or something
    else lies there, StorageError where the place cannot be written; what was there before is then as it was.
    """
    root, shared = needed(model, name)
    path, spec = Path(path), shared.specs[name]
    deltas, described = _held(root, spec, name)
    tensors = {spot.state_key(key): whole(value) for spot, delta in deltas for key, value in delta.state_dict().items()}
    tensors |= {f"{SHARED}.{key}": whole(value) for key, value in shared[name].state_dict().items()}
    refuse_not_finite(path, tensors)
    told = {"method": spec.method, "options": spec.options, "seed": spec.seed, "weights": described, **spec.begun}
    try:
        header = {"format": FORMAT, "version": str(VERSION), "fallow": json.dumps(told, allow_nan=False)}
    except (TypeError, ValueError) as error:
        raise AdapterError(f"the options of '{name}' cannot be written as JSON: {error}") from None
    if rank() == 0:
        _write(path, tensors, header, {"format": FORMAT, "version": VERSION, **told})
    return path


def _held(root: nn.Module, spec: Spec, name: str) -> tuple[list[tuple[Spot, Delta]], dict[str, Any]]:
    """The Deltas of an adapter, and what a file tells of each weight."""
    keys = {(id(s.layer), s.attribute): s for s in spots(root)}
    deltas: list[tuple[Spot, Delta]] = []
    described: dict[str, Any] = {}
    for module, site in sites(root):
        if name in site:
            delta = cast(Delta, site[name])
            spot = keys[id(module), next(at for at, child in module._modules.items() if child is site)]
            deltas.append((spot, delta))
            described[spot.key] = _described(delta, spec, weight_at(module, site), site) | {
                "layer": layout(module, site.view)
            }
    return deltas, described


def _described(delta: Delta, spec: Spec, weight: Tensor, site: Adapters) -> dict[str, Any]:
    options = dataclasses.asdict(delta.o)
    base = whole(weight) if site.kept is None else site.kept
    blocks: dict[str, Any] = {}
    if isinstance(delta, Fused):
        parts = {str(i): dataclasses.asdict(part.o) for i, part in enumerate(delta.deltas)}
        apart = {i: {key: value for key, value in own.items() if options[key] != value} for i, own in parts.items()}
        blocks = {"blocks": delta.sizes, "apart": {i: own for i, own in apart.items() if own}}
    return blocks | {
        "shape": list(site.view.shape),
        "dtype": str(base.dtype).removeprefix("torch."),
        "base": fingerprint(base) if base.is_floating_point() and not site.coded else "",
        "options": {key: value for key, value in options.items() if spec.options.get(key) != value},
    }


def _write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], config: dict[str, Any]) -> None:
    if path.suffix == ".safetensors":
        write_tensors(path, tensors, header)
        return
    if path.exists() and not path.is_dir():
        raise AdapterError(f"{path} is a file; give NAME.safetensors or a directory")
    if path.is_dir() and any(path.iterdir()) and not (path / CONFIG).is_file():
        raise AdapterError(f"{path} is in use by something that is no adapter; give another directory")
    with atomic_directory(path) as partial:
        write_tensors(partial / WEIGHTS, tensors, header)
        write_json(partial / CONFIG, config)
        (partial / "README.md").write_text(_card(config), encoding="utf-8")


def _card(config: Mapping[str, Any]) -> str:
    rows = "".join(f"| {key} | {json.dumps(value)} |\n" for key, value in config["options"].items())
    return (
        f"---\ntags: [fallow, {config['method']}]\n---\n\n# A {config['method']} adapter\n\n"
        f"It adapts {len(config['weights'])} weights. Load it on the base that it was trained on:\n\n"
        "```python\nimport fallow\n\nfallow.load(model, 'path/to/this/directory')\n```\n\n"
        f"| option | value |\n| --- | --- |\n{rows}"
    )


def load(model: nn.Module, path: str | Path, name: str = "default", *, force: bool = False) -> nn.Module:
    """Add a saved adapter to a model, in place, and make it the only active one; returns the model.

    `path`: what `save` wrote, a directory or a file. `force`: also onto a base with other values than those trained on.
    AdapterError for a file that is broken, lacks tensors or has others or some of another shape, is of another program,
    or does not fit the model; the model is then as it was.
    """
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    tensors, header = read_tensors(file)
    told = _told(file, header)
    refuse_not_finite(file, tensors)
    method = _method(file, told["method"])
    check_name(model, name)
    every = spots(model)
    planned = _planned(file, told, model, every, force)
    try:
        common = dataclasses.asdict(make_options(method, told["options"]))
        begun: dict[str, Any] = {key: told[key] for key in ("start", "budget", "objective") if key in told}
        objective = penalty_of(begun.get("objective"))
        spec = Spec(method.name, common, told["seed"], "step", begun)
        plan = [(spot, {**common, **own}) for spot, own, _ in planned]
        blocks = {id(spot.parameter()): held for spot, _, held in planned if held is not None}
        made = prepare(model, method, plan, every, name, spec, fresh=False, blocks=blocks)
    except ConfigError as error:
        raise AdapterError(f"{file} cannot be loaded: {error}") from None
    if len(made.deltas) != len(planned):
        raise AdapterError(f"{file} adapts weights one by one that are shared in this {type(model).__name__}")
    _fill(file, made, tensors)
    install(model, made, every, objective=objective)
    finish(model, name)
    return model


def exchange(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Let a loaded adapter be the one that `path` holds: same method, options, weights and base.

    Values are copied; no module or Parameter is exchanged, so that a compiled model stays compiled. AdapterError for a
    file that differs in these or is broken, ConfigError while adapters are merged; the model is then as it was.
    """
    root, shared = needed(model, name)
    refuse_merged(model, "hotswap")
    path, spec = Path(path), shared.specs[name]
    file = path / WEIGHTS if path.is_dir() else path
    tensors, header = read_tensors(file)
    told = _told(file, header)
    refuse_not_finite(file, tensors)
    deltas, described = _held(root, spec, name)
    own = {"method": spec.method, "seed": spec.seed, **spec.options}
    _refuse_other(file, {"method": told["method"], "seed": told["seed"], **told["options"]}, own, name)
    for key in sorted(told["weights"].keys() ^ described.keys()):
        raise AdapterError(f"{file} or adapter '{name}' adapts '{key}', not both; load it as another adapter instead")
    for key, weight in described.items():
        of_file = told["weights"][key]
        for part in ("shape", "options", "blocks", "apart"):
            _refuse_other(f"{file} at '{key}'", {part: of_file.get(part)}, {part: weight.get(part)}, name)
        if weight["base"] and of_file["base"] and weight["base"] != of_file["base"]:
            raise AdapterError(f"{file} was trained on another base: '{key}' differs; load it onto its own")
    _fill(file, Prepared(REGISTRY[spec.method], name, shared[name], deltas, spec), tensors)


def _refuse_other(place: object, given: Mapping[str, Any], own: Mapping[str, Any], name: str) -> None:
    """AdapterError, by name, for the first thing that a file has otherwise than the adapter in the model."""
    own = json.loads(json.dumps(own))  # as a file has it
    for key in dict.fromkeys([*given, *own]):
        if given.get(key) != own.get(key):
            raise AdapterError(
                f"{key}={given.get(key)!r} in {place}, where adapter '{name}' has {own.get(key)!r}; load it as another "
                "adapter instead"
            )


def _told(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    if header.get("format") != FORMAT:
        raise AdapterError(
            f"{file} was not written by fallow.save (its metadata say format {header.get('format')!r}); adapters in "
            "PEFT's format are loaded with PeftModel.from_pretrained, sparse ones with fallow.Adapters"
        )
    if header.get("version") != str(VERSION):
        raise AdapterError(
            f"{file} has version {header.get('version')} of the format, this Fallow reads {VERSION}; update Fallow"
        )
    try:
        told = parse_json(header["fallow"])
        tables = [told, told["options"], told["weights"], *told["weights"].values()]
        tables += [weight["options"] for weight in told["weights"].values()]
        texts = [told["method"], *(weight[key] for weight in told["weights"].values() for key in ("base", "dtype"))]
        if not all(isinstance(table, dict) for table in tables) or not all(isinstance(text, str) for text in texts):
            raise ValueError("something in them is no table or no text")
        if type(told["seed"]) is not int or not told["weights"]:
            raise ValueError("the seed is no whole number, or there are no weights")
        shapes = [weight["shape"] for weight in told["weights"].values()]
        if not all(isinstance(shape, list) and all(type(side) is int for side in shape) for shape in shapes):
            raise ValueError("a shape is none")
        return cast("dict[str, Any]", told)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"{file} has broken metadata ({error}); train or copy it again") from None


def _method(file: Path, name: str) -> type[Delta]:
    if name not in REGISTRY:
        raise AdapterError(f"{file} is of the method '{name}', which this Fallow lacks{nearest(name, REGISTRY)}")
    return REGISTRY[name]


def _planned(
    file: Path, told: Mapping[str, Any], model: nn.Module, every: list[Spot], force: bool
) -> list[tuple[Spot, dict[str, Any], Blocks | None]]:
    """The weights that the file adapts, with their options and blocks. AdapterError where the model has others."""
    by_key = {spot.key: spot for spot in every}
    planned = []
    for key, described in told["weights"].items():
        if (spot := by_key.get(key)) is None:
            close = nearest(key, by_key)
            raise AdapterError(f"{file} adapts '{key}', which {type(model).__name__} lacks{close}")
        check_weight(spot)
        shape = list(spot.view().shape)
        if shape != described["shape"]:
            raise AdapterError(
                f"{file} adapts '{key}' of {described['shape']}, which is {shape} in this {type(model).__name__}; give "
                "the base that it was trained on"
            )
        weight = spot.parameter()
        trained_in = getattr(torch, described["dtype"], None)
        known = described["base"] and weight.is_floating_point() and not is_coded(weight)
        if known and not force and not matches(described["base"], weight, trained_in):
            raise AdapterError(
                f"{file} was trained on another base: '{key}' holds other values ({described['dtype']} in training, "
                f"{str(weight.dtype).removeprefix('torch.')} now). Give the base that it was trained on, or force=True "
                "if you know that it is close enough"
            )
        planned.append((spot, described["options"], _blocks(file, key, told, described)))
        if spot.reader and spot.view().blocks and planned[-1][2] is None:
            raise AdapterError(
                f"{file} adapts the stack '{key}' as one matrix, as this Fallow does not; train it again"
            )
    return planned


def _blocks(file: Path, key: str, told: Mapping[str, Any], described: Mapping[str, Any]) -> Blocks | None:
    if "blocks" not in described:
        return None
    sizes, apart = described["blocks"], described.get("apart", {})
    if not isinstance(sizes, list) or not all(type(size) is int for size in sizes) or not isinstance(apart, dict):
        raise AdapterError(f"{file} has broken metadata (the blocks of '{key}'); train or copy it again")
    common = {**told["options"], **described["options"]}
    numbers = {str(number) for number in range(len(sizes))}
    if not all(number in numbers and isinstance(own, dict) for number, own in apart.items()):
        raise AdapterError(f"{file} has broken metadata (the blocks of '{key}'); train or copy it again")
    return sizes, {int(number): {**common, **own} for number, own in apart.items()}


def _fill(file: Path, made: Prepared, tensors: Mapping[str, Tensor]) -> None:
    """Give the prepared adapter the values of the file. AdapterError unless both have the same tensors."""
    wanted = {spot.state_key(key): value for spot, delta in made.deltas for key, value in delta.state_dict().items()}
    wanted |= {f"{SHARED}.{key}": value for key, value in made.common.state_dict().items()}
    for key in (key for key in wanted if key not in tensors):
        raise AdapterError(f"{file} lacks '{key}'; it is incomplete, or of another version of '{made.method.name}'")
    for key in (key for key in tensors if key not in wanted):
        raise AdapterError(f"{file} holds '{key}', which '{made.method.name}' has not{nearest(key, wanted)}")
    for key, value in wanted.items():
        if tensors[key].shape != value.shape or tensors[key].is_floating_point() != value.is_floating_point():
            raise AdapterError(
                f"{file} has '{key}' as {tuple(tensors[key].shape)} {tensors[key].dtype}, where "
                f"'{made.method.name}' with its options has {tuple(value.shape)} {value.dtype}"
            )
    with torch.no_grad():
        for key, value in wanted.items():
            value.copy_(tensors[key])
