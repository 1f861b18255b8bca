"""The kinds of adapter that the text-to-image recipe writes and reads, and their common meaning: base + scale x change.

    sparse   some entries of the weights (SaRA, SHiRA, ...): a file or directory of `fallow.core.sparse`
    peft     whatever PEFT saves (LoRA, LoHa, OFT, ...): a directory with PEFT's own adapter_config.json
    full     all weights of the network (full fine-tuning): a directory, adapter_config.json says kind "full"

The directories hold adapter_config.json, adapter_model.safetensors and README.md. A run directory stands for its
adapter/. In a `full` and a `peft` directory that Fallow wrote, the safetensors metadata carry (under "fallow") the
fingerprints of the base; a PEFT adapter from elsewhere has none, and is taken for any base that it fits.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fallow.core.errors import AdapterError, ConfigError, nearest
from fallow.core.files import atomic_directory, fingerprint, matches, write_json, write_tensors
from fallow.core.select import named_weights, plain_name
from fallow.core.sparse import CONFIG, WEIGHTS, SparseDelta, is_sparse

Kind = Literal["sparse", "peft", "full"]
PREFIX = "base_model.model."  # before the names in PEFT's files
VERSION = 1
WHAT_TO_GIVE = "give an adapter directory, a run directory, or a sparse adapter's .safetensors file"


# -- what lies there --------------------------------------------------------------------------------------------------


def locate(path: str | Path) -> Path:
    """The adapter that a path means: itself, or the adapter/ of a run directory. AdapterError if nothing is there."""
    place = Path(path).expanduser()
    if not place.exists():
        raise AdapterError(f"adapter {path} does not exist; {WHAT_TO_GIVE}")
    if place.is_dir() and not (place / CONFIG).exists() and (place / "adapter").is_dir():
        return place / "adapter"
    return place


def kind_of(path: str | Path) -> Kind:
    """What kind of adapter lies there. AdapterError where it is none, broken, or of a kind that is unknown."""
    place = locate(path)
    if place.is_file():
        with _opened(place):  # a file that is cut off is told as such
            pass
        if is_sparse(place):
            return "sparse"
        raise AdapterError(f"{place} is no sparse adapter; {WHAT_TO_GIVE}")
    if not (place / WEIGHTS).is_file():
        held = [file.name for file in sorted(place.glob("*.safetensors"))]
        hint = f"; it holds {held[0]}" if held else ""
        raise AdapterError(f"{place} is no adapter: it has no {WEIGHTS}{hint}; {WHAT_TO_GIVE}")
    with _opened(place / WEIGHTS):
        pass
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


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a directory. AdapterError where it is missing or broken."""
    file = folder / CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{folder} is no adapter: it has no {CONFIG}; {WHAT_TO_GIVE}") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read ({error}); copy the adapter again") from None
    if not isinstance(found, dict):
        raise AdapterError(f"{file} holds no settings; copy the adapter again")
    return found


def header(path: Path) -> dict[str, Any]:
    """What Fallow noted in the metadata of a safetensors file of kind full or peft: `base` and `metadata`; or {}."""
    with _opened(path) as opened:
        noted = (opened.metadata() or {}).get("fallow", "{}")
    try:
        found = json.loads(noted)
        return found if isinstance(found, dict) else {}
    except ValueError as error:
        raise AdapterError(f"{path} has broken metadata ({error}); copy it again") from None


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a safetensors file."""
    with _opened(path) as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def adapter_size(path: str | Path) -> tuple[int, int]:
    """Trained parameters, and bytes on disk: of the file, or of all files of the directory. AdapterError."""
    place, kind = locate(path), kind_of(path)
    if kind == "sparse":
        trained = SparseDelta.load(place).trained
    else:
        trained = sum(math.prod(shape) for shape in shapes_in(place / WEIGHTS).values())
    files = [place] if place.is_file() else [file for file in place.iterdir() if file.is_file()]
    return trained, sum(file.stat().st_size for file in files)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{file} cannot be read as safetensors ({error}); it may have been cut off: copy or train it again"
        ) from None


# -- writing ----------------------------------------------------------------------------------------------------------


def base_fingerprints(network: nn.Module, names: Sequence[str] | None = None) -> dict[str, str]:
    """Parameter name -> fingerprint, of all (or these) parameters. Take it before training. A second per 10^8 entries.

    Names are those of the bare network, also where PEFT's layers have been put into it.
    """
    base = bare_parameters(network)
    return {name: fingerprint(base[name]) for name in (base if names is None else names)}


def bare_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The network's own parameters under their own names, without those of PEFT's layers in it.

    A layer that PEFT has taken keeps its weight as `<layer>.base_layer.weight`; here it is `<layer>.weight`.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    own = bare(network)
    added = {
        id(parameter)
        for module in own.modules()
        if isinstance(module, BaseTunerLayer)
        for name in module.adapter_layer_names
        if isinstance(held := getattr(module, name, None), (nn.Module, nn.ParameterDict))
        for parameter in held.parameters()
    }
    named = {name: p for name, p in _own_parameters(own).items() if id(p) not in added}
    return {name.replace(".base_layer.", "."): p for name, p in named.items()}


def _own_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Each parameter once, under its plain name, also where blocks of the network have been compiled."""
    return {plain_name(name): parameter for name, parameter in network.named_parameters()}


