"""The tuner that PEFT makes for configs of the type FALLOW, and its registration."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from fallow.core.errors import ConfigError, ModelError, nearest
from fallow.core.peft_host.contract import PEFT_TYPE, Delta, FallowConfig, Site
from fallow.core.peft_host.layer import LINEAR, PREFIX, FallowLayer, FallowLinear
from fallow.core.select import WRITABLE

LAYERS = (*LINEAR, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.MultiheadAttention)
ALL = "all-layers"


class FallowModel(BaseTuner):
    """The tuner behind `get_peft_model`, `inject_adapter_in_model` and the `add_adapter` of transformers, diffusers."""

    prefix = PREFIX
    tuner_layer_cls = FallowLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # as PEFT declares it

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap the targets, then make the adapter's Deltas for all of them at once; all or nothing."""
        config = self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        required = [(param, param.requires_grad) for param in model.parameters()]
        self._targets: dict[str, FallowLayer] = {}
        self._wrapped: list[tuple[nn.Module, str, nn.Module]] = []
        for layer in _layers(model):
            layer.settle(layer.merged_adapters)  # a choice is made by what the weights are without adapters
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            sites = self._sites(model)
            deltas = cast(FallowConfig, config).make(model, sites)
            trained = adapter_name in self.active_adapters and not config.inference_mode
            for key, delta in deltas.items():
                self._targets[key].add(adapter_name, delta, trained)
        except Exception:  # whatever it was, the model is put back as it was and the error goes on
            for parent, name, child in reversed(self._wrapped):
                setattr(parent, name, child)
            for param, value in required:
                param.requires_grad_(value)
            self.peft_config.pop(adapter_name, None)
            raise

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.target_modules == ALL:
            peft_config.target_modules = {
                name.replace(".base_layer", "")
                for name, module in self.model.named_modules()
                if isinstance(module, LAYERS) and not _inside_an_adapter(name)
            }
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        key = current_key.replace(".base_layer", "")
        layer = target if isinstance(target, FallowLayer) else self._wrap(key, target, target_name, parent)
        self._targets[key] = layer.leader

    def _wrap(self, key: str, target: nn.Module, name: str, parent: nn.Module) -> FallowLayer:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        tensor = _adaptable(key, base)
        layer = (FallowLinear if isinstance(base, LINEAR) else FallowLayer)(target, tensor)
        layer._active_adapter = self.active_adapters
        if isinstance(parent, FallowLayer):  # a child of a wrapped attention block
            parent = parent.get_base_layer()
        setattr(parent, name, layer)
        self._wrapped.append((parent, name, target))
        return layer

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own also assigns weights to modules that come back unwrapped
        setattr(parent.get_base_layer() if isinstance(parent, FallowLayer) else parent, child_name, new_module)

    def _sites(self, model: nn.Module) -> list[Site]:
        """The weights of the targets, each once. The first module that has a weight leads, the others follow it."""
        wanted = {_place(layer.parameter) for layer in self._targets.values()}
        self._targets = {}
        found: dict[object, tuple[str, FallowLayer, dict[str, None], dict[int, nn.Module]]] = {}
        for path, module in list(model.named_modules(remove_duplicate=False)):
            for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
                place = _place(param)
                if place not in wanted:
                    continue
                key, layer = self._layer_at(model, path, module, name)
                leader = found.setdefault(place, (key, layer, {}, {}))
                if layer is not leader[1]:
                    layer.follow(leader[1])
                leader[2][f"{key}.{name}"] = None
                leader[3][id(module)] = module
        self._targets = {key: layer for key, layer, _, _ in found.values()}
        return [
            Site(key, tuple(names), tuple(owners.values()), layer.parameter)
            for key, layer, names, owners in found.values()
        ]

    def _layer_at(self, model: nn.Module, path: str, module: nn.Module, name: str) -> tuple[str, FallowLayer]:
        """The layer around the module at this path, wrapped now if it is not yet; and the path without wrappers."""
        key = path.replace(".base_layer", "")
        while path.endswith(".base_layer"):
            path = path.removesuffix(".base_layer")
            if isinstance(layer := model.get_submodule(path), FallowLayer):
                return key, layer
        if isinstance(layer := model.get_submodule(path), FallowLayer):  # wrapped a moment ago
            return key, layer
        if _tensor_of(module) != name:
            raise ModelError(f"'{key}.{name}' shares a weight that is to be adapted, in a way of its own; untie it")
        parent_path, _, child = path.rpartition(".")
        return key, self._wrap(key, module, child, model.get_submodule(parent_path))

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """Tied weights are adapted in every module that shares them: nothing to warn of."""

    def _check_merge_allowed(self) -> None:
        """As above."""

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        for path, layer in list(self.model.named_modules()):
            if not isinstance(layer, FallowLayer):
                continue
            if not merge and not layer.merged:
                layer.settle()
            parent_path, _, child = path.rpartition(".")
            if "base_layer" in parent_path.split("."):  # inside another adapted layer, where PEFT does not look
                if merge:
                    layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                setattr(self.model.get_submodule(parent_path), child, layer.base_layer)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter that changes the base by the sum of weight * change of others; it is not made active."""
        if combination_type != "linear":
            raise ConfigError(f"combination_type={combination_type!r} must be 'linear': a weighted sum of the changes")
        if len(adapters) != len(weights) or not adapters:
            raise ConfigError(f"{len(adapters)} adapters and {len(weights)} weights; give one weight for each")
        if adapter_name in self.peft_config:
            raise ConfigError(f"there is an adapter '{adapter_name}' already; give another name")
        for name in adapters:
            if name not in self.peft_config:
                raise ConfigError(f"there is no adapter '{name}'{nearest(name, self.peft_config)}")
        added: dict[str, Delta] = {}
        for path, layer in self.model.named_modules():
            if not isinstance(layer, FallowLayer):
                continue
            held = [(n, w) for n, w in zip(adapters, weights, strict=True) if n in layer.fallow_delta]
            parts = [(layer.fallow_delta[name], weight * layer.scaling[name]) for name, weight in held]
            if parts:
                delta = type(cast(Delta, parts[0][0])).combined(parts)
                layer.add(adapter_name, delta, False)
                added[path.replace(".base_layer", "")] = delta
        self.peft_config[adapter_name] = cast(FallowConfig, self.peft_config[adapters[0]]).describing(added)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, num_beams: int | None = None, **kwargs: Any
    ) -> Iterator[None]:
        handles = []
        if adapter_names is not None:
            if self.training:
                raise ConfigError("adapter_names= is for inference; call model.eval() first")
            if unknown := set(adapter_names) - {*self.peft_config, "__base__"}:
                raise ConfigError(f"there is no adapter {sorted(unknown)}{nearest(min(unknown), self.peft_config)}")
            named = [name for name in adapter_names for _ in range(num_beams or 1)]
            hook = partial(_with_names, adapter_names=named)
            handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in _layers(self.model)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _with_names(module: nn.Module, args: Any, kwargs: Mapping[str, Any], adapter_names: Sequence[str]) -> Any:
    return args, {**kwargs, "adapter_names": adapter_names}


def _layers(model: nn.Module) -> list[FallowLayer]:
    return [module for module in model.modules() if isinstance(module, FallowLayer)]


def _inside_an_adapter(name: str) -> bool:
    return any(part.startswith(PREFIX) for part in name.split("."))


def _adaptable(key: str, module: nn.Module) -> str:
    """The name of the module's weight; ModelError where it has none that can be written in place."""
    tensor = _tensor_of(module)
    param = module._parameters.get(tensor)
    kind = type(module).__name__
    if param is None:
        raise ModelError(f"'{key}' ({kind}) has no weight of its own to adapt; leave it out of target_modules")
    if param.dtype not in WRITABLE or type(param.data) is not Tensor:
        raise ModelError(
            f"'{key}' ({kind}) is quantised or sharded ({param.dtype}, {type(param.data).__name__}); entries of its "
            "weight cannot be trained in place: load the base in float32, bfloat16 or float16"
        )
    if getattr(module, "max_norm", None) is not None:
        raise ModelError(f"'{key}' rewrites its own weight in each forward (max_norm={module.max_norm}); exclude it")
    return tensor


def _tensor_of(module: nn.Module) -> str:
    return "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"


def _place(param: Tensor) -> object:
    """Equal for Parameters that are the same numbers in memory."""
    if param.is_meta or param.numel() == 0:
        return id(param)
    return (param.device, param.data_ptr(), tuple(param.shape), param.stride())


PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = FallowConfig  # register_peft_method() refuses names that are not PEFT's own
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = FallowModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX
