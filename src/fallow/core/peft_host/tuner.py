"""The tuner that PEFT makes for configs of the type FALLOW, and its registration."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast, get_args

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.integrations import init_empty_weights
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from fallow.core.accompany import context_of
from fallow.core.delta import Delta, number, one_of, whole
from fallow.core.errors import AdapterError, ConfigError, ModelError, nearest
from fallow.core.gradients import watch
from fallow.core.peft_host.acting import allow
from fallow.core.peft_host.contract import PEFT_TYPE, FallowConfig, Hosted, Site
from fallow.core.peft_host.deltas import DeltaConfig, describe
from fallow.core.peft_host.layer import LINEAR, PREFIX, FallowLayer, FallowLinear, Holder, ParamWrapper
from fallow.core.peft_host.shared import SHARED, Shared
from fallow.core.peft_host.taking_back import PLACE, Loading, check_tensors, refuse_foreign, waiting
from fallow.core.peft_host.weighted import DENSE, Combination, combined
from fallow.core.select import WRITABLE
from fallow.core.sharded import is_dtensor
from fallow.core.views import view_of

LAYERS = (*LINEAR, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.MultiheadAttention)
ALL = "all-layers"
TORCHAO = "get_apply_tensor_subclass"  # what PEFT's backend asks for, to code a merged weight again
SHOWN = 8  # names that an error tells of


class NoTargetError(ConfigError, NoMatchingPeftModuleError):
    """Nothing of the model is meant; PEFT's own error too, for programs that wait for it."""


