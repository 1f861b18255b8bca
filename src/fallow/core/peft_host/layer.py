"""The module that stands in the place of an adapted one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fallow.core.delta import Delta
from fallow.core.errors import ConfigError, ModelError
from fallow.core.peft_host.acting import Acting
from fallow.core.peft_host.contract import NAME, Active, Kind
from fallow.core.stored_weight import StoredWeight

PREFIX = NAME.lower() + "_"  # transformers derives it in this way
LINEAR = (nn.Linear, Conv1D)


class Holder(BaseTunerLayer):
    """What PEFT switches, freezes, saves and deletes."""

    adapter_layer_names = ("fallow_delta",)


class FallowLayer(nn.Module, Holder):
    """In the place of an adapted module. `leader`: the layer whose Deltas act here, where modules share a weight."""

    other_param_names = ("scaling",)

    def __init__(self, base_layer: nn.Module, tensor: str, backend: Any = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.fallow_delta = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self.tensor = tensor  # the name of the adapted Parameter in its module
        self.quantization_backend = backend
        self.kinds: dict[Any, Kind] = {}
        self.in_features, self.out_features = _features(self.get_base_layer())
        self._leader: list[FallowLayer] = []  # in a list, so that it is no submodule
        self._disable_adapters = False
        self._active_adapter = []
        self.training = base_layer.training
        self.register_state_dict_pre_hook(_show_base)
        self.register_load_state_dict_post_hook(_loaded)

    @property
    def leader(self) -> FallowLayer:
        return self._leader[0] if self._leader else self

    def follow(self, leader: FallowLayer) -> None:
        self._leader = [leader]

    @property
    def parameter(self) -> nn.Parameter:
        """The base's own Parameter."""
        return cast(nn.Parameter, self.get_base_layer()._parameters[self.tensor])

    def add(self, adapter_name: str, delta: nn.Module, trained: bool) -> None:
        self.fallow_delta[adapter_name] = delta.requires_grad_(trained).train(self.training)
        self.scaling[adapter_name] = 1.0
        make = kind_of(delta)
        if make not in self.kinds:
            self.kinds[make] = make(self)
            # Deltas rewrite, or add to, a base weight that shows what others have written into it: they come first,
            # so innermost, in a forward.
            self.kinds = dict(sorted(self.kinds.items(), key=lambda item: item[0] is not Acting))

    def active(self, names: Sequence[str] | None = None) -> list[tuple[Any, float]]:
        if names is None:
            names = self._active_adapter if isinstance(self._active_adapter, list) else [self._active_adapter]
        held = self.fallow_delta._modules
        return [(held[name], self.scaling[name]) for name in names if name in held]

    def by_kind(self, active: Active) -> Iterator[tuple[Kind, Active]]:
        for make, kind in self.kinds.items():
            yield kind, [(delta, scale) for delta, scale in active if kind_of(delta) is make]

    def settle(self, names: Sequence[str] = ()) -> None:
        """Leave the weight merged with these adapters; with none, it is the base bit for bit."""
        if len(self.kinds) > 1:
            for kind in self.kinds.values():
                kind.settle([])
        for kind, members in reversed(list(self.by_kind(self.active(names)))):
            kind.settle(members)

    # -- running ------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is not None:
            return self._mixed(adapter_names, *args, **kwargs)
        if "_is_replica" in self.__dict__:  # whose weight is a copy that no adapter is written into
            raise ModelError("torch.nn.DataParallel cannot run this adapter; use DistributedDataParallel (torchrun)")
        leader = self._leader[0] if self._leader else self
        if leader.merged_adapters:
            if leader._disable_adapters:
                leader.unmerge()
            return self.base_layer(*args, **kwargs)
        return self._run([] if leader._disable_adapters else leader.active(), *args, **kwargs)

    def _run(self, active: Active, *args: Any, **kwargs: Any) -> Any:
        kinds = self.leader.kinds
        if len(kinds) == 1:
            (kind,) = kinds.values()
            return kind.forward(self, active, self.base_layer, *args, **kwargs)
        call: Callable[..., Any] = self.base_layer
        members = list(self.leader.by_kind(active))
        if all(acting for _, acting in members) and any(delta.mode == "weight" for delta, _ in members[0][1]):
            raise ConfigError("an adapter that rewrites weights cannot be active beside one of chosen entries")
        for kind, acting in members:
            call = partial(kind.forward, self, acting, call)
        return call(*args, **kwargs)

    def _mixed(self, adapter_names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Each row of the batch with its own adapter, "__base__" with none."""
        if self.leader.merged:
            raise ConfigError("adapter_names= needs unmerged adapters; call unmerge_adapter() first")
        parts, order = [], []
        for name in dict.fromkeys(adapter_names):
            rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
            parts.append(self._run(self.leader.active([name]), x[rows], *args, **kwargs))
            order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def live(self) -> Tensor:
        """The weight that this layer runs with at present; what a parent gets that reads it."""
        leader = self.leader
        if leader.merged:
            return self.parameter
        members = list(leader.by_kind([] if leader.disable_adapters else leader.active()))
        if len(members) > 1 and all(acting for _, acting in members):
            raise ConfigError("chosen entries and another method cannot both act on a weight that its parent reads")
        for kind, acting in members:
            if acting or len(members) == 1:
                return kind.weight(acting)
        return self.parameter

    @property
    def weight(self) -> Tensor:
        return self.live() if self.tensor == "weight" else cast(Tensor, self.get_base_layer().weight)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not what others hide on a module, such as hooks; but torch's encoder asks its attention for this one.
            if name == "base_layer" or (name.startswith("_") and name != "_qkv_same_embed_dim"):
                raise
            return self.live() if name == self.__dict__.get("tensor") else getattr(self.base_layer, name)

    # -- what PEFT calls ----------------------------------------------------------------------------------------------

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled and not self.merged:
            self.settle()

    def delete_adapter(self, adapter_name: str) -> None:
        if not self.merged:
            self.settle()
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own also casts to the dtype of the base, which would round the trained values.
        if adapter_name in self.fallow_delta and not self.parameter.is_meta:
            self.fallow_delta[adapter_name].to(device or self.parameter.device)

    def read(self) -> Tensor:
        """The base's weight, dequantised; not to be written to."""
        if self.quantization_backend is not None:
            return self.quantization_backend.get_base_weight(self.get_base_layer())
        weight = self.parameter
        if isinstance(weight, StoredWeight):
            return weight.dense()
        return weight.detach() if weight.requires_grad and not weight.is_leaf else weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.fallow_delta]
        if not names:
            return
        if safe_merge:
            for kind, members in self.by_kind(self.active(names)):
                kind.check(members)
        self.settle([*self.merged_adapters, *names])
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """The base again, bit for bit: its values are put back, nothing is subtracted."""
        self.merged_adapters.clear()
        self.settle()

    def get_delta_weight(self, adapter: str) -> Tensor:
        delta = self.fallow_delta[adapter]
        return self.kinds[kind_of(delta)].change(delta, self.scaling[adapter])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        delta = self.fallow_delta._modules.get(adapter_name)
        return isinstance(self.get_base_layer(), LINEAR) and getattr(delta, "mergeable", True)

    def train(self, mode: bool = True) -> FallowLayer:
        for kind in self.kinds.values():
            kind.suspect()
        return super().train(mode)

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = 1.0 if not scale else self.scaling[name] / scale

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if not self.merged:
            self.settle()  # what is loaded is a base, and so must be what it is loaded onto
        super()._load_from_state_dict(*args, **kwargs)


