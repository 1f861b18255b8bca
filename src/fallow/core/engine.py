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
from torch.autograd import forward_ad
from torch.func import functional_call

from fallow.core.delta import Delta
from fallow.core.errors import ConfigError
from fallow.core.views import View

Active = Sequence[tuple[Delta, float]]
PLAIN = ("torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D")  # their forward is x Wᵀ + bias


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
    if len(active) == 1 and active[0][1] == 1.0 and not args and not kwargs and _plain_linear(layer, active[0][0], x):
        return active[0][0].linear(x, view.read(cast(Tensor, layer.weight)), cast("Tensor | None", layer.bias))
    if view.alone and x.dim() == view.alone:
        return run_deltas(base, layer, tensor, view, read, active, x.unsqueeze(0), *args, **kwargs).squeeze(0)
    rewriting = False
    for delta, _ in active:
        if delta.mode == "weight":
            rewriting = True
    y = _rewritten(base, layer, view, read, active, x, args, kwargs) if rewriting else base(x, *args, **kwargs)
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


def _plain_linear(layer: nn.Module, delta: Delta, x: Any) -> bool:
    """Whether the base is x Wᵀ + bias and nothing else, which the Delta may so compute along with its change."""
    if not delta.has_linear or torch.compiler.is_compiling():
        return False
    kind = getattr(type(layer), "plain", type(layer))
    if f"{kind.__module__}.{kind.__name__}" not in PLAIN or type(x) not in (Tensor, nn.Parameter):
        return False
    held = layer.__dict__
    weight, bias = held["_parameters"].get("weight"), held["_parameters"].get("bias")
    return (
        type(weight) is nn.Parameter
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and not (delta.drop and delta.training)
        and weight.dtype == x.dtype
        and torch.promote_types(x.dtype, delta.dtype) == delta.dtype
        and "forward" not in held
        and not (held["_forward_hooks"] or held["_forward_pre_hooks"])
        and not (held["_backward_hooks"] or held["_backward_pre_hooks"])
        and not _watched(x)
        and delta.joins(x)
    )


def _watched(x: Tensor) -> bool:
    """Whether someone takes operators apart: autocast, tracers, functional transforms, global hooks."""
    return (
        torch.is_autocast_enabled(x.device.type)
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or nn.modules.module._has_any_global_hook()
    )


def _input(delta: Delta, x: Tensor) -> Tensor:
    if delta.has_inputs:
        if delta.drop and delta.training:
            x = F.dropout(x, delta.drop)
        dtype = delta.dtype
        if x.dtype != dtype and not delta.any_dtype and not torch.is_autocast_enabled(x.device.type):
            return x.to(dtype)
    return x


def new_weight(w: Tensor, active: Active) -> Tensor:
    """W' (out, in) as a forward has it: those that rewrite in their order, then what is added to the result.

    ConfigError for a Delta that depends on its input.
    """
    for delta, scale in sorted(active, key=lambda member: member[0].mode != "weight"):
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


def _rewritten(
    base: Any,
    layer: nn.Module,
    view: View,
    read: Callable[[], Tensor],
    active: Active,
    x: Tensor,
    args: Any,
    kwargs: Any,
) -> Tensor:
    members = [(delta, scale) for delta, scale in active if delta.mode == "weight"]
    bias = cast("Tensor | None", getattr(layer, "bias", None))
    if len(members) == 1 and members[0][1] == 1.0 and members[0][0].output is not None:
        y: Tensor = base(x, *args, **kwargs)
        return members[0][0].output(_input(members[0][0], x), y, view.read(read()), bias).to(y.dtype)
    params = [param for delta, _ in members for param in delta.all_parameters() if param.requires_grad]

    def changed(x: Tensor) -> Tensor:
        stored = read()
        weight = new_weight(view.read(stored), members)
        return weight.to(x.dtype if x.is_floating_point() else stored.dtype)

    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _with_weight(view, x, changed(x), bias)
    return cast(Tensor, _Again.apply(view, changed, x, bias, *dict.fromkeys(params)))


def _with_weight(view: View, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return view.op(x, weight, None if bias is None else bias.to(weight.dtype))


class _Again(torch.autograd.Function):
    """The layer with W' = changed(x), which is made again in the backward: no W' is kept between the two."""

    @staticmethod
    def forward(ctx: Any, view: View, changed: Any, x: Tensor, bias: Tensor | None, *params: Tensor) -> Tensor:
        ctx.view, ctx.changed = view, changed
        ctx.autocast = (
            x.device.type,
            torch.get_autocast_dtype(x.device.type),
            torch.is_autocast_enabled(x.device.type),
        )
        ctx.save_for_backward(x, bias, *params)
        with torch.no_grad():
            return _with_weight(view, x, changed(x), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, *params = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        device, dtype, enabled = ctx.autocast
        again = torch.autocast(device, dtype, enabled) if enabled else nullcontext()
        if ctx.view.kind == "linear":
            with torch.enable_grad(), again:
                weight = ctx.changed(x)
            return None, None, *_linear_backward(x, bias, params, weight, grad, needed)
        inner = x.detach().requires_grad_(needed[0])
        shift = bias if bias is None else bias.detach().requires_grad_(needed[1])
        with torch.enable_grad(), again:
            out = _with_weight(ctx.view, inner, ctx.changed(inner), shift)
        wanted = [t for t, need in zip([inner, shift, *params], needed, strict=True) if need]
        found = iter(torch.autograd.grad(out, cast(Any, wanted), grad, allow_unused=True))
        return (None, None, *(next(found) if need else None for need in needed))


def _linear_backward(
    x: Tensor, bias: Tensor | None, params: list[Tensor], weight: Tensor, grad: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, the bias and what W' was made of, without the layer's product a second time."""
    upstream = grad.reshape(-1, grad.shape[-1])
    into = (grad @ weight.detach().to(grad.dtype)).to(x.dtype) if needed[0] else None
    shift = upstream.sum(0).to(bias.dtype) if bias is not None and needed[1] else None
    wanted = [param for param, need in zip(params, needed[2:], strict=True) if need]
    if not wanted or not weight.requires_grad:
        return (into, shift, *[None] * len(params))
    dense = upstream.T @ x.reshape(-1, x.shape[-1]).to(grad.dtype)
    found = iter(torch.autograd.grad(weight, wanted, dense.to(weight.dtype), allow_unused=True))
    return (into, shift, *(next(found) if need else None for need in needed[2:]))
