"""The contract of a weight parameterization: one frozen weight W of one layer becomes W', with few trained tensors.

A method is one subclass of `Delta` in one file. It sees every weight as a matrix (out, in), whatever the layer is; the
`View` of its layer translates. It writes `Options` (a dataclass, validated when made), `setup(site)`, and ONE of

    factors()             W' = W + B A          B (out, r), A (r, in), all scales within; the rest follows
    delta_weight()        W' = W + D            and `delta_forward(x)` where D x has a cheaper form
    transform(W)          W' = f(W)             and `output(x, y, W, bias)` where y' comes cheaper of the layer's own
                                                output y than of W'; `inverse(W')`, where there is one, is for whoever
                                                holds W' alone: hosts put back the W that they kept
    forward(x, y)         y' = g(x, y)          y is the layer's own output; cannot be merged

and may write, for a plain Linear, `linear(x, W, bias)`, y' in one go; where `factors()` says it all, it is there.

Trained tensors are `nn.Parameter`, frozen ones buffers (persistent: saved in the file; else drawn again from
`site.generator()`). All of them are flat attributes of the Delta: no submodules. Tensors are made on the CPU, in
torch's default dtype; the host moves them to the layer's device. `share(name, site, make)` makes one tensor for all
layers of an adapter. A fresh trained start draws from torch's global generator, a frozen one from `site.generator()`.

Optional: `loss()`, a term of the objective; `on_step(step, total)`, what happens after an optimizer step;
`importance()` and `resize(rank)`, for budgets; `randomize()`, a start that changes the output, for tests.

Nothing here knows a host. Hosts: `fallow.core.peft_host`, `fallow.core.host`; both run `fallow.core.engine`.
"""

from __future__ import annotations

import dataclasses
import inspect
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fallow.core.errors import ConfigError, ModelError, nearest
from fallow.core.factored import through
from fallow.core.low_rank_linear import low_rank_linear
from fallow.core.views import View

if TYPE_CHECKING:
    from fallow.core.starting import Pair

Mode = Literal["add", "weight", "output"]
REGISTRY: dict[str, type[Delta]] = {}


class Site:
    """Where a Delta lives.

    `name`: the module's path. `view`: its weight as a matrix. `common`: the module that holds what the layers of this
    adapter share. `context`: values that the user sets for a forward (`fallow.condition`). `fresh`: False where saved
    tensors replace those that setup makes, so that costly ones need not be computed. `dtype`: of trained tensors.
    `layer`, `rows`: where it is a block of a fused weight, the whole one's name and the block's rows; else its own name
    and None.
    """

    def __init__(
        self,
        name: str,
        view: View,
        read: Callable[[], Tensor],
        common: nn.Module,
        context: dict[str, Any] | None = None,
        seed: int = 0,
        fresh: bool = True,
        block: tuple[str, slice] | None = None,
    ) -> None:
        self.name, self.view, self._read, self.common, self.seed, self.fresh = name, view, read, common, seed, fresh
        self.layer: str = name if block is None else block[0]
        self.rows: slice | None = None if block is None else block[1]
        self.context: dict[str, Any] = {} if context is None else context
        weight = read()
        self.device, self.dtype = weight.device, torch.float64 if weight.dtype == torch.float64 else torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.view.shape

    def weight(self) -> Tensor:
        """(out, in): a copy of the frozen weight, dequantised, in `dtype`, on its device.

        ModelError where it holds NaN or infinite values, or is on the meta device.
        """
        weight = self._read().detach()
        if weight.is_meta:
            raise ModelError(f"'{self.name}' is on the meta device and has no values; load the base weights first")
        weight = self.view.read(weight).to(self.dtype, copy=True)
        if not all_finite(weight):
            raise ModelError(f"the weight of '{self.name}' holds NaN or infinite values; mend the base or exclude it")
        return weight

    def stored(self) -> Tensor:
        """(out, in): the frozen weight as it is now, dequantised, in its own dtype; to be asked in training too."""
        return self.view.read(self._read().detach())

    def generator(self, salt: str = "", shared: bool = False) -> torch.Generator:
        """For frozen random tensors: the same in every process. `shared`: also the same in every layer."""
        return torch.Generator().manual_seed(self.key(salt, shared))

    def key(self, salt: str = "", shared: bool = False) -> int:
        """Of `fallow.core.noise`, likewise."""
        return self.seed + zlib.crc32((("" if shared else self.name) + salt).encode())