class FallowModel(BaseTuner):
    """The tuner behind `get_peft_model`, `inject_adapter_in_model` and the `add_adapter` of transformers, diffusers."""

    prefix = PREFIX
    tuner_layer_cls = Holder
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # as PEFT declares it

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap the targets, then make the adapter's Deltas for all of them at once; all or nothing."""
        config = self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        self._adapting = cast(FallowConfig, config)
        self._targets: dict[str, FallowLayer] = {}
        self._loading = Loading(model, adapter_name, self.peft_config)
        of_a_file = not self._adapting.in_place and self._adapting.made is not None
        for layer in _layers(model):
            layer.settle(layer.merged_adapters)  # a choice is made by what the weights are without adapters
        common = nn.Module()
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            sites = self._sites(model, common)
            empty = init_empty_weights() if kwargs.get("low_cpu_mem_usage") else nullcontext()
            with empty:  # Parameters on the meta device, for a file to fill
                deltas = cast(FallowConfig, config).make(model, sites)
            self._unwrap(set((self._adapting.made or {}).get("left_out", ())))
            trained = adapter_name in self.active_adapters and not config.inference_mode
            for key, delta in deltas.items():
                self._targets[key].add(adapter_name, delta, trained)
            watch(deltas, cast(FallowConfig, config).expect_gradients)
            if deltas:
                Shared.put(model, adapter_name, common, trained, next(iter(sites)).layer)
        except NoMatchingPeftModuleError as error:
            self._loading.undo()
            raise _no_target(model, self._adapting) from error
        except Exception:  # whatever it was, the model is put back as it was and the error goes on
            self._loading.undo()
            raise
        if of_a_file:
            model.__dict__[PLACE] = self._loading

    def _unwrap(self, left_out: set[str]) -> None:
        """Give the layers that a budget gives no rank their places back."""
        idle = {id(layer) for key, layer in self._targets.items() if key in left_out and not layer.fallow_delta}
        kept = []
        for parent, name, child in reversed(self._loading.wrapped):
            layer = parent._modules.get(name)
            if isinstance(layer, FallowLayer) and id(layer.leader) in idle:
                setattr(parent, name, child)
            else:
                kept.append((parent, name, child))
        self._loading.wrapped[:] = reversed(kept)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Deltas are made in float32; `autocast_adapter_dtype=False` asks for the base's dtype instead, of what is
        frozen in them too.
        """
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in _layers(self.model):
            delta = layer.fallow_delta._modules.get(adapter_name)
            dtype = layer.parameter.dtype
            if isinstance(delta, Delta) and dtype.is_floating_point:
                for part in (delta, delta.__dict__["_common"][0]):
                    part._apply(lambda tensor, dtype=dtype: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.target_modules == ALL:
            peft_config.target_modules = set(_all_layers(self.model))
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
        if parameter_name is not None:
            key = key if key.endswith(f".{parameter_name}") else f"{key}.{parameter_name}"
        layer = _around(target, parameter_name) or self._wrap(key, target, target_name, parent, parameter_name)
        self._targets[key] = layer.leader

    def _wrap(
        self, key: str, target: nn.Module, name: str, parent: nn.Module, tensor: str | None = None
    ) -> FallowLayer:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        told = get_quantization_kwargs(self)  # how torchao has quantised the model; a model may not know it
        backend = resolve_quantization_backend(base, **{TORCHAO: bool, **told})
        if backend is not None and backend.backend_name == "torchao":
            backend.supports_merge &= TORCHAO in told
        tensor = _adaptable(key, base, tensor, self._adapting.in_place, backend is not None)
        linear = isinstance(base, LINEAR) or (backend is not None and hasattr(base, "in_features"))
        kind = FallowLinear if linear else FallowLayer if tensor == _tensor_of(base) else ParamWrapper
        layer = kind(target, tensor, backend)
        layer._active_adapter = self.active_adapters
        if isinstance(parent, FallowLayer):  # a child of a wrapped attention block
            parent = parent.get_base_layer()
        setattr(parent, name, layer)
        self._loading.wrapped.append((parent, name, target))
        return layer

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own also assigns weights to modules that come back unwrapped
        setattr(parent.get_base_layer() if isinstance(parent, FallowLayer) else parent, child_name, new_module)

    def _sites(self, model: nn.Module, common: nn.Module) -> list[Site]:
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
                leader[2][key if key.endswith(f".{name}") else f"{key}.{name}"] = None
                leader[3][id(module)] = module
        self._targets = {key: layer for key, layer, _, _ in found.values()}
        context = context_of(model)
        return [
            Site(key, tuple(names), tuple(owners.values()), layer.parameter, layer.tensor, layer, common, context)
            for key, layer, names, owners in found.values()
        ]

    def _layer_at(self, model: nn.Module, path: str, module: nn.Module, name: str) -> tuple[str, FallowLayer]:
        """The layer around the module's weight `name`, wrapped now if it is not yet; and its path without wrappers."""
        key = path.replace(".base_layer", "")
        key = key if name == _tensor_of(module) else f"{key}.{name}"
        while True:
            layer = model.get_submodule(path)
            if isinstance(layer, FallowLayer) and layer.tensor == name:
                return key, layer
            if not path.endswith(".base_layer"):
                break
            path = path.removesuffix(".base_layer")
        if _tensor_of(module) != name:
            raise ModelError(f"'{key}.{name}' shares a weight that is to be adapted, in a way of its own; untie it")
        parent_path, _, child = path.rpartition(".")
        return key, self._wrap(key, module, child, model.get_submodule(parent_path))

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """Tied weights are adapted in every module that shares them: nothing to warn of."""

    def _check_merge_allowed(self) -> None:
        """As above."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's own, all or nothing where it is known beforehand that one of the layers cannot."""
        self._refuse_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _refuse_merge(self, adapter_names: list[str] | None) -> None:
        for layer in _layers(self.model):
            allow(layer, layer.active(adapter_names))

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._refuse_merge(adapter_names)
        for path, layer in list(self.model.named_modules()):
            if not isinstance(layer, FallowLayer):
                continue
            if not merge and not layer.merged:
                layer.settle()
            parent_path, _, child = path.rpartition(".")
            if "base_layer" in path.split("."):  # inside another adapted layer, where PEFT does not look
                if merge:
                    layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                setattr(self.model.get_submodule(parent_path), child, layer.base_layer)
        if hasattr(self.model, SHARED):
            delattr(self.model, SHARED)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: Combination = "linear",
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter made of others, as `weighted.py` says; it is not made active. All or nothing.

        ConfigError for adapters that do not exist or cannot be combined, and for impossible values. The relative error
        of an approximation stands in its config: `model.peft_config[adapter_name].made["error"]`, the largest of all.
        """
        one_of("combination_type", combination_type, get_args(Combination))
        if len(adapters) != len(weights) or not adapters:
            raise ConfigError(f"{len(adapters)} adapters and {len(weights)} weights; give one weight for each")
        if adapter_name in self.peft_config:
            raise ConfigError(f"there is an adapter '{adapter_name}' already; give another name")
        for name in adapters:
            if name not in self.peft_config:
                raise ConfigError(f"there is no adapter '{name}'{nearest(name, self.peft_config)}")
        if combination_type != "linear" and any(
            cast(FallowConfig, self.peft_config[name]).in_place for name in adapters
        ):
            raise ConfigError(f"combination_type={combination_type!r} must be 'linear', the one sum of chosen entries")
        if svd_rank is not None:
            whole("svd_rank", svd_rank)
        if combination_type in DENSE:
            number("density", density, 0.0, 1.0, open_below=True)
        told = (combination_type, svd_rank, density or 1.0, majority_sign_method)
        added: dict[str, tuple[FallowLayer, nn.Module]] = {}
        errors = [0.0]
        for path, layer in self.model.named_modules():
            if not isinstance(layer, FallowLayer):
                continue
            key = path.replace(".base_layer", "") + (f".{layer.tensor}" if isinstance(layer, ParamWrapper) else "")
            held = [(n, w) for n, w in zip(adapters, weights, strict=True) if n in layer.fallow_delta]
            parts = [(layer.fallow_delta[name], weight * layer.scaling[name]) for name, weight in held]
            if parts and all(isinstance(part, Hosted) for part, _ in parts):
                added[key] = layer, type(cast(Hosted, parts[0][0])).combined(parts)
            elif parts:
                made, error = combined(layer, key, parts, *told)
                errors.append(error)
                added[key] = layer, made
        deltas = {key: delta for key, (_, delta) in added.items()}
        config = cast(FallowConfig, self.peft_config[adapters[0]])
        self.peft_config[adapter_name] = describe(config, deltas, max(errors))
        for layer, delta in added.values():
            layer.add(adapter_name, delta, False)

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **told: Any) -> Any:
        """PEFT's own. The config of an unpickled model finds its Deltas again, of which it is about to tell.

        ModelError for tensors that are spread over several processes.
        """
        if isinstance(config, DeltaConfig):
            held = [layer.fallow_delta._modules.get(adapter_name) for layer in _layers(model)]
            config.follow({delta.site_name: delta for delta in held if isinstance(delta, Delta)})
        found = super()._get_adapter_state_dict(model, config, adapter_name, *args, **told)
        if spread := [name for name, tensor in found.items() if is_dtensor(tensor)]:
            raise ModelError(
                f"'{spread[0]}' is sharded; give it the whole tensors, save_pretrained(..., state_dict=full) in one "
                "process, with full = torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options="
                "StateDictOptions(full_state_dict=True)) of all"
            )
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".fallow_delta.{adapter_name}.", ".fallow_delta.", 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's own, strict: AdapterError where a Delta's tensors are missing, misshapen, or those of another."""
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if config.in_place:
            return mapped
        mark = f".fallow_delta.{adapter_name}."
        state, loading = model.state_dict(), waiting(model, adapter_name)
        wanted = {name: tensor for name, tensor in state.items() if mark in f".{name}"}
        given = {name: tensor for name, tensor in mapped.items() if ".fallow_delta." in f".{name}"}
        try:
            check_tensors(config.method, wanted, given, sorted(state_dict))
            refuse_foreign(state, mapped.keys() - given.keys())
        except AdapterError:
            if loading is not None:
                loading.undo()
            raise
        if loading is not None:
            del loading.model.__dict__[PLACE]
        return mapped

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


