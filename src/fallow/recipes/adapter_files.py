"""The kinds of adapter that the text-to-image recipe writes and reads, and their common meaning: base + scale x change.

    sparse   some entries of the weights (SaRA, SHiRA, ...): a file or directory of `fallow.core.sparse`
    peft     whatever PEFT saves (LoRA, LoHa, OFT, ...): a directory with PEFT's own adapter_config.json
    full     all weights of the network (full fine-tuning): a directory, adapter_config.json says kind "full"
    file     one safetensors file of diffusers, kohya or LyCORIS, of one or several parts of the pipeline
    parts    a directory of peft directories, one for each part of the pipeline
    delta    a weight parameterization as `fallow.save` writes it: a file or directory

The directories hold adapter_config.json, adapter_model.safetensors and README.md. A run directory stands for its
adapter/. In a `full` and a `peft` directory that Fallow wrote, the safetensors metadata carry (under "fallow") the
fingerprints of the base; a PEFT adapter from elsewhere has none, and is taken for any base that it fits.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fallow.core.errors import AdapterError, ConfigError
from fallow.core.files import fingerprint, write_json, write_tensors
from fallow.core.host.files import FORMAT as OWN
from fallow.core.select import named_weights
from fallow.core.sparse import CONFIG, WEIGHTS, SparseDelta, is_sparse
from fallow.recipes.adapter_changes import Change, FullChange, LayersChange, PeftChange, SparseChange, wide
from fallow.recipes.adapter_directory import (
    FULL_USE,
    NETWORKS,
    PEFT_USE,
    PREFIX,
    VERSION,
    WHAT_TO_GIVE,
    card,
    header,
    new_directory,
    noted,
    opened,
    read_config,
    shapes_in,
)
from fallow.recipes.approximation import Losses
from fallow.recipes.bare_networks import adapted_names, bare, bare_parameters, own_parameters
from fallow.recipes.formats import peft as peft_format
from fallow.recipes.formats import reading
from fallow.recipes.formats.layers import Adapter

Kind = Literal["sparse", "peft", "full", "file", "parts", "delta"]


# -- what lies there --------------------------------------------------------------------------------------------------


def locate(path: str | Path) -> Path:
    """The adapter that a path means: itself, the adapter/ of a run directory, or the file of diffusers' in a directory.

    AdapterError if nothing is there.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise AdapterError(f"adapter {path} does not exist; {WHAT_TO_GIVE}")
    if place.is_dir() and (file := reading.inner_file(place)) is not None:
        return file
    if place.is_dir() and not (place / CONFIG).exists() and (place / "adapter").is_dir():
        return place / "adapter"
    return place


def kind_of(path: str | Path) -> Kind:
    """What kind of adapter lies there. AdapterError where it is none, broken, or of a kind that is unknown."""
    place = locate(path)
    if place.is_file():
        with opened(place) as found:  # a file that is cut off is told as such
            if (found.metadata() or {}).get("format") == OWN:
                return "delta"
        if is_sparse(place):
            return "sparse"
        if reading.is_one(place):
            return "file"
        raise AdapterError(f"{place} is no adapter of a format that Fallow reads; {WHAT_TO_GIVE}")
    if not (place / CONFIG).is_file() and peft_format.parts_in(place):
        return "parts"
    if not (place / WEIGHTS).is_file():
        held = [file.name for file in sorted(place.glob("*.safetensors"))]
        hint = f"; it holds {held[0]}" if held else ""
        raise AdapterError(f"{place} is no adapter: it has no {WEIGHTS}{hint}; {WHAT_TO_GIVE}")
    with opened(place / WEIGHTS) as found:
        if (found.metadata() or {}).get("format") == OWN:
            return "delta"
    if is_sparse(place):
        return "sparse"
    config = read_config(place)
    if "peft_type" in config:
        return "peft"
    if config.get("kind") == "full":
        return "full"
    raise AdapterError(
        f"{place / CONFIG} says kind {config.get('kind')!r}, which this Fallow does not know (it reads sparse, full "
        "and PEFT's); update Fallow, or give another adapter"
    )


