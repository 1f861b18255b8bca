"""PEFT's own files as adapters of this package, in PEFT's models: `model = fallow.from_peft("style", model)`."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import nn

import fallow.deltas  # noqa: F401  # which makes the methods known
from fallow.core.delta import Delta, make_options, method_of
from fallow.core.errors import AdapterError, ConfigError, ModelError, nearest
from fallow.core.layouts import odd_of
from fallow.core.peft_host import config_of
from fallow.core.peft_host.layer import FallowLayer
from fallow.core.peft_host.shared import SHARED
from fallow.core.views import EmbeddingView, TransposedView, View, view_of
from fallow.recipes.adapter_directory import NETWORKS
from fallow.recipes.adapter_files import kind_of, locate
from fallow.recipes.formats import reading
from fallow.recipes.formats.patterns import exact_targets
from fallow.recipes.formats.peft_methods import Foreign, exactly, of_factors, read_foreign


def from_peft(
    path: str | PathLike[str], model: nn.Module, adapter_name: str = "default", *, part: str | None = None
) -> PeftModel:
    """The model with an adapter of PEFT's LoRA, DoRA, VeRA, RandLoRA or MiSS as our LoRA, DoRA, VeRA, RandLoRA or Bone.

    `path`: a folder that PEFT saved, or a LoRA file of diffusers or kohya. `model`: its base, which is wrapped, or a
    PeftModel of this package, which gets one more adapter. `part`: of the pipeline, where a file holds several. The
    tensors are the same numbers, in float32 at least; what is computed is the same, and trains on.

    AdapterError for a broken file, one of another method, options that have no place here (trained biases, whole
    modules, starts that change the base, ...), and layers that the model lacks or that PEFT runs otherwise; the model
    is then as it was.
    """
    foreign = _read(Path(path), model, part)
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    if adapter_name in getattr(model, "peft_config", {}):
        raise ConfigError(f"there is an adapter '{adapter_name}' already; give another name")
    _check(path, foreign, bare)
    kind = method_of(foreign.method)
    config = config_of(kind)(
        target_modules=exact_targets(list(foreign.layers)),
        patterns={exactly(layer): given for layer, given in foreign.given.items()},
        seed=foreign.seed,
        made={"sites": list(foreign.layers)},
        **foreign.options,
    )
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(model, config, adapter_name=adapter_name)
    _fill(model.get_base_model(), adapter_name, foreign)
    return model


def _read(path: Path, model: nn.Module, part: str | None) -> Foreign:
    place = locate(path)
    if kind_of(place) == "peft":
        return read_foreign(place)
    if place.is_dir() and (part is None or not (place / part).is_dir()):
        raise AdapterError(f"{path} is no folder of PEFT's; of one that holds several parts, give part='unet' or so")
    if place.is_dir():
        return read_foreign(place / str(part))
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    known = [name.replace(".base_layer", "") for name, _ in bare.named_parameters() if ".fallow_delta." not in name]
    adapter = reading.read(place, {part or "unet": known})
    found = part or next((one for one in adapter.parts if one in NETWORKS or len(adapter.parts) == 1), None)
    if found not in adapter.parts:
        raise AdapterError(f"{path} is of {', '.join(adapter.parts)}; give part= one of them")
    return of_factors(path, adapter, str(found))


def _check(path: object, foreign: Foreign, bare: nn.Module) -> None:
    """All that can be wrong, before the model is touched."""
    kind = method_of(foreign.method)
    modules = {name.replace(".base_layer", ""): module for name, module in bare.named_modules()}
    shapes = {}
    for layer, tensors in foreign.layers.items():
        if (module := modules.get(layer)) is None:
            raise AdapterError(
                f"{path} adapts '{layer}', which {type(bare).__name__} lacks{nearest(layer, list(modules)[1:500])}"
            )
        base = module.get_base_layer() if isinstance(module, FallowLayer) else module
        try:
            view = view_of(base)
            options: Any = make_options(kind, foreign.options | foreign.given.get(layer, {}))
        except (ModelError, ConfigError) as error:
            raise AdapterError(f"{path} cannot be loaded at '{layer}': {error}") from None
        _check_layer(path, layer, base, view, foreign)
        if getattr(base, "weight", None) is not None and _shared(bare, base.weight):
            raise AdapterError(
                f"{path} adapts '{layer}', whose weight other modules of {type(bare).__name__} share: PEFT's adapter "
                "acts in one of them, ours in all; untie it"
            )
        shapes[layer] = view.shape
        wanted = _wanted(foreign.method, view.shape, options)
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != wanted[name]:
                raise AdapterError(
                    f"{path} has '{layer}' {name} as {tuple(tensor.shape)}, where {type(bare).__name__} and the config "
                    f"ask for {wanted[name]}; give the base that it was trained on"
                )
    for name, tensor in foreign.common.items():
        least = _common(name, list(shapes.values()), foreign.options["rank"])
        if tensor.ndim != 2 or any(has < needs for has, needs in zip(tensor.shape, least, strict=True)):
            raise AdapterError(f"{path} has {name} as {tuple(tensor.shape)}, less than the {least} that layers need")


def _check_layer(path: object, layer: str, base: Any, view: View, foreign: Foreign) -> None:
    embedding = isinstance(view, EmbeddingView)
    turned = isinstance(view, TransposedView) and not embedding
    refused = view.kind not in foreign.kinds or (turned and foreign.method == "bone")
    if refused or (embedding != (layer in foreign.embeddings)):
        raise AdapterError(
            f"{path} adapts '{layer}' as PEFT's {foreign.method} does no {type(base).__name__}; give its base"
        )
    if odd := odd_of(base):
        raise AdapterError(f"{path} adapts '{layer}', {odd}, for which PEFT computes something else than is done here")


def _shared(bare: nn.Module, weight: Any) -> bool:
    held = sum(any(param is weight for param in module._parameters.values()) for module in bare.modules())
    return held > 1


def _wanted(method: str, shape: tuple[int, int], o: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of our tensors in a layer of this (out, in)."""
    (out, inner), r = shape, o.rank
    if method in ("lora", "dora"):
        return {"A": (r, inner), "B": (out, r), "magnitude": (out,)}
    if method == "vera":
        return {"b": (out,), "d": (r,)}
    if method == "randlora":
        n, m = -(-min(shape) // r), min(shape)
        return {"lambda_": (n, r), "gamma": (n, m)}
    return {"blocks": (out // r, r, r), "shared_block": (r, o.mini_rank if o.kind == "mini" else out)}


def _common(name: str, shapes: list[tuple[int, int]], r: int) -> tuple[int, int]:
    """What all layers need of a shared matrix."""
    if name == "A":
        return r, max(inner for _, inner in shapes)
    if name == "B":
        return max(out for out, _ in shapes), r
    small, large = max(min(shape) for shape in shapes), max(max(shape) for shape in shapes)
    return (r, small) if name == "bases_a_0_peft" else (large, -(-small // r) * r)


@torch.no_grad()
def _fill(bare: nn.Module, adapter_name: str, foreign: Foreign) -> None:
    for path, layer in bare.named_modules():
        if isinstance(layer, FallowLayer) and adapter_name in layer.fallow_delta:
            delta = cast(Delta, layer.fallow_delta[adapter_name])
            for name, tensor in foreign.layers[path.replace(".base_layer", "")].items():
                delta.get_parameter(name).copy_(tensor)
    if foreign.common:
        common = cast(Any, getattr(bare, SHARED)).fallow_delta[adapter_name]
        for name, tensor in foreign.common.items():
            held = common.get_buffer(name)
            held.copy_(tensor[: held.shape[0], : held.shape[1]])