def _all_layers(model: nn.Module) -> list[str]:
    """The names of all layers of the kinds that are adapted, whatever is around them."""
    return [
        name.replace(".base_layer", "")
        for name, module in model.named_modules()
        if isinstance(module, LAYERS) and not _inside_an_adapter(name)
    ]


def _no_target(model: nn.Module, config: FallowConfig) -> NoTargetError:
    """What was asked for, and what would have fitted."""
    fields = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_to_transform")
    given = {name: value for name in fields if (value := getattr(config, name, None))}
    told = ", ".join(f"{name}={sorted(v) if isinstance(v, set) else v!r}" for name, v in given.items())
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in _all_layers(model) if name))
    more = f" and {len(last) - SHOWN} more" if len(last) > SHOWN else ""
    fit = f"what would have fitted: {', '.join(last[:SHOWN])}{more}" if last else "it has no layer that would fit"
    own = "; weights that a module reads itself go by target_parameters" if hasattr(config, "target_parameters") else ""
    return NoTargetError(f"{told} leave nothing of {type(model).__name__} to adapt; {fit}{own}")


def _inside_an_adapter(name: str) -> bool:
    return any(part.startswith(PREFIX) for part in name.split("."))


def _adaptable(key: str, module: nn.Module, tensor: str | None, in_place: bool, quantised: bool) -> str:
    """The name of the module's weight; ModelError where it has none that the method can adapt."""
    tensor = tensor or _tensor_of(module)
    param = module._parameters.get(tensor)
    kind = type(module).__name__
    if param is None:
        raise ModelError(f"'{key}' ({kind}) has no weight of its own to adapt; leave it out of target_modules")
    if in_place and (param.dtype not in WRITABLE or type(param.data) is not Tensor):
        raise ModelError(
            f"'{key}' ({kind}) is quantised or sharded ({param.dtype}, {type(param.data).__name__}); entries of its "
            "weight cannot be trained in place: load the base in float32, bfloat16 or float16"
        )
    if not in_place:
        if not quantised and not param.is_floating_point():
            raise ModelError(f"'{key}' ({kind}) is of {param.dtype}, in no code that PEFT can read; exclude it")
        view_of(module, tensor)
    if getattr(module, "max_norm", None) is not None:
        raise ModelError(f"'{key}' rewrites its own weight in each forward (max_norm={module.max_norm}); exclude it")
    return tensor


def _around(target: nn.Module, parameter: str | None) -> FallowLayer | None:
    """The layer of ours that is there for this module, or for this parameter of it, already."""
    if isinstance(target, FallowLayer) and (parameter is None or target.tensor == parameter):
        return target
    return None


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
