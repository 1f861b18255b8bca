"""The Deltas of an adapter in a model, whichever host holds them: for what writes them in other forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from fallow.core.delta import Delta
from fallow.core.errors import ConfigError, nearest
from fallow.core.host.holder import root_of
from fallow.core.host.layer import sites, weight_at
from fallow.core.host.targets import spots
from fallow.core.peft_host.deltas import DeltaConfig
from fallow.core.peft_host.layer import FallowLayer
from fallow.core.peft_host.shared import SHARED
from fallow.core.stored_weight import StoredWeight
from fallow.core.views import View


@dataclass(frozen=True)
class Held:
    """One adapted weight. `key`: the module's path in the bare model, or the Parameter's where its module reads it.

    `layer`: the base module. `read()`: its weight as it is stored, dequantised. `names`: of all modules that share it.
    """

    key: str
    layer: nn.Module
    delta: Delta
    view: View
    read: Callable[[], Tensor]
    names: tuple[str, ...]

    def matrix(self) -> Tensor:
        """W (out, in)"""
        return self.view.read(self.read().detach())


@dataclass(frozen=True)
class HeldAdapter:
    """`options`: those of the method that hold where no layer has its own. `common`: what the layers share."""

    method: str
    options: dict[str, Any]
    seed: int
    deltas: list[Held]
    common: nn.Module


def held_adapter(model: nn.Module, name: str = "default") -> HeldAdapter:
    """An adapter of either host. ConfigError where there is none of that name, it holds no Deltas, or it is merged."""
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    own = root_of(model)
    known = [*configs, *(own[1].specs if own else ())]
    if name not in known:
        hint = nearest(name, known) if known else ""
        raise ConfigError(f"{type(model).__name__} has no adapter '{name}'{hint}")
    if name in configs:
        return _of_peft(model, name, configs[name])
    root, shared = cast("tuple[nn.Module, Any]", own)
    spec = shared.specs[name]
    return HeldAdapter(spec.method, spec.options, spec.seed, _of_own(root, name), shared[name])


def _of_own(root: nn.Module, name: str) -> list[Held]:
    keys = {(id(spot.layer), spot.attribute): spot.key for spot in spots(root)}
    found = []
    for module, site in sites(root):
        if name not in site:
            continue
        if site.merged:
            raise ConfigError(f"the adapters {site.merged} are merged; call fallow.unmerge(model) first")
        attribute = next(at for at, child in module._modules.items() if child is site)
        weight, delta = weight_at(module, site), cast(Delta, site[name])
        key = keys[id(module), attribute]
        found.append(Held(key, module, delta, site.view, partial(_plain, weight), _sharing(root, weight)))
    return found


def _of_peft(model: nn.Module, name: str, config: Any) -> HeldAdapter:
    if not isinstance(config, DeltaConfig):
        raise ConfigError(f"adapter '{name}' is PEFT's {config.peft_type}, no weight parameterization of this package")
    bare = cast(nn.Module, cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model)
    found = []
    for path, layer in bare.named_modules():
        if not isinstance(layer, FallowLayer) or name not in layer.fallow_delta:
            continue
        if layer.merged:
            raise ConfigError(f"the adapters {layer.merged_adapters} are merged; call unmerge_adapter() first")
        delta, base = cast(Delta, layer.fallow_delta[name]), layer.get_base_layer()
        key = path.replace(".base_layer", "")
        key = f"{key}.{layer.tensor}" if delta.view.kind == "parameter" else key
        found.append(Held(key, base, delta, delta.view, layer.read, _sharing(bare, layer.parameter)))
    common = getattr(bare, SHARED, None)
    held = common.fallow_delta._modules.get(name) if common is not None else None
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config.delta.Options)}
    return HeldAdapter(config.method, options, config.seed, found, held or nn.Module())


def _plain(weight: Tensor) -> Tensor:
    return weight.dense() if isinstance(weight, StoredWeight) else weight


def _sharing(model: nn.Module, weight: Tensor) -> tuple[str, ...]:
    """The paths of the modules whose Parameter this is."""
    return tuple(
        path.replace(".base_layer", "")
        for path, module in model.named_modules()
        if any(param is weight for param in module._parameters.values())
    )
