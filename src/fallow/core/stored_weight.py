"""A weight of which only a code is kept: dense for as long as its layer computes, with some entries trained beside it.

    forward    W = decode(code);  W.flat[index] = values;  y = x Wᵀ + b;  drop W
    backward   dL/dx = dL/dy W, with W decoded again;  drop W;  dL/dW = dL/dyᵀ x, only if asked for

`StoredWeight` is a tensor of the layer's own shape and dtype, so that names, shapes, `isinstance` checks, PEFT's LoRA
and the selective optimizers go on working; the layer's class is unchanged. F.linear and F.conv2d take the two lines
above; any other operation gets the dense weight. What would write into it is refused, but for `copy_` (so
`load_state_dict` works: a dense weight is coded anew). In a `state_dict()` it stands under its own name as a whole.

`values` (k,) in the weight's dtype are the side branch: trained entries cannot be written into the code, so they are
kept apart and put into the dense weight while there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fallow.core.coding import PackedIndex
from fallow.core.errors import ModelError
from fallow.core.weight_codes import CODES, Parts

PARTS = ("codes", "scale", "maxima", "low", "step")


class Store:
    """What all aliases of one stored weight share: its code, on the device or in host memory, and its trained entries.

    `parts` are the code's tensors, None while they wait in host memory as `host` (see `core.block_swap`).
    `fingerprint`: of the weight before it was coded, "" where it is not known.
    """

    def __init__(self, mode: str, shape: tuple[int, ...], parts: Parts, device: torch.device) -> None:
        self.mode, self.shape, self.device = mode, shape, device
        self.parts: Parts | None = parts
        self.host: Parts | None = None
        self.index: PackedIndex | None = None
        self.values: Tensor | None = None
        self.fingerprint = ""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        rows = self.shape[0]
        return rows, torch.Size(self.shape).numel() // rows

    @property
    def nbytes(self) -> int:
        """Bytes of the code and of the trained entries, wherever they are."""
        code = self.parts if self.parts is not None else self.host or {}
        own = 0 if self.index is None or self.values is None else self.index.nbytes + self.values.nbytes
        return sum(part.nbytes for part in code.values()) + own

    @property
    def known_as(self) -> str:
        """The fingerprint of the weight before it was coded; "" where it is not known, or trained entries differ from
        the code, which makes it another base.
        """
        if self.fingerprint and self.index is not None and self.values is not None:
            plain = self.read(self.index.decode(), self.values.dtype, trained=False)
            return self.fingerprint if torch.equal(plain, self.values) else ""
        return self.fingerprint

    def fetch(self) -> Parts:
        """The code on the device; brought for this use alone where it waits in host memory."""
        if self.parts is not None:
            return self.parts
        assert self.host is not None, "a code is on the device or in host memory"
        return {name: part.to(self.device) for name, part in self.host.items()}

    def dense(self, dtype: torch.dtype, trained: bool = True) -> Tensor:
        """The weight, made anew, with the trained entries in it unless told otherwise."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        CODES[self.mode].decode(self.fetch(), out.view(self.matrix_shape))
        if trained and self.index is not None and self.values is not None:
            out.view(-1).scatter_(0, self.index.decode().long(), self.values.to(dtype))
        return out

    def magnitude(self, precision: torch.dtype = torch.float32) -> Tensor:
        """|W|, and for entries whose code is 0 the mean magnitude of what is rounded to 0 there: a quarter of a step.

        Otherwise the smallest entries of an nf4 weight would be a tenth of it, all of them equal, and a choice of the
        smallest would take those of the model's first layers and none of the others.
        """
        dense = self.dense(precision, trained=False).abs_()
        small = CODES[self.mode].small(self.fetch(), self.matrix_shape)
        if small is not None:
            dense = torch.where(dense == 0, small.view(self.shape).to(precision), dense)
        if self.index is not None and self.values is not None:
            dense.view(-1).scatter_(0, self.index.decode().long(), self.values.to(precision).abs())
        return dense

    # -- trained entries ----------------------------------------------------------------------------------------------

    def read(self, index: Tensor, dtype: torch.dtype, trained: bool = True) -> Tensor:
        """(k,) the entries at sorted flat indices."""
        if trained and self.index is not None and self.values is not None and index.numel() <= self.index.size:
            own = self.index.decode()
            if own.numel() == index.numel() and own.dtype == index.dtype and torch.equal(own, index):
                return self.values.to(dtype, copy=True)
            at = torch.searchsorted(own, index.to(own.dtype)).clamp_(max=max(own.numel() - 1, 0))
            if own.numel() and torch.equal(own[at], index.to(own.dtype)):  # some of them, as after a re-selection
                return self.values.index_select(0, at).to(dtype)
        return self.dense(dtype, trained).view(-1).index_select(0, index)

    def place(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The memory of the trained entries, and where in it those at these sorted indices lie."""
        assert self.index is not None, "no entry is trained"
        assert self.values is not None, "no entry is trained"
        own = self.index.decode()
        return self.values, torch.searchsorted(own, index, out_int32=own.dtype == torch.int32)

    def write(self, index: Tensor, values: Tensor, dtype: torch.dtype) -> None:
        """Put values at flat indices; those that are not among the trained entries become ones."""
        own = index[:0] if self.index is None else self.index.decode()
        at = torch.searchsorted(own, index).clamp_(max=max(own.numel() - 1, 0))
        if not own.numel() or not torch.equal(own[at], index):
            self.keep(PackedIndex(torch.cat([own, index]).unique(), torch.Size(self.shape).numel()), dtype)
        held, positions = self.place(index)
        held.scatter_(0, positions.long(), values.to(held.dtype))

    def keep(self, index: PackedIndex, dtype: torch.dtype) -> None:
        """Keep exactly these entries apart, with the values that they have."""
        self.values = self.read(index.decode(), dtype)
        self.index = index

    # -- copies -------------------------------------------------------------------------------------------------------

    def copy(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Store:
        """The same on its own memory, on another device or with trained entries of another dtype if asked for."""
        device = device or self.device
        made = Store(self.mode, self.shape, _copied(self.parts or {}, device), device)
        made.host = None if self.host is None else dict(self.host)
        made.parts = None if self.parts is None and self.host is not None else made.parts
        made.fingerprint = self.fingerprint
        if self.index is not None and self.values is not None:
            made.index = self.index
            if device != self.device:
                made.index = PackedIndex(self.index.decode().to(device), self.index.numel)
            made.values = self.values.to(device, dtype, copy=True)
        return made

    def take(self, weight: Tensor) -> None:
        """Code a dense weight in place of the former; trained entries keep it exactly."""
        matrix = weight.detach().to(self.device).reshape(self.matrix_shape)
        self.replace(CODES[self.mode].encode(matrix))
        if self.index is not None and self.values is not None:
            self.values.copy_(matrix.reshape(-1).index_select(0, self.index.decode()))
        self.fingerprint = ""

    def replace(self, parts: Parts) -> None:
        """Other numbers in the same code, where the former are."""
        for name, part in (self.parts if self.parts is not None else self.host or {}).items():
            part.copy_(parts[name])


class StoredWeight(Tensor):
    """A weight whose numbers are in a Store; see the module's text."""

    store: Store

    @staticmethod
    def __new__(cls, store: Store, dtype: torch.dtype, requires_grad: bool = False) -> StoredWeight:
        made = torch.Tensor._make_wrapper_subclass(
            cls, store.shape, dtype=dtype, device=store.device, requires_grad=requires_grad
        )
        made.store = store
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return f"StoredWeight({self.store.mode}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def dense(self) -> Tensor:
        """The weight as it acts, made anew."""
        return self.store.dense(self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredWeight:
        if id(self) in memo:
            return cast(StoredWeight, memo[id(self)])
        made: Any = StoredWeight(self.store.copy(), self.dtype)
        if isinstance(self, nn.Parameter):
            made = as_parameter(made.store, self.dtype, self.requires_grad)
        memo[id(self)] = made
        return cast(StoredWeight, made)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModelError(
            f"a weight that is kept as {self.store.mode} cannot be pickled; save the adapter and quantise the base anew"
        )

    # What torch asks of tensors that consist of others: by it `Module.to` exchanges them whole.
    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        parts = self.store.fetch()
        return [f"part_{name}" for name in parts], (self.store, self.dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("part_"):
            return self.store.fetch()[name.removeprefix("part_")]
        raise AttributeError(f"a stored weight has no attribute '{name}'")

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> StoredWeight:
        store, dtype = context
        made = store.copy()
        made.parts = {name.removeprefix("part_"): part for name, part in inner.items()}
        return StoredWeight(made, dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        taken = _LAYERS.get(func)
        if taken is not None:
            bound = _bound(func, args, kwargs)
            if bound is not None:
                return taken(*bound)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        own = _OPERATIONS.get(func)
        if own is not None and isinstance(args[0], StoredWeight):
            return own(*args, **kwargs)
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if isinstance(given, StoredWeight) and argument.alias_info is not None and argument.alias_info.is_write:
                raise ModelError(
                    f"a weight that is kept as {given.store.mode} cannot be written ({func}); train some of its "
                    "entries (fallow.SaRA, SHiRA) or an adapter beside it (LoRA)"
                )
        return func(*(_dense(a) for a in args), **{name: _dense(a) for name, a in kwargs.items()})


def as_parameter(store: Store, dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    """A module's weight that is kept in this store."""
    weight: Any = StoredWeight(store, dtype)
    return nn.Parameter(weight, requires_grad=requires_grad)


def of_parameter(param: Any) -> Store | None:
    """The store of a module's weight; None of any other parameter. (A Parameter of another class than its own.)"""
    return param.store if isinstance(param, StoredWeight) else None


def _dense(value: Any) -> Any:
    if isinstance(value, StoredWeight):
        return value.dense()
    return [_dense(one) for one in value] if isinstance(value, list | tuple) else value


def _copied(parts: Parts, device: torch.device) -> Parts:
    return {name: part.to(device, copy=True) for name, part in parts.items()}


# -- operations on the whole -------------------------------------------------------------------------------------------


def _alias(weight: StoredWeight) -> StoredWeight:
    return StoredWeight(weight.store, weight.dtype)


def _clone(weight: StoredWeight, memory_format: Any = None) -> StoredWeight:
    return StoredWeight(weight.store.copy(), weight.dtype)


def _to_copy(weight: StoredWeight, dtype: Any = None, device: Any = None, **_: Any) -> StoredWeight:
    device = None if device is None else torch.empty(0, device=device).device
    return StoredWeight(weight.store.copy(device, dtype), dtype or weight.dtype)


def _copy_(weight: StoredWeight, source: Tensor, non_blocking: bool = False) -> StoredWeight:
    mine = weight.store
    if not isinstance(source, StoredWeight):
        mine.take(source)
    elif source.store is not mine:
        other = source.store
        if other.mode != mine.mode or other.shape != mine.shape:
            mine.take(source.dense())
        else:
            mine.replace(other.fetch())
            mine.fingerprint = other.fingerprint
            if other.index is not None and other.values is not None:
                mine.index = PackedIndex(other.index.decode().to(mine.device), other.index.numel)
                mine.values = other.values.to(mine.device, weight.dtype, copy=True)
            elif mine.index is not None and mine.values is not None:
                mine.values.copy_(mine.read(mine.index.decode(), weight.dtype, trained=False))
    return weight


aten = torch.ops.aten
_OPERATIONS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
}


# -- the layers --------------------------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    """y (..., out) = x (..., in) Wᵀ + b, keeping x only where the weight's gradient is asked for, and never W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.kind = x.dtype
        return F.linear(x, weight.store.dense(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ weight.store.dense(ctx.kind)
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            of_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_weight, of_bias


class _Conv(torch.autograd.Function):
    """torch.conv2d in the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None, how: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.kind, ctx.how, ctx.sides = x.dtype, how, x.shape
        return torch.conv2d(x, weight.store.dense(x.dtype), bias, *how)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how

        def part(x: Tensor, dense: Tensor, mask: list[bool]) -> Any:
            return aten.convolution_backward(
                grad, x, dense, None, stride, padding, dilation, False, [0, 0], groups, mask
            )  # fmt: skip

        of_x = of_weight = of_bias = None
        nothing = grad.new_zeros(1)  # stands for what the other half does not read
        if ctx.needs_input_grad[0]:
            of_x = part(nothing.expand(ctx.sides), weight.store.dense(ctx.kind), [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            of_weight = part(x, nothing.expand(weight.shape), [False, True, False])[1].to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum((0, 2, 3))
        return of_x, of_weight, of_bias, None


def _linear(x: Tensor, weight: StoredWeight, bias: Tensor | None = None) -> Tensor:
    x, bias = _cast(x, bias, weight.dtype)
    return cast(Tensor, _Linear.apply(x, weight, bias))


def _conv2d(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    x, bias = _cast(x, bias, weight.dtype)
    how = (*(list(_pair(size)) for size in (stride, padding, dilation)), groups)
    if x.ndim == 3:
        return cast(Tensor, _Conv.apply(x[None], weight, bias, how)[0])
    return cast(Tensor, _Conv.apply(x, weight, bias, how))


def _cast(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """As autocast would, had it seen the call; else a mistake in dtypes is one as in any layer."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return x.to(dtype), None if bias is None else bias.to(dtype)
    if x.dtype != dtype:
        raise ModelError(f"a layer with a weight of {dtype} was given {x.dtype}; cast the model or its input")
    return x, bias


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def _bound(func: Any, args: Any, kwargs: Any) -> tuple[Any, ...] | None:
    """The arguments in order where the call is one that `_LAYERS` takes; None for any other use of a stored weight."""
    defaults = _DEFAULTS[func]
    given = dict(zip(defaults, args, strict=False)) | kwargs
    bound = {**defaults, **given}
    plain = not isinstance(bound["input"], StoredWeight) and not isinstance(bound["bias"], StoredWeight)
    fits = plain and isinstance(bound["weight"], StoredWeight) and not isinstance(bound.get("padding"), str)
    return tuple(bound.values()) if fits else None


_LAYERS: dict[Any, Callable[..., Tensor]] = {F.linear: _linear, torch.conv2d: _conv2d, F.conv2d: _conv2d}
_OF_CONV = {"input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_DEFAULTS: dict[Any, dict[str, Any]] = {
    F.linear: {"input": None, "weight": None, "bias": None}, torch.conv2d: _OF_CONV, F.conv2d: _OF_CONV,
}  # fmt: skip
