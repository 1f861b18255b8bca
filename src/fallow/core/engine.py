"""The only forward of an adapted layer, whichever host holds it.

    additive     y = base(x) + sum of scale * D x
    rewriting    y = op(x, f(W)): one W' for all of them in order, computed again in the backward instead of kept
    output       y = lerp(y, g(x, y), scale)
    parameter    the module runs with f(W) or W + D in the place of its weight

Several active Deltas act in their order; an additive one beside a rewriting one adds to its result, since W' + D and
f(W) + D x are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fallow.core.delta import Delta
from fallow.core.errors import ConfigError
from fallow.core.views import View

Active = Sequence[tuple[Delta, float]]


def run_deltas(
    base: Callable[..., Any],
    layer: nn.Module,
    tensor: str,
    view: View,
    read: Callable[[], Tensor],
    active: Active,
    x: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`base(x, ...)` with the Deltas acting. `layer`, `tensor`: the base module and the name of its weight; `read()`:
    that weight, dequantised.
    """
    if view.kind == "parameter":
        return _in_place_of_parameter(layer, tensor, view, read, active, (x, *args), kwargs)
    rewriting = False
    for delta, _ in active:
        if delta.mode == "weight":
            rewriting = True
    y = _rewritten(layer, view, read, active, x) if rewriting else base(x, *args, **kwargs)
    dtype = y.dtype
    for delta, scale in active:
        mode = delta.mode
        if mode == "weight":
            continue
        inner = _input(delta, x)
        if mode == "add":
            change = delta.delta_forward(inner)
            y = y + (change if scale == 1.0 else change * scale)
        else:
            changed = delta.forward(inner, y)
            y = changed if scale == 1.0 else torch.lerp(y.to(changed.dtype), changed, scale)
    return y if y.dtype == dtype else y.to(dtype)


def _input(delta: Delta, x: Tensor) -> Tensor:
    if delta.has_inputs:
        if delta.drop and delta.training:
            x = F.dropout(x, delta.drop)
        dtype = delta.dtype
        if x.dtype != dtype and not delta.any_dtype and not torch.is_autocast_enabled(x.device.type):
            return x.to(dtype)
    return x


def new_weight(w: Tensor, active: Active) -> Tensor:
    """W' (out, in) after all of them in their order. ConfigError for a Delta that depends on its input."""
    for delta, scale in active:
        if not delta.mergeable:
            raise ConfigError(f"'{delta.name}' acts on a layer's input and output; it has no weight and cannot merge")
        w = delta.new_weight(w.to(torch.promote_types(w.dtype, delta.dtype)), scale)
    return w


def _in_place_of_parameter(
    layer: nn.Module, tensor: str, view: View, read: Callable[[], Tensor], active: Active, args: Any, kwargs: Any
) -> Any:
    weight = read()
    changed = view.write(new_weight(view.read(weight), active), weight).to(weight.dtype)
    return functional_call(layer, {tensor: changed}, args, kwargs, tie_weights=False)


# -- rewriting without a second weight --------------------------------------------------------------------------------


def _rewritten(layer: nn.Module, view: View, read: Callable[[], Tensor], active: Active, x: Tensor) -> Tensor:
    members = [(delta, scale) for delta, scale in active if delta.mode == "weight"]
    bias = cast("Tensor | None", getattr(layer, "bias", None))
    params = [param for delta, _ in members for param in delta.all_parameters() if param.requires_grad]

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        stored = read()
        weight = view.read(stored)
        for delta, scale in members:
            weight = delta.new_weight(weight.to(torch.promote_types(weight.dtype, delta.dtype)), scale)
        dtype = x.dtype if x.is_floating_point() else stored.dtype
        return view.op(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return run(x, bias)
    return cast(Tensor, _Again.apply(run, x, bias, *dict.fromkeys(params)))


class _Again(torch.autograd.Function):
    """run(x, bias), which is run again in the backward: no W' is kept between the two."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, bias: Tensor | None, *params: Tensor) -> Tensor:
        ctx.run = run
        ctx.autocast = (
            x.device.type,
            torch.get_autocast_dtype(x.device.type),
            torch.is_autocast_enabled(x.device.type),
        )
        ctx.save_for_backward(x, bias, *params)
        with torch.no_grad():
            return cast(Tensor, run(x, bias))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, *params = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        inner = x.detach().requires_grad_(needed[0])
        shift = bias if bias is None else bias.detach().requires_grad_(needed[1])
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled) if enabled else nullcontext():
            out = ctx.run(inner, shift)
        wanted = [t for t, need in zip([inner, shift, *params], needed, strict=True) if need]
        found = iter(torch.autograd.grad(out, cast(Any, wanted), grad, allow_unused=True))
        return (None, *(next(found) if need else None for need in needed))
