"""What an adapter of each kind does to the weights of a network."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fallow.core.errors import AdapterError, nearest
from fallow.core.files import matches, refuse_not_finite
from fallow.core.select import named_weights
from fallow.core.sparse import WEIGHTS, SparseDelta
from fallow.recipes.adapter_directory import NETWORKS, PREFIX, opened, read_config, shapes_in
from fallow.recipes.bare_networks import adapted_names, bare_parameters, own_parameters
from fallow.recipes.formats.layers import Adapter, Dense, Factors, Layer, finite, plain


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


def wide(weight: Tensor) -> Tensor:
    """A row-major copy in float32, or float64 of such."""
    precision = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.detach().to(precision, copy=True).contiguous()


@dataclass
class LayersChange:
    """Factors and full changes from a file of diffusers, kohya or LyCORIS."""

    place: Path
    layers: Mapping[str, Layer]
    base: Mapping[str, Sequence[str]]
    found: dict[str, Layer] = field(default_factory=dict)  # the network's name of the weight -> what changes it

    @staticmethod
    def of(place: Path, adapter: Adapter, part: str | None) -> LayersChange | None:
        """The change of one part of the pipeline; None where the adapter has nothing for it."""
        name = next((one for one in adapter.parts if one == part or (part is None and one in NETWORKS)), None)
        return None if name is None else LayersChange(place, adapter.parts[name], adapter.base.get(name, {}))

    def check(self, network: nn.Module, force: bool) -> None:
        named = named_weights(network)
        own = {plain(name): name for name in named}
        for name, layer in self.layers.items():
            if name not in own:
                raise AdapterError(
                    f"{self.place} changes '{name}', which {type(network).__name__} lacks"
                    f"{nearest(name, list(own)[:500])}; give the base that it was trained on"
                )
            shape, wanted = tuple(named[own[name]].shape), layer.shape
            # a convolution of one pixel and a linear layer are the same, and files do not agree on which it is
            if shape != wanted and (math.prod(shape) != math.prod(wanted) or shape[:2] != wanted[:2]):
                raise AdapterError(
                    f"{self.place} changes '{name}' {wanted}, which is {shape} in this model; give the base that it "
                    "was trained on"
                )
            if named[own[name]].dtype == torch.float16 and _most(layer) > torch.finfo(torch.float16).max / 4:
                raise AdapterError(
                    f"{self.place} changes '{name}' by up to {_most(layer):g}, which is more than float16 can hold; "
                    "the file is damaged, or the model has to be loaded in float32"
                )
            self.found[own[name]] = layer
        _check_base(self.place, self.base, {name: named[real] for name, real in own.items()}, force)

    def changed(self, network: nn.Module) -> Sequence[str]:
        return list(self.found)

    def add_to(self, total: Tensor, name: str, base: Tensor, scale: float) -> None:
        total.add_(self._change(name, base, total.dtype), alpha=scale)

    def exact(self, name: str, base: Tensor) -> Tensor:
        total = wide(base)
        return total.add_(self._change(name, base, total.dtype)).to(base.dtype)

    def _change(self, name: str, base: Tensor, dtype: torch.dtype) -> Tensor:
        layer = self.found[name]
        if isinstance(layer, Dense):
            return layer.read().to(base.device, dtype).view(base.shape)
        here = Factors(
            layer.down.to(base.device),
            layer.up.to(base.device),
            layer.alpha,
            None if layer.magnitude is None else layer.magnitude.to(base.device),
        )
        return here.change(base, dtype).view(base.shape)


def _most(layer: Layer) -> float:
    """A bound on the largest change of a weight."""
    if isinstance(layer, Dense):
        return float(layer.read().abs().max()) if math.prod(layer.shape) else 0.0
    return abs(layer.alpha) * float(layer.up.abs().max()) * float(layer.down.abs().max())


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
            total = wide(base)
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
        found, named = shapes_in(self.folder / WEIGHTS), own_parameters(network)
        _check_shapes(self.folder, found, named, network)
        missing = sorted(named.keys() - found.keys())
        if missing:
            raise AdapterError(
                f"{self.folder} lacks {len(missing)} weights of {type(network).__name__}, such as {missing[0]}; it "
                "belongs to another network"
            )
        _check_base(self.folder, self.base, named, force)
        for name, weight in named.items():
            finite(name, self._read(name).to(weight.dtype), self.folder / WEIGHTS)

    def changed(self, network: nn.Module) -> Sequence[str]:
        return list(own_parameters(network))

    def add_to(self, total: Tensor, name: str, base: Tensor, scale: float) -> None:
        total.add_(self._read(name).to(total) - base.to(total.dtype), alpha=scale)

    def exact(self, name: str, base: Tensor) -> Tensor:
        return self._read(name).to(base)

    def _read(self, name: str) -> Tensor:
        with opened(self.folder / WEIGHTS) as found:
            tensor: Tensor = found.get_tensor(name)
        if not tensor.is_floating_point():
            raise AdapterError(f"{self.folder} is broken: '{name}' is of {tensor.dtype}; copy or train it again")
        return tensor


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
        with opened(file) as found:
            tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
        refuse_not_finite(file, tensors)
        refuse_hostile(self.folder, read_config(self.folder), tensors)
        children = [(module, dict(module._modules)) for module in network.modules()]
        wants_gradient = {name: p.requires_grad for name, p in network.named_parameters()}
        training = {name: module.training for name, module in network.named_modules()}
        hosted: Any = None
        held: dict[str, nn.Parameter] = {}
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
            held = {name: own[name] for name in own if name in adapted}
            former = {name: weight.detach().clone() for name, weight in held.items()}
            set_peft_model_state_dict(hosted, tensors)
            hosted.merge_adapter(safe_merge=True)
            own = bare_parameters(network)
            self.merged = {
                name: own[name].detach().clone() for name, was in former.items() if not torch.equal(own[name], was)
            }
            refuse_not_finite(self.folder, self.merged)
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
                own.get(name, held[name]).data.copy_(was)
            if hosted is not None:
                hosted.unload()
                vars(network).pop("peft_config", None)  # what older versions of PEFT leave there
            # A stranger's settings can wrap a layer twice, of which unload takes one away.
            for module, inner in children:
                module._modules.clear()
                module._modules.update(inner)
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


def refuse_hostile(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """AdapterError for settings of a stranger's with which PEFT would import a module of their choice, take memory
    without end, or match an expression for hours.
    """
    if config.get("megatron_config") is not None or config.get("megatron_core") not in (None, "megatron.core"):
        raise AdapterError(f"{folder} names modules of Megatron to be imported, which Fallow does not do; leave it out")
    largest = max((side for tensor in tensors.values() for side in tensor.shape), default=0)
    numbers, texts = _leaves(config)
    for name, value in numbers:
        if name in ("r", "rank_pattern") and value > max(largest, 1):
            raise AdapterError(f"{folder} has {name}={value:g}, and no tensor with as many rows; copy it again")
        if value >= 2**31 and "seed" not in name and "key" not in name:
            raise AdapterError(f"{folder} has {name}={value:g}, which is no setting that can be; copy it again")
    for name, text in texts:
        repeats = sum(text.count(sign) for sign in "*+{")
        if repeats > MOST_REPEATS or re.search(r"\)[*+{]", text):
            raise AdapterError(
                f"{folder} has {name}={text[:60]!r}, an expression that could be matched for hours; name the layers"
            )


MOST_REPEATS = 3  # in an expression; each takes as many steps as a layer's name has letters, and they multiply


def _leaves(value: Any, name: str = "") -> tuple[list[tuple[str, float]], list[tuple[str, str]]]:
    """(setting, number) and (setting, text) of everything in a configuration, keys of its tables among the texts."""
    if isinstance(value, bool) or value is None:
        return [], []
    if isinstance(value, int | float):
        return [(name, value)], []
    if isinstance(value, str):
        return [], [(name, value)]
    inner = [(name or str(key), each) for key, each in value.items()] if isinstance(value, dict) else []
    inner = inner or [(name, each) for each in value]
    found = [_leaves(each, key) for key, each in inner]
    keys = [(name, str(key)) for key in value] if isinstance(value, dict) and name else []
    return [one for numbers, _ in found for one in numbers], keys + [one for _, texts in found for one in texts]


# What PEFT raises for settings it does not know, layers that are not there, and methods that cannot be merged.
_NOT_FOR_PEFT = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)


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
