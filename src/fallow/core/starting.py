"""Where a factor pair starts: a `Start` gives each layer its B0 and A0, whatever the Delta and the host.

    fallow.attach(model, "lora", rank=8, start="pissa")            a name, where the weight alone says it
    fallow.attach(model, "lora", rank=8, start=fallow.LoRAGA(fallow.probe(model, batches, want={"gradient"})))

Papers that put B0 A0 into the adapter take it out of the frozen weight, W' = W - s B0 A0. Here W is never written: the
Delta keeps A0 and B0 and acts as s (B A - B0 A0), see `fallow.core.factor_pair`. So the base stays whole, a quantised
one and for other adapters too; disabling shows it bit for bit; a file needs no data to be loaded; and the plain LoRA on
the original base, [B, -B0] [A; A0] of rank 2 r, is what `factors()` gives. The price is r more ranks in the forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fallow.core.delta import Delta, Site
from fallow.core.errors import ConfigError, DataError, nearest
from fallow.core.fused import Fused

STARTS: dict[str, type[Start]] = {}
PLAIN = ("zero", "default")  # the method's own start


@dataclass(frozen=True)
class Pair:
    """`a` (r, in) and `b` (out, r), None for zero, without the scale: the change at the start is s B A.

    `kept`: whether the model starts with that change; if not it starts as the base, s B A being subtracted again.
    `core`: (r, r), of methods with frozen outer factors.
    """

    b: Tensor | None
    a: Tensor
    core: Tensor | None = None
    kept: bool = False


class Start:
    """Override `pair`. Subclasses are dataclasses of their options; `needs` says which data they have to be given."""

    name: ClassVar[str] = ""
    needs: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("name"):
            STARTS[cls.name] = cls

    def pair(self, site: Site, rank: int, scale: float) -> Pair:
        """Of a layer, for a Delta of this rank and scale s; on `site.device`, in a float dtype."""
        raise ConfigError(f"{type(self).__name__} does not write pair(site, rank, scale)")


def start_of(given: Any) -> Start | None:
    """The Start that is meant; None for the method's own. ConfigError for unknown names and those that need data."""
    found: Start | None = meant("start", given, STARTS, Start, PLAIN)
    return found


def meant(
    argument: str, given: Any, known: Mapping[str, type[Any]], kind: type[Any], none: tuple[str, ...] = ()
) -> Any:
    """What of `known` is given: an instance, a name, or what `said_of` gave; None for None and the names in `none`."""
    if given is None or given in none:
        return None
    if isinstance(given, kind):
        return given
    told = dict(given) if isinstance(given, Mapping) else {"name": given}
    name = told.pop("name", None)
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"{argument}={given!r} does not exist{nearest(str(name), [*known, *none])}")
    cls = known[name]
    if needs := getattr(cls, "needs", ""):
        raise ConfigError(f"{argument}={name!r} needs data, which its name does not bring; give {needs}")
    try:
        return cls(**told)
    except TypeError:
        raise ConfigError(f"{argument}={given!r} has options that '{name}' does not know") from None


def said_of(given: Any) -> Any:
    """What files say of a start, a budget or an objective: its name, and its options that JSON can hold."""
    if given is None or isinstance(given, str | Mapping):
        return given
    if isinstance(given, list | tuple):
        return [said_of(one) for one in given]
    if hasattr(given, "told"):
        return given.told()
    own = dataclasses.fields(given) if dataclasses.is_dataclass(given) else ()
    options = {field.name: getattr(given, field.name) for field in own}
    plain = {name: value for name, value in options.items() if value is None or isinstance(value, str | int | float)}
    return {"name": given.name, **plain}


@torch.no_grad()
def begin(delta: Delta, start: Start | None, site: Site) -> None:
    """Fill a fresh Delta from a start. ConfigError where its method takes none, DataError for values that are none."""
    if start is None:
        return
    if isinstance(delta, Fused):
        for part, block in zip(delta.deltas, delta.block_sites(site), strict=True):
            begin(part, start, block)
        return
    rank, scale = delta.pair_form()
    pair = start.pair(site, rank, scale)
    _check(start, site, pair, rank)
    delta.take(pair)


def _check(start: Start, site: Site, pair: Pair, rank: int) -> None:
    out, inner = site.shape
    shapes = {"a": (pair.a, (rank, inner)), "b": (pair.b, (out, rank)), "core": (pair.core, (rank, rank))}
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ConfigError(f"start='{start.name}' gave {name} {tuple(tensor.shape)} for '{site.name}', not {shape}")
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(
                f"start='{start.name}' found NaN or infinite values for '{site.name}'; look at the batches it saw there"
            )