def bare(network: nn.Module) -> Any:
    """The network within a PeftModel or what torch.compile made; any other as it is."""
    inner: Any = getattr(network, "_orig_mod", network)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def save_full(
    network: nn.Module, folder: str | Path, base_fingerprints: Mapping[str, str], metadata: Mapping[str, Any]
) -> Path:
    """Write all parameters of a network as an adapter directory; an older one is replaced when this one is complete.

    `base_fingerprints`: those of the weights before training, by `base_fingerprints`. `metadata`: JSON values, shown by
    `fallow adapter info`. Weights are written in the dtype they have.
    """
    own: nn.Module = bare(network)
    parameters = _own_parameters(own)
    if lasting := sorted({plain_name(key) for key in own.state_dict()} - named_weights(own).keys()):
        raise ConfigError(f"the network has buffers ({lasting[0]}, ...), which kind full does not store")
    missing = parameters.keys() - base_fingerprints.keys()
    if missing:
        raise ConfigError(f"base_fingerprints lack {len(missing)} weights, such as {min(missing)}; give those of all")
    base = {name: [base_fingerprints[name], _told(p.dtype)] for name, p in parameters.items()}
    config = {**metadata, "kind": "full", "version": VERSION, "trained": sum(p.numel() for p in parameters.values())}
    with _directory(folder) as partial:
        write_tensors(partial / WEIGHTS, parameters, _header(base, metadata))
        write_json(partial / CONFIG, config)
        (partial / "README.md").write_text(_card("full", metadata, _FULL_USE), encoding="utf-8")
    return Path(folder)


def save_peft(network: nn.Module, folder: str | Path, metadata: Mapping[str, Any], name: str = "default") -> Path:
    """Write a network's PEFT adapter as a directory that PEFT's own `PeftModel.from_pretrained(unet, folder)` loads.

    `network`: the bare network into which `peft.inject_adapter_in_model` or diffusers' `add_adapter` put the adapter
    `name`, or the PeftModel around it. `metadata`: JSON values, shown by `fallow adapter info`.
    """
    from peft import get_peft_model_state_dict

    own: Any = bare(network)
    if name not in getattr(own, "peft_config", {}):
        raise ConfigError(f"the network has no PEFT adapter named '{name}'; put one in with inject_adapter_in_model")
    settings = copy.copy(own.peft_config[name])
    check_peft(settings)
    settings.inference_mode = True
    tensors = {PREFIX + key: value for key, value in get_peft_model_state_dict(own, adapter_name=name).items()}
    parameters = bare_parameters(own)
    adapted = adapted_names(own)
    trained_biases = getattr(settings, "bias", "none") != "none"  # these are no longer the base's
    names = [key for key in parameters if key in adapted and not (trained_biases and key.endswith("bias"))]
    base = {key: [fingerprint(parameters[key]), _told(parameters[key].dtype)] for key in names}
    with _directory(folder) as partial:
        settings.save_pretrained(str(partial))
        write_tensors(partial / WEIGHTS, tensors, _header(base, metadata))
        (partial / "README.md").write_text(_card(settings.peft_type.value, metadata, _PEFT_USE), encoding="utf-8")
    return Path(folder)


