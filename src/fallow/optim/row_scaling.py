"""The backward pass of y = B A x with the gradient of each output channel scaled for A and B alone.

    forward     h = A x,  y = B h
    backward    of d = dL/dy:   dB = (c d)ᵀ h     dA = (Bᵀ c d)ᵀ x     dx = d B A, unscaled

    by rows     c_i = 1 / sqrt(|(B A)_i| + 1 / eta²)            (out,), from A and B as they are in the backward
    by outputs  c = 1 / sqrt(|y| + 1 / eta²)                    of every token and channel

A hook on y could not do this: it would scale dx too. Kept for the backward: x as it came, A, B and h, as LoRA keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fallow.core.delta import Delta
from fallow.core.views import View
from fallow.optim.pairs import Pair, row_norms_squared


def row_gains(a: Tensor, b: Tensor, eta: float) -> Tensor:
    """c (..., out) of A (..., r, in) and B (..., out, r), of at least float32; without gradient."""
    wide = torch.promote_types(a.dtype, torch.float32)
    with torch.no_grad():
        return (row_norms_squared(a.to(wide), b.to(wide)).sqrt() + eta**-2).rsqrt()


@dataclass(frozen=True)
class Gain:
    """`eta`: the gain of a row that is zero. `outputs`: by outputs instead of by rows."""

    eta: float
    outputs: bool = False

    def of(self, a: Tensor, b: Tensor, y: Tensor | None, like: Tensor, channels: int) -> Tensor:
        """c, to be multiplied with `like`, a gradient of y."""
        if y is not None:
            return (y.abs() + self.eta**-2).rsqrt().to(like.dtype)
        c = row_gains(a, b, self.eta).to(like.dtype)
        return c if channels == -1 else c.view(-1, *[1] * (like.dim() - 2))


class _RowScaled(torch.autograd.Function):
    """`h`, `y`: where they were computed already, without their graph."""

    @staticmethod
    def forward(
        ctx: Any, view: View, gain: Gain, x: Tensor, a: Tensor, b: Tensor, h: Tensor | None, y: Tensor | None
    ) -> Tensor:
        if h is None or y is None:
            h = view.down(x.to(a.dtype) if x.is_floating_point() else x, a)
            y = view.up(h, b)
        ctx.view, ctx.gain = view, gain
        ctx.save_for_backward(x, a, b, h, y if gain.outputs else None)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, h, y = ctx.saved_tensors
        view: View = ctx.view
        scaled = grad * ctx.gain.of(a, b, y, grad, view.channels)
        run = _linear if view.kind == "linear" else _by_running_again
        of_x, of_a, of_b = run(view, x, a, b, h, grad, scaled, ctx.needs_input_grad[2])
        return None, None, of_x, of_a.to(a.dtype), of_b.to(b.dtype), None, None


def _linear(
    view: View, x: Tensor, a: Tensor, b: Tensor, h: Tensor, grad: Tensor, scaled: Tensor, need_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    flat = scaled.flatten(0, -2)
    of_b = flat.T @ h.flatten(0, -2).to(flat.dtype)
    of_a = (flat @ b.to(flat.dtype)).T @ x.flatten(0, -2).to(flat.dtype)
    of_x = ((grad @ b.to(grad.dtype)) @ a.to(grad.dtype)).to(x.dtype) if need_x else None
    return of_x, of_a, of_b


def _by_running_again(
    view: View, x: Tensor, a: Tensor, b: Tensor, h: Tensor, grad: Tensor, scaled: Tensor, need_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    dtype = grad.dtype
    x = x.detach()
    inner = x.to(dtype).requires_grad_(need_x) if x.is_floating_point() else x
    a, b, h = (tensor.detach().to(dtype).requires_grad_() for tensor in (a, b, h))
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        up, down = view.up(h, b), view.down(inner, a)
    of_b, for_a = torch.autograd.grad(up, (b, h), scaled, retain_graph=need_x)
    (of_a,) = torch.autograd.grad(down, (a,), for_a, retain_graph=need_x)
    if not need_x:
        return None, of_a, of_b
    (for_x,) = torch.autograd.grad(up, (h,), grad)
    (of_x,) = torch.autograd.grad(down, (inner,), for_x)
    return of_x.to(x.dtype), of_a, of_b


# -- in the three hosts -----------------------------------------------------------------------------------------------


class _ScaledDelta(Delta):
    """What our LoRA becomes, together with its own class."""

    gain: Gain
    A: nn.Parameter
    B: nn.Parameter

    def delta_forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().delta_forward(x)
        return cast(Tensor, _RowScaled.apply(self.view, self.gain, x, self.A, self.B, None, None))

    def delta_weight(self) -> Tensor:
        change = super().delta_weight()
        if change.requires_grad:  # a weight that its module reads: the input's gradient does not pass through here
            change.register_hook(lambda grad: grad * row_gains(self.A, self.B, self.gain.eta).to(grad).unsqueeze(1))
        return change


class _Between:
    """A hook of PEFT's lora_A, which remembers its input, and of lora_B, which has the product's gradient scaled."""

    def __init__(self, view: View, gain: Gain, parts: tuple[nn.Module, ...]) -> None:
        self.view, self.gain, self.parts = view, gain, parts
        self.x: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        first, second = cast("tuple[Any, Any]", self.parts)
        if not torch.is_grad_enabled():
            return None
        if module is first:
            self.x = args[0]
            return None
        x, self.x = self.x, None
        a, b = first.weight.flatten(1), second.weight.flatten(1)
        return cast(Tensor, _RowScaled.apply(self.view, self.gain, x, a, b, args[0].detach(), output.detach()))


class _AtOutput:
    """A hook of PEFT's embedding, whose output has a gradient for nothing but the factors."""

    def __init__(self, gain: Gain, layer: Any, adapter: str) -> None:
        self.gain, self.layer, self.adapter = gain, layer, adapter

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._scale)

    def _scale(self, grad: Tensor) -> Tensor:
        a, b = (held[self.adapter] for held in (self.layer.lora_embedding_A, self.layer.lora_embedding_B))
        return grad * row_gains(a, b, self.gain.eta).to(grad.dtype)


_CLASSES: dict[type[Delta], type[Delta]] = {}


def scale_backward(pair: Pair, gain: Gain) -> Any:
    """Let the gradients of a pair be scaled from now on; what is returned ends it by `remove()`."""
    if pair.parts and isinstance(pair.parts[0], Delta):
        return _Exchanged(pair.parts[0], gain)
    if pair.parts:
        hook = _Between(pair.view, gain, pair.parts)
        return _Several([part.register_forward_hook(hook) for part in pair.parts])
    layer: Any = pair.layer
    adapter = next(name for name, factor in layer.lora_embedding_A.items() if factor is pair.a)
    return pair.layer.register_forward_hook(_AtOutput(gain, layer, adapter))


class _Exchanged:
    def __init__(self, delta: Any, gain: Gain) -> None:
        self.delta, self.plain = delta, type(delta)
        if self.plain not in _CLASSES:
            inside = {"__module__": self.plain.__module__, "__doc__": self.plain.__doc__}
            _CLASSES[self.plain] = cast("type[Delta]", type(self.plain.__name__, (_ScaledDelta, self.plain), inside))
        delta.__class__ = _CLASSES[self.plain]
        delta.gain = gain
        delta._layout()  # the engine must not take a short way past `delta_forward`

    def remove(self) -> None:
        self.delta.__class__ = self.plain
        del self.delta.gain
        self.delta._layout()


class _Several:
    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