def refuse_not_finite(key: str, weight: Tensor) -> None:
    """ModelError where a weight holds NaN or infinite values, if they can be seen: not of coded weights."""
    if type(weight.data) is not Tensor or weight.is_meta or not weight.is_floating_point() or not weight.numel():
        return
    if weight.dtype.itemsize > 1 and not all_finite(weight.detach()):
        raise ModelError(f"the weight of '{key}' holds NaN or infinite values; mend the base or exclude it")


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and nothing infinite; without a temporary of its size."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(high) & torch.isfinite(low))


@dataclasses.dataclass(kw_only=True)
class MethodOptions:
    """What a method can be told; `check()` raises ConfigError, by name, for what it cannot take."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Override it to validate."""


class Delta(nn.Module):
    """What one adapter is in one layer. `self.o`: its options. `self.view`: its layer's view.

    `name`: the catalogue's slug. `supports`: kinds of views. `starts`: "" where the output is unchanged at the start,
    else why it is not. `exact`: whether D is B A of a rank that `factors` gives. `any_dtype`: whether it takes x in the
    dtype it came in (through `fallow.core.factored.down`); else the engine casts x to the trained tensors'.
    """

    name: ClassVar[str] = ""
    mode: ClassVar[Mode] = "add"
    supports: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "parameter")
    starts: ClassVar[str] = ""
    exact: ClassVar[bool] = False
    any_dtype: bool = False
    Options: ClassVar[type[MethodOptions]] = MethodOptions
    context: dict[str, Any]  # values for a forward, set by `fallow.condition`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "mode" not in own:
            written = {"forward": "output", "transform": "weight", "delta_weight": "add", "factors": "add"}
            cls.mode = next((mode for method, mode in written.items() if method in own), cls.mode)  # type: ignore[misc]
        if "factors" in own and "exact" not in own:
            cls.exact = True
        if own.get("name"):
            if REGISTRY.setdefault(cls.name, cls).__qualname__ != cls.__qualname__:
                raise ConfigError(f"the name '{cls.name}' is taken by {REGISTRY[cls.name]}; choose another")
            REGISTRY[cls.name] = cls

    def __init__(self, site: Site, options: MethodOptions | None = None, **given: Any) -> None:
        super().__init__()
        self.o: Any = options if options is not None else self.Options(**given)
        self.view, self.site_name = site.view, site.name
        if site.view.kind not in self.supports:
            raise ModelError(
                f"'{self.name}' cannot adapt '{site.name}', a layer of the kind '{site.view.kind}'; it takes "
                f"{', '.join(self.supports)}: exclude that layer"
            )
        self.__dict__["_common"] = (site.common,)  # a tuple hides it from nn.Module
        self.__dict__["context"] = site.context
        self.__dict__["_site"] = (site,)  # not W itself, which hosts may replace
        before = torch.get_default_dtype()
        torch.set_default_dtype(site.dtype)
        try:
            self.setup(site)
        finally:
            torch.set_default_dtype(before)
        self._layout()

    def _layout(self) -> None:
        """What the engine asks for in every forward, found once."""
        self.has_inputs = self.view.kind != "embedding"
        drop = float(getattr(self.o, "dropout", 0.0) or 0.0)
        self.drop = drop if self.has_inputs and self.mode == "add" else 0.0
        if self.exact and type(self).delta_forward is Delta.delta_forward:
            self.any_dtype = True
        self.has_linear = self.view.kind == "linear" and self.mode == type(self).mode and self._has_linear()

    def _has_linear(self) -> bool:
        """Whether `linear` says what the methods of the class do: none is written again in a class below it."""
        below: set[str] = set()
        for cls in type(self).__mro__:
            if "linear" in vars(cls):
                written = {"delta_weight", "delta_forward", "transform", "output", "forward"} & below
                return not written and (self.exact if cls is Delta else "factors" not in below)
            below.update(vars(cls))
        return False

    # -- what a method writes -----------------------------------------------------------------------------------------

    def setup(self, site: Site) -> None:
        """Declare the tensors. The output must be unchanged at first, unless `starts` says why not."""
        raise ConfigError(f"{type(self).__name__} does not write setup(site)")

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, r) and A (r, in) with D = B A, differentiable. ConfigError where D has no such form."""
        raise ConfigError(f"'{self.name}' is no product of two factors")

    def delta_weight(self) -> Tensor:
        """D (out, in), differentiable."""
        b, a = self.factors()
        return b @ a

    def delta_forward(self, x: Tensor) -> Tensor:
        """D x, in the way of the layer. Dropout on x has been applied."""
        if self.exact and self.view.kind != "parameter":
            b, a = self.factors()
            return through(self.view, x, a, b)
        return self.view.op(x, self.delta_weight())

    def joins(self, x: Tensor) -> bool:
        """Whether `linear` is cheaper for this x than the usual way."""
        return True

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """y' of a frozen Linear, W x + bias, with the change, where one operator for both is cheaper; in the dtype of
        x, which is W's and no wider than the trained tensors'. x is whole: methods that drop of it do so here.
        """
        b, a = self.factors()
        return low_rank_linear(x, w, bias, b, a)

    def transform(self, w: Tensor) -> Tensor:
        """W' (out, in) of W (out, in), differentiable; W itself must stay as it is."""
        return w + self.delta_weight().to(w.dtype)

    inverse: Callable[[Tensor], Tensor] | None = None
    output: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y' of the layer's input x and its output y."""
        raise ConfigError(f"'{self.name}' changes the weight; it has no forward of its own")

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        """How many numbers are trained in a layer of this (out, in); shared ones are told by `shared_count`."""
        raise ConfigError(f"{cls.__name__} does not write parameter_count(shape, options)")

    @classmethod
    def shared_count(cls, shapes: list[tuple[int, int]], options: Any) -> int:
        """How many trained numbers the layers of these shapes share."""
        return 0

    def loss(self) -> Tensor | None:
        """A scalar that training adds to the objective; None for none."""
        return None

    def on_step(self, step: int, total: int | None) -> None:
        """After optimizer step number `step`, from 1, of `total` where that is known."""

    def importance(self) -> Tensor:
        """(r,): how much each rank is worth. ConfigError where the method has no ranks."""
        raise ConfigError(f"'{self.name}' has no ranks of its own to weigh")

    def used_ranks(self) -> int:
        """How many ranks change the output; `resize` to as many changes none of it. ConfigError as `importance`."""
        return int((self.importance() > 0).sum())

    def resize(self, rank: int) -> None:
        """Give it this rank, keeping the most important; growth starts unchanged. ConfigError where it cannot."""
        raise ConfigError(f"'{self.name}' cannot change its rank")

    def pair_form(self) -> tuple[int, float]:
        """Rank and scale of the factor pair that a start fills. ConfigError where the method has none."""
        raise ConfigError(f"'{self.name}' has no factor pair that start= could fill; leave start out, or use 'lora'")

    def take(self, pair: Pair) -> None:
        """Start from this pair of factors; see `fallow.core.starting`."""
        self.pair_form()

    @torch.no_grad()
    def randomize(self) -> None:
        """A change that is not the identity, drawn from torch's global generator."""
        for param in self.parameters():
            param.add_(0.1 * torch.randn_like(param))

    # -- shared tensors -----------------------------------------------------------------------------------------------

    def share(self, name: str, site: Site, make: Callable[[], Tensor], saved: bool = False) -> None:
        """Let `self.shared(name)` be one tensor for all layers: a Parameter where `make` gives one (trained), else a
        buffer, in the file only where `saved`. Whoever comes first makes it.
        """
        if not hasattr(site.common, name):
            made = make()
            if isinstance(made, nn.Parameter):
                site.common.register_parameter(name, made)
            else:
                site.common.register_buffer(name, made, persistent=saved)

    def share_matrix(
        self, name: str, site: Site, shape: tuple[int, int], make: Callable[..., Tensor], saved: bool = False
    ) -> None:
        """Let `self.shared(name)` be one frozen matrix for all layers, which slice it: of at least this shape, in the
        file only where `saved`. A layer that needs more has it made again by `make((rows, columns))`, whose values may
        depend on their place only (`fallow.core.noise`): what the layers before have sliced stays as it was.
        """
        held = getattr(site.common, name, None)
        wanted = shape if held is None else tuple(max(*sizes) for sizes in zip(shape, held.shape, strict=True))
        if held is None or wanted != held.shape:
            made = make(wanted).to(site.dtype if held is None else held.dtype)
            site.common.register_buffer(name, made if held is None else made.to(held.device), persistent=saved)

    def shared(self, name: str) -> Tensor:
        """Looked up at each use: hosts replace Parameters (casts, loading, sharding)."""
        tensor: Tensor = getattr(self.__dict__["_common"][0], name)
        return tensor

    # -- what a host asks ---------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation: that of the trained tensors."""
        for param in self._parameters.values():
            if param is not None:
                return param.dtype
        return torch.float32

    def stored(self) -> Tensor:
        """(out, in): the frozen weight as it is now, dequantised, in its own dtype."""
        weight: Tensor = self.__dict__["_site"][0].stored()
        return weight

    def all_parameters(self) -> list[nn.Parameter]:
        """Its own and the shared ones."""
        return [*self.parameters(), *self.__dict__["_common"][0].parameters()]

    def new_weight(self, w: Tensor, scale: float = 1.0) -> Tensor:
        """W' of the matrix W, where the change counts `scale` times."""
        if self.mode == "add" and scale != 1.0:
            return w + (scale * self.delta_weight()).to(w.dtype)
        changed = self.transform(w)
        return changed if scale == 1.0 else torch.lerp(w, changed, scale)

    @property
    def mergeable(self) -> bool:
        return self.mode != "output"


