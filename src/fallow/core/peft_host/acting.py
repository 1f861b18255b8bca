"""How Deltas act in a layer of PEFT's: by the engine; merged, by another weight in the place of the base's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fallow.core.delta import Delta
from fallow.core.engine import new_weight, run_deltas
from fallow.core.errors import AdapterError, ConfigError, ModelError
from fallow.core.follower import followed
from fallow.core.stored_weight import StoredWeight
from fallow.core.views import view_of

if TYPE_CHECKING:
    from fallow.core.peft_host.layer import FallowLayer

Active = Sequence[tuple[Delta, float]]


class Acting:
    """The Deltas of a layer, and of those tied to it."""

    def __init__(self, layer: FallowLayer) -> None:
        self.layer = layer
        self.view = view_of(layer.get_base_layer(), layer.tensor)
        self.kept: tuple[nn.Parameter, Any] | None = None  # the base's Parameter and values, while others are merged

    def forward(self, layer: FallowLayer, active: Active, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not active:
            return call(*args, **kwargs)
        base: Any = layer.base_layer
        depth, view = "", self.view
        while "base_layer" in base._modules:  # another adapter around the same module
            base, depth = base.base_layer, depth + "base_layer."
        if layer is not self.layer:
            view = view_of(base, layer.tensor)
            unfit = [delta.name for delta, _ in active if not delta.mergeable]
            if unfit and type(view) is not type(self.view):
                raise ConfigError(f"'{unfit[0]}' acts on inputs, which tied modules do not share; untie the weight")
            active = followed(active, self.view, view)
        if view.kind == "parameter":
            base = layer.base_layer
        elif not args:  # named by the caller, as Linear and the like name it
            args = (kwargs.pop("input"),)
        return run_deltas(call, base, depth + layer.tensor, view, layer.read, active, *args, **kwargs)

    def weight(self, active: Active) -> Tensor:
        weight = self.layer.read()
        if not active:
            return self.layer.parameter
        return self.view.write(new_weight(self.view.read(weight), active), weight).to(weight.dtype)

    # -- merging ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def settle(self, active: Active) -> None:
        self._restore()
        if not active:
            return
        allow(self.layer, active)
        layer, param = self.layer, self.layer.parameter
        changed = self.weight(active)
        if layer.quantization_backend is not None:  # which makes another Parameter; the packed one is kept
            state = getattr(layer.get_base_layer(), "state", None)  # of bitsandbytes' 8-bit layers
            self.kept = (param, {name: getattr(state, name) for name in ("CB", "SCB") if hasattr(state, name)})
            layer.quantization_backend.set_base_weight(layer, changed)
        elif isinstance(param, StoredWeight):
            self.kept = (param, param.store.copy())
            param.store.take(changed)
        else:
            self.kept = (param, param.data.clone())
            param.data.copy_(changed)  # in place, as others may share the memory

    def _restore(self) -> None:
        if self.kept is None:
            return
        (param, values), self.kept = self.kept, None
        if self.layer.quantization_backend is not None:
            base = self.layer.get_base_layer()
            setattr(base, self.layer.tensor, param)
            for name, value in values.items():
                setattr(base.state, name, value)
        elif isinstance(param, StoredWeight):
            param.store.replace(values.fetch())
            param.store.fingerprint = values.fingerprint
        else:
            param.data.copy_(values)

    @torch.no_grad()
    def check(self, active: Active) -> None:
        if active and not bool(torch.isfinite(self.weight(active)).all()):
            raise AdapterError(
                f"the weight of '{active[0][0].site_name}' would hold NaN or infinite values if merged with "
                f"'{active[0][0].name}'; the adapter is broken: do not merge it"
            )

    @torch.no_grad()
    def change(self, delta: Delta, scale: float) -> Tensor:
        weight = self.layer.read()
        matrix = self.view.read(weight)
        matrix = matrix.to(torch.promote_types(matrix.dtype, delta.dtype))
        if not delta.mergeable:
            raise ConfigError(f"'{delta.name}' depends on its input; it changes no weight by a fixed amount")
        add = delta.mode == "add"
        return self.view.write(
            scale * delta.delta_weight() if add else delta.new_weight(matrix, scale) - matrix, weight
        )

    def suspect(self) -> None:
        """Nothing is kept that values could depart from."""

    def loaded(self) -> None:
        """As above."""


def allow(layer: FallowLayer, active: Active) -> None:
    """ConfigError, ModelError where these cannot merge into the layer's weight, whatever their values."""
    for delta, _ in active:
        if isinstance(delta, Delta) and not delta.mergeable:
            raise ConfigError(f"'{delta.name}' acts on a layer's input and output; it has no weight and cannot merge")
    backend = layer.quantization_backend
    if active and backend is not None and not backend.supports_merge:
        raise ModelError(
            f"'{active[0][0].site_name}' is quantised by {backend.backend_name} in a way that cannot be made "
            "again, so nothing merges into it; merge on a base in float32, bf16 or fp16 (of torchao: load the "
            "model with transformers' TorchAoConfig, which tells how)"
        )
