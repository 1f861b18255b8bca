"""Layers that run at a weight W' + E in training while W' itself is never touched.

    y = layer(x) + E x,  and dx gets Eᵀ dy:  the gradient at W' + E, for the layers below too

Random E (out, in) is drawn from a seed in the forward pass and again in the backward pass, so it lives for one product
at a time; it is the same in recomputed forwards and in all micro-batches of a step. E of low rank is two thin products.
The global generators are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fallow.core.errors import ConfigError
from fallow.core.views import ConvView, View
from fallow.optim.pairs import Pair, row_norms_squared


def noise(std: Tensor, inner: int, seed: int, dtype: torch.dtype) -> Tensor:
    """E (out, in): normal, of std (out,) in each row."""
    generator = torch.Generator(std.device).manual_seed(seed)
    drawn = torch.randn(len(std), inner, dtype=dtype, device=std.device, generator=generator)
    return drawn.mul_(std.to(dtype).unsqueeze(1))


class _Noisy(torch.autograd.Function):
    """E x"""

    @staticmethod
    def forward(ctx: Any, view: View, x: Tensor, std: Tensor, seed: int) -> Tensor:
        ctx.view, ctx.seed = view, seed
        ctx.dtype = x.dtype if x.is_floating_point() else std.dtype
        ctx.save_for_backward(x if isinstance(view, ConvView) else None, std)
        return view.op(x, noise(std, view.shape[1], seed, ctx.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[1]:
            return None, None, None, None
        x, std = ctx.saved_tensors
        drawn = noise(std, ctx.view.shape[1], ctx.seed, ctx.dtype)
        if isinstance(ctx.view, ConvView):
            return None, _conv_input(ctx.view, x, drawn, grad), None, None
        return None, (grad.to(ctx.dtype) @ drawn), None, None


def _conv_input(view: ConvView, x: Tensor, matrix: Tensor, grad: Tensor) -> Tensor:
    if view.padding_mode == "zeros" and not isinstance(view.padding, str):
        found: Tensor = torch.ops.aten.convolution_backward(
            grad.to(x.dtype), x, matrix.reshape(-1, *view.kernel), None, view.stride, view.padding, view.dilation,
            False, [0] * len(view.stride), view.groups, [True, False, False],
        )[0]  # fmt: skip
        return found
    inner = x.detach().requires_grad_()
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        y = view.op(inner, matrix)
    return torch.autograd.grad(y, inner, grad.to(y.dtype))[0]


class Layer:
    """An adapted layer with all its pairs, and a hook that adds E x to its output in training.

    `change(layer, x)`: E x, or None for nothing.
    """

    def __init__(self, pairs: Sequence[Pair], index: int, change: Callable[[Layer, Tensor], Tensor | None]) -> None:
        self.pairs, self.index, self.change = list(pairs), index, change
        self.name, self.module, self.view = pairs[0].name, pairs[0].layer, pairs[0].view
        self.known: Tensor | None = None  # |W_i|² (out,) of the frozen weight
        self.drawn: Tensor | None = None  # std (out,), for one step
        self.thin: tuple[Tensor, Tensor] | None = None  # U (out, k), V (k, in) of an E of low rank, for one step

    def __call__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        if not module.training or _off(module):
            return output
        x = args[0] if args else next(iter(kwargs.values()))
        added = self.change(self, x)
        return output if added is None else output + added.to(output.dtype)

    def noisy(self, x: Tensor, std: Tensor, seed: int) -> Tensor:
        """E x of random E."""
        return cast(Tensor, _Noisy.apply(self.view, x, std, seed))

    def low_rank(self, x: Tensor) -> Tensor | None:
        """U V x"""
        if self.thin is None:
            return None
        u, v = self.thin
        x = x.to(v.dtype) if x.is_floating_point() else x
        return self.view.up(self.view.down(x, v), u)

    def parameters(self) -> Iterator[nn.Parameter]:
        return (param for pair in self.pairs for param in (pair.a, pair.b))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (k, in) and s B (out, k) of all pairs together, of at least float32."""
        return self._joined([pair.a for pair in self.pairs], [pair.b for pair in self.pairs])

    def movement(self, of: Callable[[Tensor], Tensor | None]) -> tuple[Tensor, Tensor] | None:
        """V (2k, in) and U (out, 2k) of D(P, Q) = s (P A + B Q): how W moves where B and A move by `of` them. None
        where `of` has none.
        """
        first, second = [of(pair.a) for pair in self.pairs], [of(pair.b) for pair in self.pairs]
        if any(found is None for found in (*first, *second)):
            return None
        a, b = self._joined([pair.a for pair in self.pairs], cast("list[Tensor]", second))
        q, p = self._joined(cast("list[Tensor]", first), [pair.b for pair in self.pairs])
        return torch.cat([a, q]), torch.cat([b, p], 1)

    def _joined(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(first[0].dtype, torch.float32)
        a = torch.cat([tensor.detach().flatten(1).to(wide) for tensor in first])
        b = [p.scale() * tensor.detach().flatten(1).to(wide) for p, tensor in zip(self.pairs, second, strict=True)]
        return a, torch.cat(b, 1)

    def row_norms_squared(self) -> Tensor:
        """|W'_i|² (out,): |W_i|² is computed once; with it go 2 W_i (s B A)_i and |(s B A)_i|²."""
        a, b = self.factors()
        weight = self.view.read(self.pairs[0].read().detach())
        if self.known is None:
            self.known = weight.to(a.dtype).square().sum(1)
        mixed = ((weight.to(a.dtype) @ a.T) * b).sum(1)
        return (self.known + 2 * mixed + row_norms_squared(a, b)).clamp_min(0)


def _off(module: Any) -> bool:
    """Whether its adapters are switched off, by PEFT or by `fallow.disabled`."""
    return bool(getattr(module, "disable_adapters", False)) or bool(
        getattr(module._modules.get("adapters"), "off", False)
    )


class Displaced:
    """Parameters that stand aside of their values for a while, and come back bit for bit."""

    def __init__(self) -> None:
        self.kept: list[tuple[nn.Parameter, Tensor]] = []

    @torch.no_grad()
    def move(self, moves: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Add a tensor to each."""
        for param, by in moves:
            self.kept.append((param, param.data))
            param.data = param.data + by.to(param.dtype)

    def restore(self) -> None:
        for param, values in self.kept:
            param.data = values
        self.kept = []


def layers_of(
    pairs: Sequence[Pair], change: Callable[[Layer, Tensor], Tensor | None], readers: bool = False
) -> list[Layer]:
    """A Layer for each module. ConfigError for one whose module reads the weight itself, unless `readers`."""
    held: dict[int, list[Pair]] = {}
    for pair in pairs:
        if pair.view.kind == "parameter" and not readers:
            raise ConfigError(
                f"GGPO cannot perturb '{pair.name}', a weight that its module reads itself; leave it out of the targets"
            )
        held.setdefault(id(pair.layer), []).append(pair)
    return [Layer(members, index, change) for index, members in enumerate(held.values())]