@contextlib.contextmanager
def _directory(folder: str | Path) -> Iterator[Path]:
    """A new adapter directory, in the place of an older adapter when complete; AdapterError where other things are."""
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise AdapterError(f"{place} is a file; give a directory")
    if place.is_dir() and any(place.iterdir()) and not (place / CONFIG).is_file():
        raise AdapterError(f"{place} is in use by something that is no adapter; give another directory")
    with atomic_directory(place) as partial:
        yield partial


def check_peft(settings: Any) -> None:
    """Before training: ConfigError for a PEFT config whose adapter could not be applied as a change of weights."""
    if getattr(settings, "modules_to_save", None):
        raise ConfigError(
            f"modules_to_save={settings.modules_to_save}: modules that are trained whole are not kept with an adapter; "
            "leave it out"
        )
    if settings.is_prompt_learning:
        raise ConfigError(f"peft_type={settings.peft_type.value} learns prompts and changes no weight; give another")


def adapted_names(network: nn.Module) -> set[str]:
    """Names, in the bare network, of the parameters of the layers that PEFT adapts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = set()
    for place, module in bare(network).named_modules():
        if isinstance(module, BaseTunerLayer):
            found |= {f"{place}.{name}" for name, _ in module.get_base_layer().named_parameters()}
    return found


def _told(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _header(base: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, str]:
    return {"format": "pt", "fallow": json.dumps({"version": VERSION, "base": base, "metadata": dict(metadata)})}


_FULL_USE = "from fallow.recipes.adapter_files import apply_adapter\n\napply_adapter(pipeline.unet, 'path/to/this')"
_PEFT_USE = "from peft import PeftModel\n\nPeftModel.from_pretrained(pipeline.unet, 'path/to/this')"


def _card(method: str, metadata: Mapping[str, Any], use: str) -> str:
    rows = "\n".join(f"| {key} | {json.dumps(value)} |" for key, value in metadata.items() if value is not None)
    return (
        f"---\ntags: [fallow, {method.lower()}]\n---\n\n# A {method} adapter\n\nOn the base that it was trained on:\n\n"
        f"```python\n{use}\n```\n\n| setting | value |\n| --- | --- |\n{rows}\n"
    )


# -- applying ---------------------------------------------------------------------------------------------------------


class Change(Protocol):
    """What an adapter of any kind does to a network, one weight at a time."""

    def check(self, network: nn.Module, force: bool) -> None:
        """AdapterError where it fits nothing, or (unless forced) belongs to another base."""
        ...

    def changed(self, network: nn.Module) -> Sequence[str]:
        """The names of the weights it changes. The network is as before when it returns."""
        ...

    def add_to(self, total: Tensor, name: str, base: Tensor, scale: float) -> None:
        """total += scale * (changed weight - base), in place; `total` has the base's shape, float32 or float64."""
        ...

    def exact(self, name: str, base: Tensor) -> Tensor:
        """The changed weight in the base's dtype, as it was when training ended."""
        ...


def apply_adapter(network: nn.Module, path: str | Path, scale: float = 1.0, force: bool = False) -> None:
    """Put one adapter of any kind on a network, in place: base + scale x change. Raises as `apply_together`."""
    apply_together(network, [(path, scale)], force=force)