def adapter_size(path: str | Path) -> tuple[int, int]:
    """Trained parameters, and bytes on disk: of the file, or of all files of the directory. AdapterError."""
    place, kind = locate(path), kind_of(path)
    if kind == "sparse":
        trained = SparseDelta.load(place).trained
    elif kind == "parts":
        trained = sum(adapter_size(place / part)[0] for part in peft_format.parts_in(place))
    elif kind == "delta":
        file = place / WEIGHTS if place.is_dir() else place
        trained = sum(math.prod(shape) for shape in shapes_in(file).values())
    elif kind == "file":
        trained = sum(math.prod(shape) for name, shape in shapes_in(place).items() if not name.endswith(".alpha"))
    else:
        trained = sum(math.prod(shape) for shape in shapes_in(place / WEIGHTS).values())
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    return trained, sum(file.stat().st_size for file in files)


# -- writing ----------------------------------------------------------------------------------------------------------


def base_fingerprints(network: nn.Module, names: Sequence[str] | None = None) -> dict[str, str]:
    """Parameter name -> fingerprint, of all (or these) parameters. Take it before training. A second per 10^8 entries.

    Names are those of the bare network, also where PEFT's layers have been put into it.
    """
    base = bare_parameters(network)
    return {name: fingerprint(base[name]) for name in (base if names is None else names)}


