"""Weights that other libraries keep in codes, read as numbers: torchao's, and bitsandbytes' in 4 and 8 bits.

Only read: an adapter acts beside the layer's own forward, or reads the whole weight where its method wants it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fallow.core.stored_weight import StoredWeight

PARAMS4BIT, INT8PARAMS = "Params4bit", "Int8Params"  # of bitsandbytes


def is_coded(weight: Tensor) -> bool:
    """Whether another library's code of these kinds holds the weight."""
    if isinstance(weight, StoredWeight):
        return False
    if type(weight).__name__ in (PARAMS4BIT, INT8PARAMS):
        return type(weight).__module__.startswith("bitsandbytes")
    return type(weight.data) is not Tensor and type(weight.data).__module__.startswith("torchao")


def decoded(layer: nn.Module, tensor: str = "weight") -> Tensor:
    """The layer's weight in floats, a new tensor; of a plain one that itself."""
    weight: Any = layer._parameters[tensor]
    if not is_coded(weight):
        return cast(Tensor, weight)
    with torch.no_grad():
        if type(weight).__name__ == PARAMS4BIT:
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight.data, weight.quant_state)
        if type(weight).__name__ == INT8PARAMS:
            from bitsandbytes.functional import int8_vectorwise_dequant

            scale = getattr(getattr(layer, "state", None), "SCB", None)  # where a forward has taken them to
            return cast(Tensor, int8_vectorwise_dequant(weight.data, weight.SCB if scale is None else scale))
        return cast(Tensor, weight.dequantize())
