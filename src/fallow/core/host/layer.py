"""What an adapted module becomes: its class is exchanged for a subclass of the same name, its Deltas are a child.

    Adapted         a Linear, convolution, embedding: `adapters` acts on its input and output
    AdaptedReader   a module that reads weights itself, such as attention or experts: it runs with changed ones

A weight that several modules share has its Deltas at one of them, the leader; the others run these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from operator import attrgetter
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fallow.core.delta import Delta
from fallow.core.engine import Active, new_weight, run_deltas
from fallow.core.errors import ConfigError
from fallow.core.foreign_codes import decoded
from fallow.core.views import View

BASE = "__base__"  # in a mixed batch: a sample without an adapter


class Adapters(nn.ModuleDict):
    """The Deltas at one weight, by adapter. `acting`: those that run now, with their scales, in their order.

    `rows`: which adapter each sample of the batch has. `kept`: the base weight while it is merged. `coded`: whether it
    is in another library's code.
    """

    def __init__(self, key: str, view: View) -> None:
        super().__init__()
        self.key, self.view = key, view
        self.scale: dict[str, float] = {}
        self.active: list[str] = []
        self.merged: list[str] = []
        self.rows: list[str] | None = None
        self.off = False
        self.kept: Tensor | None = None
        self.acting: list[tuple[Delta, float]] = []
        self.coded = False

    def named(self, names: Sequence[str]) -> list[tuple[Delta, float]]:
        return [(cast(Delta, self[name]), self.scale[name]) for name in names if name in self]

    def refresh(self) -> None:
        self.acting = [] if self.off or self.merged else self.named(self.active)

    def changed(self, weight: Tensor, acting: Active) -> Tensor:
        """The weight as its module stores it, with these Deltas in it."""
        return self.view.write(new_weight(self.view.read(weight), acting), weight).to(weight.dtype)


class Adapted(nn.Module):
    plain: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        site = cast(Adapters, self.adapters)
        base = super().forward
        if site.rows is None and not site.acting:
            return base(*args, **kwargs)
        if not args:  # layer(input=x)
            args = (kwargs.pop(next(iter(kwargs))),)
        read: Callable[[], Tensor] = partial(decoded, self) if site.coded else partial(getattr, self, "weight")
        run = partial(run_deltas, base, self, "weight", site.view, read)
        if site.rows is not None:
            return _mixed(run, base, site, args, kwargs)
        return run(site.acting, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revive, (self.plain, False), self.__getstate__()


def _mixed(run: Callable[..., Any], base: Callable[..., Any], site: Adapters, args: Any, kwargs: Any) -> Tensor:
    x, *rest = args
    rows = cast("list[str]", site.rows)
    if x.shape[0] != len(rows):
        raise ConfigError(
            f"mixed(names) has {len(rows)} names, but a layer is given {x.shape[0]} rows ({tuple(x.shape)}); give one "
            "name for each sample, and the layers the samples as their first dimension"
        )
    parts, order = [], []
    for name in dict.fromkeys(rows):
        index = torch.tensor([i for i, other in enumerate(rows) if other == name], device=x.device)
        acting = site.named([name])
        parts.append(run(acting, x[index], *rest, **kwargs) if acting else base(x[index], *rest, **kwargs))
        order.append(index)
    return torch.cat(parts)[torch.cat(order).argsort()]


class AdaptedReader(nn.Module):
    plain: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        shown: list[tuple[nn.Module, str]] = []
        try:
            for tensor, attribute in cast("dict[str, str]", self.adapted_tensors).items():
                site = cast(Adapters, getattr(self, attribute))
                if site.rows is not None:
                    raise ConfigError(
                        f"'{site.key}' is read by its module as a whole, which cannot run each sample with another "
                        "adapter; run the samples one adapter at a time"
                    )
                if site.acting:
                    owner, name = owner_of(self, tensor)
                    changed = site.changed(cast(Tensor, owner._parameters[name]), site.acting)
                    owner.__dict__[name] = changed  # found before the Parameter of that name
                    shown.append((owner, name))
            return super().forward(*args, **kwargs)
        finally:
            for owner, name in shown:
                owner.__dict__.pop(name, None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revive, (self.plain, True), self.__getstate__()


def owner_of(layer: nn.Module, tensor: str) -> tuple[nn.Module, str]:
    """Whose Parameter it is, and by which name: "out_proj.weight" is one of a child."""
    path, _, name = tensor.rpartition(".")
    return (cast(nn.Module, attrgetter(path)(layer)) if path else layer), name


_SUBCLASSES: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}


def adapted(cls: type[nn.Module], reader: bool) -> type[nn.Module]:
    """The subclass that a module of this class becomes."""
    if (cls, reader) in _SUBCLASSES:
        return _SUBCLASSES[cls, reader]
    mixin: type[nn.Module] = AdaptedReader if reader else Adapted
    inside: dict[str, Any] = {"plain": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
    if reader:  # Trainers read the names of a model's inputs from its forward

        @wraps(cls.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return mixin.forward(self, *args, **kwargs)

        inside["forward"] = forward
    made = _SUBCLASSES[cls, reader] = cast("type[nn.Module]", type(cls.__name__, (mixin, cls), inside))
    return made


def _revive(cls: type[nn.Module], reader: bool) -> nn.Module:
    made = adapted(cls, reader)
    return made.__new__(made)


def sites(model: nn.Module) -> Iterator[tuple[nn.Module, Adapters]]:
    """(the adapted module, its Deltas) of every adapted weight, tied ones once."""
    for module in model.modules():
        if isinstance(module, Adapted | AdaptedReader):
            for child in module._modules.values():
                if isinstance(child, Adapters):
                    yield module, child


def weight_at(module: nn.Module, site: Adapters) -> Tensor:
    """The base Parameter that these Deltas change."""
    tensors = cast("dict[str, str]", module.__dict__.get("adapted_tensors", {"weight": "adapters"}))
    tensor = next(tensor for tensor, attribute in tensors.items() if module._modules.get(attribute) is site)
    owner, name = owner_of(module, tensor)
    return cast(Tensor, owner._parameters[name])
