"""What the layers of an adapter share, at the root of the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fallow.core.peft_host.deltas import moved
from fallow.core.peft_host.layer import FallowLayer, Holder

SHARED = "shared_deltas"


class Shared(nn.Module, Holder):
    """A layer to PEFT that adapts nothing: what it holds is saved, moved, frozen, switched and deleted with the rest.

    It is at the root, which sharding gathers for the whole forward; in the first layer it would be gone when the second
    needs it.
    """

    weight: Any = None  # PEFT looks for those of a base layer
    bias: Any = None
    in_features = out_features = 0

    def __init__(self) -> None:
        super().__init__()
        self.fallow_delta = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: Any = []

    @staticmethod
    def put(model: nn.Module, adapter_name: str, common: nn.Module, trained: bool, like: FallowLayer) -> None:
        """Keep `common`, if it holds anything."""
        if next(common.parameters(), None) is None and next(common.buffers(), None) is None:
            return
        holder = getattr(model, SHARED, None)
        if holder is None:
            holder = Shared()
            setattr(model, SHARED, holder)
        holder.fallow_delta[adapter_name] = moved(common, like.parameter.device).requires_grad_(trained)
        holder._active_adapter = like._active_adapter

    def forward(self, x: Any) -> Any:
        """x: a Sequential runs all that it holds."""
        return x

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing of it is in a weight; the layers merge."""

    def unmerge(self) -> None:
        """As above."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """As above."""

    def scale_layer(self, scale: float) -> None:
        """As above."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """As above."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        if device is not None and adapter_name in self.fallow_delta:
            self.fallow_delta[adapter_name].to(device)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def get_delta_weight(self, adapter: str) -> Tensor:
        raise AttributeError("what layers share changes no weight by itself")