def make_options(method: type[Delta], given: Mapping[str, Any]) -> MethodOptions:
    """The method's options. ConfigError, by name, for unknown ones and impossible values."""
    known = [field.name for field in dataclasses.fields(method.Options)]
    for name in given:
        if name not in known:
            raise ConfigError(f"'{method.name}' has no option {name}={given[name]!r}{nearest(name, known)}")
    return method.Options(**given)


def method_of(name: str | type[Delta]) -> type[Delta]:
    """The Delta class of a name. ConfigError with the nearest name where there is none."""
    if inspect.isclass(name) and issubclass(name, Delta):
        return name
    if name not in REGISTRY:
        raise ConfigError(f"method={name!r} is no weight parameterization{nearest(str(name), REGISTRY)}")
    return REGISTRY[str(name)]


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """ConfigError unless `value` is a whole number in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        upper = "" if most is None else f" and at most {most}"
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}{upper}")


def number(name: str, value: Any, least: float = 0.0, most: float = float("inf"), open_below: bool = False) -> None:
    """ConfigError unless `value` is a finite number in [least, most] (above `least` where `open_below`)."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    if not fits or value in (float("inf"), float("-inf")) or (open_below and value == least):
        start = f"above {least}" if open_below else f"at least {least}"
        upper = "" if most == float("inf") else f" and at most {most}"
        raise ConfigError(f"{name}={value!r} must be a finite number {start}{upper}")


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """ConfigError unless `value` is one of the allowed."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")


def fits_rank(site: Site, rank: int, name: str = "rank") -> None:
    """ConfigError where a rank is above what the layer's weight can have."""
    if rank > min(site.shape):
        raise ConfigError(
            f"{name}={rank} is above what '{site.name}' of {site.shape} can have; give at most {min(site.shape)}, or a "
            "rank of its own: patterns={'...': {'" + name + "': ...}}"
        )