def save_full(
    network: nn.Module,
    folder: str | Path,
    base_fingerprints: Mapping[str, str],
    metadata: Mapping[str, Any],
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write all parameters of a network as an adapter directory; an older one is replaced when this one is complete.

    `base_fingerprints`: those of the weights before training, by `base_fingerprints`. `metadata`: JSON values, shown by
    `fallow adapter info`. Weights are written in the dtype they have. `notes`: what else the file's metadata say.
    """
    own: nn.Module = bare(network)
    parameters = own_parameters(own)
    if lasting := [name for name, part in own.named_modules() if getattr(part, "track_running_stats", False)]:
        raise ConfigError(
            f"'{lasting[0]}' keeps running statistics, which training changes and kind full does not store"
        )
    missing = parameters.keys() - base_fingerprints.keys()
    if missing:
        raise ConfigError(f"base_fingerprints lack {len(missing)} weights, such as {min(missing)}; give those of all")
    base = {name: [base_fingerprints[name], _told(p.dtype)] for name, p in parameters.items()}
    config = {**metadata, "kind": "full", "version": VERSION, "trained": sum(p.numel() for p in parameters.values())}
    with new_directory(folder) as partial:
        write_tensors(partial / WEIGHTS, parameters, {**(notes or {}), **noted(base, metadata)})
        write_json(partial / CONFIG, config)
        (partial / "README.md").write_text(card("full", metadata, FULL_USE), encoding="utf-8")
    return Path(folder)


def save_peft(
    network: nn.Module,
    folder: str | Path,
    metadata: Mapping[str, Any],
    notes: Mapping[str, str] | None = None,
    name: str = "default",
) -> Path:
    """Write a network's PEFT adapter as a directory that PEFT's own `PeftModel.from_pretrained(unet, folder)` loads.

    `network`: the bare network into which `peft.inject_adapter_in_model` or diffusers' `add_adapter` put the adapter
    `name`, or the PeftModel around it. `metadata`: JSON values, shown by `fallow adapter info`; `notes`: what else the
    file's metadata say, for other tools.
    """
    from peft import get_peft_model_state_dict

    own: Any = bare(network)
    if name not in getattr(own, "peft_config", {}):
        raise ConfigError(f"the network has no PEFT adapter named '{name}'; put one in with inject_adapter_in_model")
    check_peft(own.peft_config[name])
    tensors = {PREFIX + key: value for key, value in get_peft_model_state_dict(own, adapter_name=name).items()}
    own.peft_config[name].to_dict()  # a copy does not follow what becomes of its Deltas, as by a start or a new rank
    settings = copy.copy(own.peft_config[name])
    settings.inference_mode = True
    if hasattr(settings, "_given"):  # a weight parameterization of ours
        metadata = {"method": settings.method, "options": settings._given(), **metadata}
    parameters = bare_parameters(own)
    adapted = adapted_names(own)
    trained_biases = getattr(settings, "bias", "none") != "none"  # these are no longer the base's
    names = [key for key in parameters if key in adapted and not (trained_biases and key.endswith("bias"))]
    base = {key: [fingerprint(parameters[key]), _told(parameters[key].dtype)] for key in names}
    with new_directory(folder) as partial:
        settings.save_pretrained(str(partial))
        write_tensors(partial / WEIGHTS, tensors, {**(notes or {}), **noted(base, metadata)})
        (partial / "README.md").write_text(card(settings.peft_type.value, metadata, PEFT_USE), encoding="utf-8")
    return Path(folder)


def save_adapter(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = "default",
    *,
    trigger_phrase: str | None = None,
    settings: Mapping[str, Any] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write an adapter of PEFT's host as `save_pretrained` does, with what it is told in the file's header too.

    PEFT writes no metadata. Here the safetensors header says the method, its options, the fingerprint of every adapted
    weight, `settings` of the training (JSON values), the trigger phrase where web UIs look for it, and `notes`, other
    keys of theirs (`modelspec.*`, `ss_*`). PEFT loads it as its own. Whole or not at all. ConfigError where there is no
    such adapter, it is merged, or `modules_to_save` has modules that were trained whole.
    """
    if any(adapter_name in getattr(layer, "merged_adapters", ()) for layer in model.modules()):
        raise ConfigError(f"adapter '{adapter_name}' is merged; call unmerge_adapter() first")
    try:
        json.dumps(dict(settings or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"settings={settings!r} cannot be written as JSON: {error}") from None
    told = dict(notes or {})
    if wrong := [name for name, value in told.items() if not isinstance(value, str) or name in ("format", "fallow")]:
        raise ConfigError(f"notes: {wrong[0]}={told[wrong[0]]!r} must be a text, and not 'format' or 'fallow'")
    if trigger_phrase is not None:
        told |= {"modelspec.trigger_phrase": trigger_phrase}
    return save_peft(model, path, settings or {}, told, adapter_name)


def check_peft(settings: Any) -> None:
    """Before training: ConfigError for a PEFT config whose adapter could not be applied as a change of weights."""
    if getattr(settings, "modules_to_save", None):
        raise ConfigError(
            f"modules_to_save={settings.modules_to_save}: modules that are trained whole are not kept with an adapter; "
            "leave it out"
        )
    if settings.is_prompt_learning:
        raise ConfigError(f"peft_type={settings.peft_type.value} learns prompts and changes no weight; give another")


def _told(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- applying ---------------------------------------------------------------------------------------------------------


def apply_adapter(network: nn.Module, path: str | Path, scale: float = 1.0, force: bool = False) -> None:
    """Put one adapter of any kind on a network, in place: base + scale x change. Raises as `apply_together`."""
    apply_together(network, [(path, scale)], force=force)


def apply_together(network: nn.Module, adapters: Sequence[tuple[str | Path, float]], *, force: bool = False) -> None:
    """Put several adapters on a network that shows its base, in place: base + the sum of scale x change.

    Each change is taken against the base, whatever the order; sums are made in float32 and rounded once. A single
    `full` or value-storing adapter at scale 1 is restored bit for bit. All are read and checked before any weight is
    touched. Raises AdapterError for what is broken, fits nothing or (unless `force`) has another base; ConfigError for
    a scale that is no finite number.
    """
    plan = prepare(network, adapters, force=force)
    if plan.unused:
        raise AdapterError(
            f"{plan.unused[0]} changes text encoders alone, and {type(network).__name__} is none; put it on a pipeline"
        )
    plan.apply()


def prepare(
    network: nn.Module, adapters: Sequence[tuple[str | Path, float]], *, force: bool = False, part: str | None = None
) -> Plan:
    """The first half of `apply_together`: all is read and checked, and no weight touched.

    `part`: the network's name in the pipeline where it is a text encoder; then adapters change nothing that have
    nothing for it. None is the network that denoises.
    """
    for path, scale in adapters:
        if not math.isfinite(scale):
            raise ConfigError(f"scale={scale} of {path} must be a finite number; 0 is off, 1 as trained")
    network = bare(network)
    read = [
        (read_change(path, part, {part or "unet": list(named_weights(network))}), scale) for path, scale in adapters
    ]
    changes = [(change, scale) for change, scale in read if change is not None]
    for change, _ in changes:
        change.check(network, force)
    plan = Plan(network, unused=[path for (path, _), (change, _) in zip(adapters, read, strict=True) if change is None])
    for change, scale in changes:
        if scale:
            for name in change.changed(network):
                plan.parts.setdefault(name, []).append((change, scale))
    return plan


@dataclass
class Plan:
    """What is to be done to the weights of a network: by name, the changes with their scales. `unused`: adapters that
    have nothing for it.
    """

    network: nn.Module
    parts: dict[str, list[tuple[Change, float]]] = field(default_factory=dict)
    unused: Sequence[str | Path] = ()

    @torch.no_grad()
    def apply(self) -> None:
        weights = named_weights(self.network)
        for name, parts in self.parts.items():
            weight = weights[name]
            if len(parts) == 1 and parts[0][1] == 1:
                weight.copy_(parts[0][0].exact(name, weight))
                continue
            total = wide(weight)
            for change, scale in parts:
                change.add_to(total, name, weight, scale)
            weight.copy_(total)


def other_parts(path: str | Path) -> list[str]:
    """The parts of the pipeline besides the denoising network that an adapter changes: text encoders."""
    place, kind = locate(path), kind_of(path)
    if kind not in ("file", "parts"):
        return []
    if kind == "file" and not reading.names_encoders(place):
        return []
    parts = reading.read(place).parts if kind == "file" else peft_format.parts_in(place)
    return [part for part in parts if part not in NETWORKS]


def settings_of(path: str | Path) -> dict[str, Any]:
    """What Fallow noted of the training of an adapter; {} for one from elsewhere."""
    place, kind = locate(path), kind_of(path)
    if kind == "parts":
        place = place / peft_format.parts_in(place)[0]
    found = header(place / WEIGHTS if place.is_dir() else place).get("metadata", {})
    return found if isinstance(found, dict) else {}


def read_change(
    path: str | Path, part: str | None = None, known: Mapping[str, Collection[str]] | None = None
) -> Change | None:
    """Read an adapter of any kind, ready to be applied. AdapterError where it is broken.

    `part`: of the pipeline, None is the network that denoises; None comes back where the adapter has nothing for it.
    `known`: by part, the names of the weights that it is for, by which names of kohya's are understood.
    """
    place, kind = locate(path), kind_of(path)
    if kind == "parts":
        name = next((one for one in peft_format.parts_in(place) if one == part or (not part and one in NETWORKS)), None)
        if name is None:
            return None
        if name not in NETWORKS and kind_of(place / name) == "peft":
            # text encoders bear other names in other versions of transformers, which PEFT does not know of
            with contextlib.suppress(AdapterError):  # what is no plain LoRA is PEFT's to put there
                return LayersChange.of(place / name, peft_format.read(place / name, name), name)
        return read_change(place / name)
    if kind == "file":
        return LayersChange.of(place, reading.read(place, known), part)
    if kind == "delta":
        return LayersChange.of(place, _of_delta(place), part)
    if part is not None:
        return None
    if kind == "sparse":
        return SparseChange(SparseDelta.load(place))
    base = header(place / WEIGHTS).get("base", {})
    return FullChange(place, base) if kind == "full" else PeftChange(place, base)


def _of_delta(place: Path) -> Adapter:
    from fallow.recipes.formats import deltas  # which imports PEFT

    return deltas.read(place, "diffusers", Losses())
