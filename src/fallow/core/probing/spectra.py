"""Singular values of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.core.errors import ModelError
from fallow.core.probing.layers import Layer


@torch.no_grad()
def spectrum(layer: Layer) -> Tensor:
    """(min(out, in),), descending, float32 on the CPU; of a stack of E matrices (E, min(out / E, in)).

    One weight in floats at a time. ModelError where it holds NaN or infinite values.
    """
    weight = layer.view.read(layer.spot.read().detach())
    weight = weight.double() if weight.dtype == torch.float64 else weight.float()
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"the weight of '{layer.name}' holds NaN or infinite values; mend the base or exclude it")
    if layer.view.blocks is not None:
        weight = weight.unflatten(0, (layer.view.blocks, -1))
    return torch.linalg.svdvals(weight).float().cpu()
