"""Adapters of our weight parameterizations as files, read without the model: for conversion, and to look inside.

Both hosts' folders (and single files) tell the method, its options and the layers. Where the change depends on the base
weight, or frozen tensors are made of it, the base is asked for by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from torch import Tensor, nn

import fallow.deltas  # noqa: F401  # which makes the methods known
from fallow.core.delta import REGISTRY, Delta, MethodOptions, Site, make_options
from fallow.core.errors import AdapterError, FallowError
from fallow.core.files import fingerprint, matches
from fallow.core.fused import delta_at
from fallow.core.host import files as own
from fallow.core.host.holder import SHARED as OWN_SHARED
from fallow.core.layouts import check_layout, view_from
from fallow.core.linalg import Truncation
from fallow.core.low_rank_form import dense_change, low_rank_form
from fallow.core.peft_host.deltas import DeltaConfig, sample_of
from fallow.core.peft_host.shared import SHARED
from fallow.core.sparse import CONFIG, WEIGHTS
from fallow.core.views import TransposedView, View
from fallow.deltas.lora import LoRA
from fallow.recipes.adapter_directory import PREFIX, noted_in, opened, read_config
from fallow.recipes.approximation import Losses
from fallow.recipes.formats.layers import Adapter, Dense, Factors, Layer, Layers, finite, part_of, plain

KEY = re.compile(rf"(?:{re.escape(PREFIX)})?(?P<path>.+)\.fallow_delta\.(?P<tensor>.+)")
REFUSED = ("modules_to_save", "trainable_token_indices")
AGAIN = "it is broken, or of another version: copy it again"
AS_FACTORS = ("peft", "diffusers", "kohya", "kohya-ldm")
Read = Callable[[], Tensor]


@dataclass(frozen=True)
class SavedLayer:
    """`layout`: of `fallow.core.layouts`, None where the file does not tell. `rows`: of a Delta for each projection;
    `apart`: of those with other options.
    """

    layout: dict[str, Any] | None
    options: MethodOptions
    tensors: dict[str, Tensor]
    rows: int | list[int] | None = None
    apart: dict[int, MethodOptions] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """An adapter's file. `base`: by weight its fingerprint and dtype; `sample`: one fingerprint of all weights."""

    place: Path
    method: type[Delta]
    options: dict[str, Any]
    seed: int
    layers: dict[str, SavedLayer]
    common: dict[str, Tensor]
    base: dict[str, list[str]] = field(default_factory=dict)
    sample: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)

    def laid_out(self, key: str) -> dict[str, Any]:
        """What is known of a layer. AdapterError where the file does not tell."""
        if (found := self.layers[key].layout) is None:
            raise AdapterError(
                f"{self.place} does not tell what layer '{key}' is; load it into its model and use fallow.to_lora"
            )
        return found

    def trained(self) -> int:
        """How many numbers were trained; those in the file where it does not tell the layers."""
        if any(layer.layout is None for layer in self.layers.values()):
            return sum(t.numel() for layer in self.layers.values() for t in layer.tensors.values())
        total, shapes = 0, []
        for layer in self.layers.values():
            out, inner = view_from(cast("dict[str, Any]", layer.layout)).shape
            rows = layer.rows if layer.rows is not None else [out]
            for size in [out // rows] * rows if isinstance(rows, int) else rows:
                shapes.append((size, inner))
                total += self.method.parameter_count(shapes[-1], layer.options)
        return total + self.method.shared_count(shapes, next(iter(self.layers.values())).options)


def is_one(place: Path) -> bool:
    """Whether an adapter of a weight parameterization lies there, as either host writes it."""
    if place.is_file():
        return is_own(place)
    if not (place / CONFIG).is_file() or not (place / WEIGHTS).is_file():
        return False
    config = read_config(place)
    return is_own(place / WEIGHTS) or (config.get("peft_type") == "FALLOW" and config.get("method") in REGISTRY)


def is_own(file: Path) -> bool:
    """Whether `fallow.save` wrote a safetensors file."""
    with opened(file) as found:
        return (found.metadata() or {}).get("format") == own.FORMAT


def saved(place: Path) -> Saved:
    """What lies there. AdapterError where it is broken."""
    file = place / WEIGHTS if place.is_dir() else place
    with opened(file) as found:
        header = dict(found.metadata() or {})
        tensors = {key: found.get_tensor(key) for key in found.keys()}  # noqa: SIM118
    for key, value in tensors.items():
        if value.is_floating_point():
            finite(key, value, file)
    try:
        return (
            _of_own(file, header, tensors) if header.get("format") == own.FORMAT else _of_peft(place, header, tensors)
        )
    except FallowError as error:
        raise AdapterError(str(error) if str(place) in str(error) else f"{place}: {error}") from None


def _of_own(file: Path, header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Saved:
    told = own._told(file, header)
    method = own._method(file, told["method"])
    layers, base = {}, {}
    rest, mark = dict(tensors), f"{OWN_SHARED}."
    common = {key.removeprefix(mark): rest.pop(key) for key in tensors if key.startswith(mark)}
    for key, described in told["weights"].items():
        layout = check_layout(file, key, described["layer"]) if "layer" in described else None
        parameter = layout is not None and layout["kind"] == "parameter"
        # a Parameter's Deltas are named after its module; such layers have no other form, but can be looked into
        marks = (f"{key}.adapters.",) if not parameter else (f"{key.rpartition('.')[0]}.adapters_",)
        mine = [name for name in rest if name.startswith(marks)]
        held = {name.removeprefix(marks[0]): rest.pop(name) for name in mine}
        options = make_options(method, told["options"] | described["options"])
        rows, apart = own._blocks(file, key, told, described) or (None, {})
        parts = {number: make_options(method, given) for number, given in apart.items()}
        layers[key] = SavedLayer(layout, options, held, rows, parts)
        if described["base"]:
            base[key if parameter else f"{key}.weight"] = [described["base"], described["dtype"]]
    if rest and not any(layer.layout and layer.layout["kind"] == "parameter" for layer in layers.values()):
        raise AdapterError(f"{file} holds '{min(rest)}', which is of no layer that its metadata tell; copy it again")
    return Saved(file, method, told["options"], told["seed"], layers, common, base)


def _of_peft(place: Path, header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Saved:
    try:
        config = PeftConfig.from_pretrained(str(place))
    except (TypeError, AttributeError, ValueError) as error:
        raise AdapterError(f"{place / CONFIG} is broken ({error}); copy the adapter again") from None
    if not isinstance(config, DeltaConfig):
        raise AdapterError(f"{place} is PEFT's {config.peft_type}, no weight parameterization of Fallow's")
    for name in REFUSED:
        if value := getattr(config, name, None):
            raise AdapterError(f"{place} has {name}={value!r}, which no other format has a place for")
    told: Any = config.made if isinstance(config.made, dict) else {}
    layouts = told.get("layers") if isinstance(told.get("layers"), dict) else {}
    held: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise AdapterError(f"{place} holds '{key}', which is none of a weight parameterization; copy it again")
        held.setdefault(match["path"].replace(".base_layer", ""), {})[match["tensor"]] = value
    common = held.pop(SHARED, {})
    sites = told.get("sites") if isinstance(told.get("sites"), list) else None
    layers = {}
    for key in sites if sites is not None else held:
        layout = check_layout(place, key, layouts[key]) if key in layouts else None
        fused = next((n for pattern, n in config.fused.items() if re.fullmatch(rf"(.*\.)?({pattern})", key)), None)
        options, apart = config.options_for(str(key)), config.apart(str(key))
        layers[str(key)] = SavedLayer(layout, options, held.pop(str(key), {}), fused, apart)
    if not layers:
        raise AdapterError(f"{place} adapts no layer; train or copy it again")
    noted = noted_in(place, header)
    foreign = {name: value for name, value in header.items() if name not in ("format", "fallow")}
    sample = told.get("base") if isinstance(told.get("base"), str) else ""
    return Saved(
        place, config.delta, config._given(), config.seed, layers, common, noted.get("base", {}), str(sample or ""),
        noted.get("metadata", {}), foreign,
    )  # fmt: skip


# -- the Deltas again -------------------------------------------------------------------------------------------------


class _Blind(Site):
    """A place whose weight is not at hand."""

    where: Path

    def weight(self) -> Tensor:
        raise AdapterError(
            f"{self.where} has tensors at '{self.name}' that are made of the base weight, or change it by what it is; "
            "give --base MODEL"
        )

    stored = weight


def rebuilt(found: Saved, base: Mapping[str, Read] | None) -> dict[str, Delta]:
    """The adapter's Deltas by layer, with the values of the file. `base`: by weight name, how to read it.

    AdapterError for tensors that lack, do not fit or are not the method's, another base, or where one is needed.
    """
    common, made = nn.Module(), {}
    for key, layer in found.layers.items():
        told = found.laid_out(key)
        view = view_from(told)
        if base is None:
            read: Read = partial(_empty, told["shape"])
        else:
            read = base[f"{key}.weight"]
        kind = _Blind if base is None else Site
        site = kind(key, view, read, common, None, found.seed, fresh=False)
        if isinstance(site, _Blind):
            site.where = found.place
        delta = delta_at(site, found.method, layer.options, layer.rows, layer.apart)
        _fill(found.place, key, delta, layer.tensors)
        made[key] = delta
    _fill(found.place, "what the layers share", common, found.common)
    return made


def _empty(shape: list[int]) -> Tensor:
    return torch.zeros(1).expand(shape)


@torch.no_grad()
def _fill(place: Path, key: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    wanted = module.state_dict()
    for name in wanted.keys() | tensors.keys():
        if name not in tensors or name not in wanted:
            raise AdapterError(f"{place} {'lacks' if name in wanted else 'holds'} '{name}' of '{key}'; {AGAIN}")
        if wanted[name].shape != tensors[name].shape:
            raise AdapterError(
                f"{place} has '{name}' of '{key}' as {tuple(tensors[name].shape)}, where its options ask for "
                f"{tuple(wanted[name].shape)}; {AGAIN}"
            )
        wanted[name].copy_(tensors[name])


def check_base(found: Saved, base: Mapping[str, Read]) -> None:
    """AdapterError where the base lacks a layer, or is another than the one trained on."""
    weights = []
    for key in found.layers:
        name, told = f"{key}.weight", found.laid_out(key)
        weight = base[name]() if name in base else None
        if weight is None or list(weight.shape) != told["shape"]:
            raise AdapterError(
                f"{found.place} changes '{name}' {told['shape']}, which the base has not; give its --base"
            )
        print_of_base, dtype = found.base.get(name, ["", ""])
        if print_of_base and not matches(print_of_base, weight, getattr(torch, dtype, None)):
            raise AdapterError(f"{found.place} was trained on another base: '{name}' differs; give its --base")
        weights.append(weight)
    sample = sample_of(weights)
    if found.sample and sample is not None and not (matches(found.sample, sample) or _in_another(found.sample, sample)):
        raise AdapterError(f"{found.place} was trained on another base: the weights differ; give its --base")


def _in_another(told: str, sample: Tensor) -> bool:
    """Whether it is the sample of the same base in half precision."""
    prints = {fingerprint(sample.to(dtype)) for dtype in (torch.float16, torch.bfloat16)}
    return told in prints


# -- as other formats see them ----------------------------------------------------------------------------------------


def read(
    place: Path,
    to: str,
    losses: Losses,
    *,
    base: Mapping[str, Read] | None = None,
    how: Truncation | None = None,
) -> Adapter:
    """The adapter as factors where it is a product of such, else as full changes, for the format `to`.

    `how`: cut factors to this. DoRA keeps its magnitudes where the format has a place for them and nothing is cut.
    AdapterError for methods that cannot be merged, layers that the format has no place for, and where a base is needed.
    """
    found = saved(place)
    _refuse(found, to)
    if base is not None:
        base = {name: base[plain(name)] for name in (f"{key}.weight" for key in found.layers) if plain(name) in base}
        check_base(found, base)
    part = part_of(f"{key}.weight" for key in found.layers)
    layers: Layers = {}
    if issubclass(found.method, LoRA) and how is None and to in AS_FACTORS and found.method.name in ("lora", "dora"):
        layers = {plain(f"{key}.weight"): _as_trained(found, key, losses) for key in found.layers}
    else:
        with torch.no_grad():
            for key, delta in rebuilt(found, base).items():
                weight = partial(_matrix, found, key, base, delta.view)
                layers[plain(f"{key}.weight")] = _changed(found, key, delta, weight, how, to in AS_FACTORS, losses)
    told = {plain(name): one for name, one in found.base.items()}
    notes = {"method": found.method.name, "options": found.options, **found.notes}
    return Adapter("peft", {part: layers}, {part: told} if told else {}, notes, found.foreign)


def _refuse(found: Saved, to: str) -> None:
    name = found.method.name
    if found.method.mode == "output":
        raise AdapterError(f"{found.place} is of '{name}', which depends on inputs and changes no weight by itself")
    for key in found.layers:
        told = found.laid_out(key)
        kind = told["kind"]
        if kind in ("parameter", "embedding") or (kind == "transposed" and to != "peft"):
            what = {"parameter": "a Parameter that its module reads", "embedding": "an embedding"}.get(kind, "a Conv1D")
            raise AdapterError(
                f"{found.place} adapts '{key}', {what}, for which {to} has no place; load it into its model and merge "
                "it" + ("" if kind == "parameter" else ", or use fallow.to_lora")
            )
        if to in AS_FACTORS and (odd := told.get("odd")):
            raise AdapterError(
                f"{found.place} adapts '{key}', {odd}, on which LoRA of other programs acts otherwise; give --to "
                "lycoris-diff or fallow"
            )


def _as_trained(found: Saved, key: str, losses: Losses) -> Factors:
    """LoRA's and DoRA's own tensors, bit for bit; no weight is needed."""
    layer, told = found.layers[key], found.laid_out(key)
    if layer.rows is not None:
        raise AdapterError(
            f"{found.place} has a Delta for each projection of '{key}'; give --rank or use fallow.to_lora"
        )
    view, o = view_from(told), cast(Any, layer.options)
    (out, inner), names = view.shape, {"A", "B"} | ({"magnitude"} if found.method.name == "dora" else set())
    names |= {"start_A", "start_B"} if o.offset else set()
    shapes = {"A": (o.rank, inner), "B": (out, o.rank), "magnitude": (out,)}
    shapes |= {"start_A": (o.offset, inner), "start_B": (out, o.offset)}
    for name in names | layer.tensors.keys():
        tensor = layer.tensors.get(name)
        if tensor is None or name not in names or tuple(tensor.shape) != shapes[name]:
            if tensor is None or name not in names:
                raise AdapterError(
                    f"{found.place} {'lacks' if tensor is None else 'holds'} '{name}' of '{key}'; {AGAIN}"
                )
            raise AdapterError(
                f"{found.place} has '{name}' of '{key}' as {tuple(tensor.shape)}, where its options ask for "
                f"{shapes[name]}; {AGAIN}"
            )
    a, b = layer.tensors["A"], layer.tensors["B"]
    alpha = float(o.rank if o.alpha is None else o.alpha) * (math.sqrt(o.rank) if o.scaling == "rslora" else 1.0)
    if o.offset:  # what a start took out of W is ranks more at the same scale
        a, b = torch.cat([a, layer.tensors["start_A"]]), torch.cat([b, -layer.tensors["start_B"]], 1)
        alpha *= a.shape[0] / o.rank
    made = _factors(told, a, b, alpha)
    if "magnitude" in names:
        return Factors(made.down, made.up, made.alpha, layer.tensors["magnitude"])
    losses.add(key, abs(made.scale) * float((b.float() @ a.float()).norm()), 0.0, rank=made.rank)
    return made


def _changed(
    found: Saved,
    key: str,
    delta: Delta,
    weight: Read,
    how: Truncation | None,
    as_factors: bool,
    losses: Losses,
) -> Layer:
    told = found.laid_out(key)
    if delta.exact and (as_factors or how is not None):
        form = low_rank_form(delta, weight, how)
        losses.add(key, form.norm, form.missing, rank=form.rank)
        return _factors(told, form.a.float(), form.b.float(), float(form.rank))
    like = _empty(told["shape"])
    change = delta.view.write(dense_change(delta, weight).detach().float(), like).contiguous()
    return Dense(lambda: change, tuple(told["shape"] if not isinstance(delta.view, TransposedView) else change.shape))


def _factors(told: Mapping[str, Any], a: Tensor, b: Tensor, alpha: float) -> Factors:
    sides = told["shape"][1:] if told["kind"] == "conv" else [a.shape[1]]
    ones = [1] * (len(sides) - 1)
    # copies, since methods share factors between layers, which files cannot
    return Factors(a.reshape(-1, *sides).clone(), b.reshape(*b.shape, *ones).clone(), alpha)


def _matrix(found: Saved, key: str, base: Mapping[str, Read] | None, view: View) -> Tensor:
    """W (out, in)"""
    if base is None:
        raise AdapterError(
            f"{found.place} is of '{found.method.name}', whose change depends on the base weight; give --base MODEL"
        )
    return view.read(base[f"{key}.weight"]())