def _features(base: Any) -> tuple[int | None, int | None]:
    """Inputs and outputs, under whichever names the module has them; PEFT wants every layer to tell."""
    names = (("in_features", "out_features"), ("in_channels", "out_channels"), ("num_embeddings", "embedding_dim"))
    for inputs, outputs in (*names, ("embed_dim", "embed_dim")):
        if hasattr(base, inputs):
            return getattr(base, inputs), getattr(base, outputs)
    shape = getattr(getattr(base, "weight", None), "shape", ())
    return tuple(shape) if len(shape) == 2 else (None, None)


def kind_of(delta: Any) -> Any:
    """What makes the Kind of a Hosted, or of a Delta."""
    return Acting if isinstance(delta, Delta) else type(delta).kind


class ParamWrapper(FallowLayer):
    """For `target_parameters`: PEFT knows what wraps a parameter by the name of this class."""

    @property
    def parameter_name(self) -> str:
        return self.tensor


class FallowLinear(FallowLayer):
    """PEFT's "all-linear" finds adapted layers by "Linear" in the name of their class."""


def _show_base(layer: FallowLayer, prefix: str, keep_vars: bool) -> None:
    """A state_dict holds the base's own values beside the adapter's, whatever the weights show."""
    if not layer.merged:
        layer.settle()


def _loaded(layer: FallowLayer, incompatible_keys: Any) -> None:
    for kind in layer.kinds.values():
        kind.loaded()