@torch.no_grad()
def apply_together(network: nn.Module, adapters: Sequence[tuple[str | Path, float]], *, force: bool = False) -> None:
    """Put several adapters on a network that shows its base, in place: base + the sum of scale x change.

    Each change is taken against the base, whatever the order; sums are made in float32 and rounded once. A single
    `full` or value-storing adapter at scale 1 is restored bit for bit. All are read and checked before any weight is
    touched. Raises AdapterError for what is broken, fits nothing or (unless `force`) has another base; ConfigError for
    a scale that is no finite number.
    """
    for path, scale in adapters:
        if not math.isfinite(scale):
            raise ConfigError(f"scale={scale} of {path} must be a finite number; 0 is off, 1 as trained")
    network = bare(network)
    changes = [(read_change(path), scale) for path, scale in adapters]
    for change, _ in changes:
        change.check(network, force)
    plan: dict[str, list[tuple[Change, float]]] = {}
    for change, scale in changes:
        if scale:
            for name in change.changed(network):
                plan.setdefault(name, []).append((change, scale))
    weights = named_weights(network)
    for name, parts in plan.items():
        weight = weights[name]
        if len(parts) == 1 and parts[0][1] == 1:
            weight.copy_(parts[0][0].exact(name, weight))
            continue
        total = _wide(weight)
        for change, scale in parts:
            change.add_to(total, name, weight, scale)
        weight.copy_(total)


