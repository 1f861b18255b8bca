"""What an adapter's file says of the layers it adapts, so that its tensors can be read without the model.

    {"kind": "linear" | "transposed" | "conv" | "embedding" | "parameter", "shape": of the weight, "odd": ...}

`odd`, if there is one, is what sets a layer apart from those on which other programs' LoRA acts as the layer does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fallow.core.errors import AdapterError
from fallow.core.views import CONVS, ConvView, EmbeddingView, ParameterView, TransposedView, View

KINDS = ("linear", "transposed", "conv", "embedding", "parameter")
SIDES = 8  # dimensions of a weight
LARGEST = 2**40  # entries


def layout(layer: nn.Module, view: View) -> dict[str, Any]:
    """Of a base module and the view of its weight."""
    odd = {"odd": text} if (text := odd_of(layer)) else {}
    if isinstance(view, ConvView):
        return {"kind": "conv", "shape": [view.shape[0], *view.kernel], **odd}
    turned = isinstance(view, TransposedView)
    kind = "embedding" if isinstance(view, EmbeddingView) else "transposed" if turned else view.kind
    return {"kind": kind, "shape": list(reversed(view.shape) if turned else view.shape), **odd}


def odd_of(layer: Any) -> str:
    """What the layer is, where PEFT's LoRA of it computes something else than the layer does; "" where it does not."""
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "the output projection of an attention that reads the weight itself"
    if not isinstance(layer, CONVS):
        return ""
    odd = [("groups", layer.groups, layer.groups != 1), ("dilation", layer.dilation, {*layer.dilation} != {1})]
    odd.append(("padding_mode", layer.padding_mode, layer.padding_mode != "zeros"))
    return next((f"a convolution with {name}={value!r}" for name, value, yes in odd if yes), "")


def check_layout(where: object, key: str, told: Any) -> dict[str, Any]:
    """AdapterError where a file says something else than a layout."""
    fits = isinstance(told, Mapping) and told.get("kind") in KINDS and isinstance(told.get("shape"), list)
    shape = told["shape"] if fits else []
    fits &= 2 <= len(shape) <= SIDES and all(type(side) is int and 0 < side < LARGEST for side in shape)
    numel = 1
    for side in shape if fits else ():
        numel *= side
    dimensions = {"conv": (3, 4, 5), "linear": (2,), "transposed": (2,), "embedding": (2,)}
    fits = fits and numel < LARGEST and (told["kind"] == "parameter" or len(shape) in dimensions[told["kind"]])
    if not fits or not isinstance(told.get("odd", ""), str):
        raise AdapterError(
            f"{where} has broken metadata: it says {told!r} of '{key}', which is no layer; copy it again"
        )
    return dict(told)


def view_from(told: Mapping[str, Any]) -> View:
    """The view of such a layer's weight, to read and write by; `op` of convolutions has a stride of 1."""
    shape = [*told["shape"]]
    if told["kind"] == "conv":
        kind = CONVS[len(shape) - 3]
        return ConvView(cast(Any, kind(shape[1], shape[0], tuple(shape[2:]), bias=False, device="meta")))
    if told["kind"] == "embedding":
        return EmbeddingView(nn.Embedding(shape[0], shape[1], device="meta"))
    if told["kind"] == "transposed":
        return TransposedView(shape[1], shape[0])
    return View(*shape) if told["kind"] == "linear" else ParameterView(torch.empty(shape, device="meta"))
