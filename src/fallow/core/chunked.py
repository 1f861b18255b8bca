"""Weight gradients in row blocks: a bound on the dense temporary that is smaller than the largest layer.

    for each block of output rows R:   G = gy[:, R]ᵀ x;   g[entries in R] += G.flat[local index];   drop G

x (..., in) and gy (..., out) are the layer's input and output gradient; convolutions take blocks of output channels,
whole groups at a time where the block holds them. The products are those of the dense gradient, so the numbers and the
FLOPs are the same; blocks without a chosen entry are left out.

A layer computes its gradient so after its class was swapped in place for one that inherits from it: names, parameters
and hooks stay, a copy or a pickle of the layer is of the plain class again. Linear and ConvNd layers that use the
stock forward are taken. A weight that is used otherwise (by a functional call, as `nn.MultiheadAttention` does, or in
code compiled by torch.compile) goes through the hook of `compact.Capture`, whole, and is told by `RowBlocks.dense`.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fallow.core.coding import PackedIndex
from fallow.core.compact import Capture, Slot
from fallow.core.errors import ConfigError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
STOCK = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def rows_of(row_chunk: int | str, weight: Tensor) -> int:
    """How many rows (output channels) of a weight one block holds: a number of rows, or a size such as "16MiB"."""
    if isinstance(row_chunk, str):
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", row_chunk)
        if not found or found[2].upper() not in UNITS or float(found[1]) <= 0:
            raise ConfigError(f"row_chunk={row_chunk!r} is no size; give a number of rows, or a size such as '16MiB'")
        size = float(found[1]) * UNITS[found[2].upper()]
        return max(1, int(size // (weight[0].numel() * weight.element_size())))
    if isinstance(row_chunk, bool) or not isinstance(row_chunk, int) or row_chunk < 1:
        raise ConfigError(f"row_chunk={row_chunk!r} must be a number of rows from 1, or a size such as '16MiB'")
    return row_chunk


class RowBlocks:
    """The layers of a model whose weight gradients come in row blocks; `close()` gives them their classes back."""

    def __init__(self, model: nn.Module, capture: Capture, row_chunk: int | str) -> None:
        rows_of(row_chunk, torch.empty(1, 1))  # a mistake in it is told even where no layer is large enough
        self.layers: list[weakref.ref[nn.Module]] = []
        owner = {id(param): slot for slot in capture.slots for param in slot.params}
        self._routed: set[str] = set()
        self._capture, self._row_chunk = capture, row_chunk
        large = self._large()
        for module in model.modules():
            slot = owner.get(id(module._parameters.get("weight")))
            if slot is None or slot.name not in large or not _stock(module):
                continue
            self._routed.add(slot.name)
            _ROUTES[module] = _Route(slot, capture, rows_of(row_chunk, slot.weight))
            module.__class__ = _swapped(type(module))
            self.layers.append(weakref.ref(module))

    @property
    def dense(self) -> list[str]:
        """The weights larger than a block whose whole gradient is made all the same, as far as is known by now."""
        large = self._large()
        return sorted(large - self._routed | (large & self._capture.whole))

    def _large(self) -> set[str]:
        """The names of the weights larger than a block; a loaded state may bring others than there were at first."""
        weights = {slot.name: slot.weight for slot in self._capture.slots}
        return {n for n, w in weights.items() if w.ndim > 1 and rows_of(self._row_chunk, w) < w.shape[0]}

    def close(self) -> None:
        """Compute gradients as before."""
        for found in self.layers:
            module = found()
            if module is not None and _ROUTES.pop(module, None) is not None:
                module.__class__ = module.__class__.__mro__[2]
        self.layers.clear()


@dataclass
class _Route:
    """Where the gradient of one layer's weight goes."""

    slot: Slot
    capture: Capture
    rows: int
    _code: PackedIndex | None = None
    _blocks: list[tuple[int, int, int, int]] = field(default_factory=list)

    def blocks(self, trained: Tensor) -> list[tuple[int, int, int, int]]:
        """(first row, last row + 1, first entry, last entry + 1) of each block that has entries; a host sync, once for
        each choice of entries.
        """
        if self._code is not self.slot.code:
            total, size = self.slot.weight.shape[0], self.slot.weight[0].numel()
            starts = [*range(0, total, self.rows), total]
            edges = torch.tensor([row * size for row in starts], dtype=trained.dtype, device=trained.device)
            ends = torch.searchsorted(trained, edges).tolist()
            every = zip(starts, starts[1:], ends, ends[1:], strict=False)
            self._blocks = [block for block in every if block[2] < block[3]]
            self._code = self.slot.code
        return self._blocks

    def deliver(self, gradient: Callable[[int, int], Tensor], device: torch.device) -> Tensor | None:
        """Gather from `gradient(first, last)` (rows, ...) block by block; returns what to give autograd in its place.

        That is an empty sparse gradient where somebody waits for all uses of the weight to have come in, else None.
        """
        slot = self.slot
        slot.check(device)
        self.capture.begin()
        trained, size = slot.trained, slot.weight[0].numel()
        part = torch.empty(trained.numel(), dtype=slot.proxy.dtype, device=device)
        for first, last, low, high in self.blocks(trained):
            local = trained[low:high] - first * size
            part[low:high] = gradient(first, last).reshape(-1).index_select(0, local)
        slot.add(part)
        if self.capture.consumer is None:
            return None
        weight = slot.weight
        none = torch.empty(weight.ndim, 0, dtype=torch.int64, device=device)
        return torch.sparse_coo_tensor(none, weight.new_empty(0), weight.shape, check_invariants=False)