def _wide(weight: Tensor) -> Tensor:
    """A row-major copy in float32, or float64 of such."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.detach().to(wide, copy=True).contiguous()


def read_change(path: str | Path) -> Change:
    """Read an adapter of any kind, ready to be applied. AdapterError where it is broken."""
    place, kind = locate(path), kind_of(path)
    if kind == "sparse":
        return SparseChange(SparseDelta.load(place))
    noted = header(place / WEIGHTS)
    base = noted.get("base", {})
    return FullChange(place, base) if kind == "full" else PeftChange(place, base)


@dataclass
class SparseChange:
    """Some entries of the weights."""

    delta: SparseDelta

    def check(self, network: nn.Module, force: bool) -> None:
        self.delta.check(network, force)

    def changed(self, network: nn.Module) -> Sequence[str]:
        return list(self.delta.entries)

    def add_to(self, total: Tensor, name: str, base: Tensor, scale: float) -> None:
        index = self.delta.entries[name].index.to(total.device)
        change = self.delta.deltas(name, base.flatten()[index])
        total.view(-1).index_add_(0, index.long(), change.to(total.dtype), alpha=scale)

    def exact(self, name: str, base: Tensor) -> Tensor:
        if self.delta.store == "delta":
            total = _wide(base)
            self.add_to(total, name, base, 1.0)
            return total.to(base.dtype)
        entry = self.delta.entries[name]
        new = base.flatten().clone()  # row-major, whatever the memory format
        new[entry.index.to(new.device).long()] = entry.values.to(new)
        return new.view(base.shape)


@dataclass
class FullChange:
    """All weights; read from the file one at a time."""

    folder: Path
    base: Mapping[str, Sequence[str]]

    def check(self, network: nn.Module, force: bool) -> None:
        found, named = shapes_in(self.folder / WEIGHTS), _own_parameters(network)
        _check_shapes(self.folder, found, named, network)
        missing = sorted(named.keys() - found.keys())
        if missing:
            raise AdapterError(
                f"{self.folder} lacks {len(missing)} weights of {type(network).__name__}, such as {missing[0]}; it "
                "belongs to another network"
            )
        _check_base(self.folder, self.base, named, force)

    def changed(self, network: nn.Module) -> Sequence[str]:
        return list(_own_parameters(network))

    def add_to(self, total: Tensor, name: str, base: Tensor, scale: float) -> None:
        total.add_(self._read(name).to(total) - base.to(total.dtype), alpha=scale)

    def exact(self, name: str, base: Tensor) -> Tensor:
        return self._read(name).to(base)

    def _read(self, name: str) -> Tensor:
        with _opened(self.folder / WEIGHTS) as opened:
            found: Tensor = opened.get_tensor(name)
            return found


@dataclass
class PeftChange:
    """Whatever PEFT can merge. Its change is what merging does to the weights, so it scales like the other kinds."""

    folder: Path
    base: Mapping[str, Sequence[str]]
    merged: dict[str, Tensor] = field(default_factory=dict)  # weight name -> the weight with the adapter merged

    def check(self, network: nn.Module, force: bool) -> None:
        named = dict(network.named_parameters())
        _check_base(self.folder, {k: v for k, v in self.base.items() if k in named}, named, force)
        self._merge(network)

    def changed(self, network: nn.Module) -> Sequence[str]:
        return list(self.merged)

    def add_to(self, total: Tensor, name: str, base: Tensor, scale: float) -> None:
        total.add_(self.merged[name].to(total) - base.to(total.dtype), alpha=scale)

    def exact(self, name: str, base: Tensor) -> Tensor:
        return self.merged[name].to(base)

    def _merge(self, network: nn.Module) -> None:
        """Let PEFT merge into the network, keep what came of it, and put the network back as it was, bit for bit."""
        from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        file = self.folder / WEIGHTS
        with _opened(file) as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        wants_gradient = {name: p.requires_grad for name, p in network.named_parameters()}
        training = {name: module.training for name, module in network.named_modules()}
        hosted: Any = None
        former: dict[str, Tensor] = {}
        try:
            settings = PeftConfig.from_pretrained(str(self.folder))
            settings.inference_mode = True
            with torch.random.fork_rng():  # PEFT draws first values, which the file's then replace
                hosted = get_peft_model(network, settings)
            self._check_tensors(tensors, get_peft_model_state_dict(hosted))
            own, adapted = bare_parameters(network), adapted_names(network)
            if getattr(settings, "bias", "none") != "none":
                adapted |= {name for name in own if name.endswith("bias")}
            former = {name: own[name].detach().clone() for name in own if name in adapted}
            set_peft_model_state_dict(hosted, tensors)
            hosted.merge_adapter(safe_merge=True)
            own = bare_parameters(network)
            self.merged = {
                name: own[name].detach().clone() for name, was in former.items() if not torch.equal(own[name], was)
            }
        except AdapterError:
            raise
        except _NOT_FOR_PEFT as error:
            raise AdapterError(
                f"{self.folder}: PEFT cannot put this adapter on {type(network).__name__} and merge it "
                f"({_first(error)}); give the kind of base that it was trained on"
            ) from None
        finally:
            own = bare_parameters(network)
            for name, was in former.items():
                own[name].data.copy_(was)
            if hosted is not None:
                hosted.unload()
                vars(network).pop("peft_config", None)  # what older versions of PEFT leave there
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(wants_gradient[name])
            for name, module in network.named_modules():
                module.training = training[name]

    def _check_tensors(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """AdapterError unless the file holds exactly the tensors that the adapter has on this network."""
        own = {f"{PREFIX}{name.removeprefix(PREFIX)}": tensor for name, tensor in own.items()}
        strange, missing = sorted(tensors.keys() - own.keys()), sorted(own.keys() - tensors.keys())
        if strange or missing:
            which = f"'{strange[0]}' fits no layer" if strange else f"'{missing[0]}' is missing"
            raise AdapterError(
                f"{self.folder} does not fit this network: {which} ({len(strange)} tensors too many, {len(missing)} "
                "too few); give the base that it was trained on"
            )
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise AdapterError(
                    f"{self.folder} does not fit this network: '{name}' is {tuple(tensor.shape)} and must be "
                    f"{tuple(own[name].shape)}; give the base that it was trained on"
                )


# What PEFT raises for settings it does not know, layers that are not there, and methods that cannot be merged.
_NOT_FOR_PEFT = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError)


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _check_shapes(
    folder: Path, found: Mapping[str, tuple[int, ...]], named: Mapping[str, Tensor], network: nn.Module
) -> None:
    for name, shape in found.items():
        if name not in named:
            raise AdapterError(
                f"{folder} changes '{name}', which {type(network).__name__} lacks{nearest(name, list(named)[:500])}; "
                "give the base that it was trained on"
            )
        if tuple(named[name].shape) != shape:
            raise AdapterError(
                f"{folder} changes '{name}' {shape}, which is {tuple(named[name].shape)} in this model; give the base "
                "that it was trained on"
            )


def _check_base(folder: Path, base: Mapping[str, Sequence[str]], named: Mapping[str, Tensor], force: bool) -> None:
    if force:
        return
    for name, (of_base, dtype) in base.items():
        if name not in named or not matches(of_base, named[name], getattr(torch, dtype, None)):
            raise AdapterError(
                f"{folder} was trained on another base: '{name}' holds other values. Give the base that it was trained "
                "on, or force it (force=True, --force) if you know that it is close enough"
            )