_ROUTES: weakref.WeakKeyDictionary[nn.Module, _Route] = weakref.WeakKeyDictionary()


class _Chunked(nn.Module):
    """Mixed in before a layer's class."""

    def forward(self, x: Tensor) -> Tensor:
        plain = super().forward
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return plain(x)
        route, weight = _ROUTES.get(self), self._parameters.get("weight")
        if route is None or weight is None or not any(weight is param for param in route.slot.params):
            return plain(x)
        if not weight.requires_grad or (isinstance(self, CONVOLUTIONS) and x.ndim != weight.ndim):
            return plain(x)
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.is_floating_point():
            dtype = torch.get_autocast_dtype(kind)
            x = x.to(dtype) if x.dtype != torch.float64 else x
        elif x.dtype != weight.dtype:
            return plain(x)  # which tells the mistake
        if isinstance(self, nn.Linear):
            return _Linear.apply(x, weight, self.bias, route)
        return _convolve(self, x, route)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy or a pickle is a plain layer: what is trained is this one."""
        made: Any = super().__reduce_ex__(protocol)
        return _blank, (type(self).__mro__[2],), *made[2:]


def _blank(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


_CLASSES: dict[type, type] = {}


def _swapped(kind: type) -> type:
    if kind not in _CLASSES:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        _CLASSES[kind] = type(kind.__name__, (_Chunked, kind), names)
    return _CLASSES[kind]


def _stock(module: nn.Module) -> bool:
    """Whether the layer computes what its base class does, from a plain Parameter."""
    weight = module._parameters["weight"]
    return type(weight) is nn.Parameter and type(module).forward in STOCK and module not in _ROUTES


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, route: _Route) -> Tensor:
        ctx.route = route
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gy,), (x, weight) = upstream, ctx.saved_tensors
        with torch.autocast(gy.device.type, enabled=False):
            gx = gy @ weight.to(gy.dtype) if ctx.needs_input_grad[0] else None
            rows, columns = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1])
            gb = rows.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
            token = None
            if ctx.needs_input_grad[1]:
                token = ctx.route.deliver(lambda first, last: rows[:, first:last].mT @ columns, gy.device)
        return gx, token, gb, None


@dataclass(frozen=True)
class _Geometry:
    """The arguments of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def backward(
        self, gy: Tensor, x: Tensor, weight: Tensor, groups: int, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        none = [0] * len(self.stride)
        return torch.ops.aten.convolution_backward(
            gy, x, weight, [weight.shape[0]], list(self.stride), list(self.padding), list(self.dilation), False, none,
            groups, list(wanted),
        )  # fmt: skip

    def blocks(self, gy: Tensor, x: Tensor, weight: Tensor, first: int, last: int) -> Tensor:
        """(last - first, ...) the weight's gradient for these output channels."""
        per_group, inputs = weight.shape[0] // self.groups, weight.shape[1]
        parts = []
        for start, stop in _by_group(first, last, per_group):
            group, count = start // per_group, max(1, (stop - start) // per_group)
            own = x.narrow(1, group * inputs, count * inputs)
            part = self.backward(gy[:, start:stop], own, weight[start:stop], count, (False, True, False))[1]
            assert part is not None
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _by_group(first: int, last: int, per_group: int) -> Iterator[tuple[int, int]]:
    """Split a range of channels into whole groups taken together, and parts of one group."""
    while first < last:
        whole = first + (last - first) // per_group * per_group
        stop = whole if first % per_group == 0 and whole > first else min(last, (first // per_group + 1) * per_group)
        yield first, stop
        first = stop


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, route: _Route, geometry: _Geometry) -> Tensor:
        ctx.route, ctx.geometry = route, geometry
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            convolve = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[x.ndim]
            return convolve(
                x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), geometry.stride, geometry.padding,
                geometry.dilation, geometry.groups,
            )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gy,), (x, weight), geometry = upstream, ctx.saved_tensors, ctx.geometry
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with torch.autocast(gy.device.type, enabled=False):
            weight = weight.to(gy.dtype)
            gx = gb = token = None
            if needs_x or needs_bias:
                gx, _, gb = geometry.backward(gy, x, weight, geometry.groups, (needs_x, False, needs_bias))
            if needs_weight:
                token = ctx.route.deliver(lambda first, last: geometry.blocks(gy, x, weight, first, last), gy.device)
        return gx, token, None if gb is None else gb.to(ctx.bias_dtype), None, None


def _convolve(layer: Any, x: Tensor, route: _Route) -> Tensor:
    padding = layer.padding
    if layer.padding_mode != "zeros" or padding == "same":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding = "valid"
    if padding == "valid":
        padding = (0,) * len(layer.stride)
    geometry = _Geometry(tuple(layer.stride), tuple(padding), tuple(layer.dilation), layer.groups)
    return _Convolution.apply(x, layer.weight, layer.bias, route, geometry)
