"""The layers that are probed, and what each of them is given, as rows of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fallow.core.delta import Delta
from fallow.core.errors import ModelError
from fallow.core.foreign_codes import is_coded
from fallow.core.host.targets import QKV, Spot, Targets, choose, spots
from fallow.core.sharded import is_dtensor
from fallow.core.views import ConvView, View


class _Probed:
    """What `choose` asks of a method."""

    name = "fallow.probe"
    supports = ("linear", "conv", "embedding", "parameter")


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight that is probed. `name`: the Site's."""

    spot: Spot

    @property
    def name(self) -> str:
        return self.spot.key

    @cached_property
    def view(self) -> View:
        return self.spot.view()

    @property
    def shape(self) -> tuple[int, int]:
        return self.view.shape

    @property
    def parameter(self) -> Tensor:
        return self.spot.parameter()

    @property
    def coded(self) -> bool:
        """Whether another library's code holds it, so that it can have no gradient itself."""
        return is_coded(self.parameter)

    @property
    def shows_input(self) -> bool:
        """Whether its inputs are rows of numbers that a hook can see."""
        return self.spot.sort in ("linear", "conv") or (self.spot.sort == "attention" and self.spot.tensor in QKV)

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The input, of what its module is called with. None of attention between two inputs, whose one projection of
        both has no one input.
        """
        if self.spot.sort != "attention":
            found: Any = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
            return cast("Tensor | None", found)
        parts = [*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :])][:3]
        if self.spot.tensor == "in_proj_weight":
            return cast(Tensor, parts[0]) if parts[0] is parts[1] is parts[2] else None
        return cast(Tensor, parts[QKV.index(self.spot.tensor) - 1])

    @property
    def reading(self) -> tuple[Any, ...]:
        """What makes rows of an input: layers that are equal in it make equal rows of one tensor."""
        view = self.view
        if isinstance(view, ConvView):
            return "conv", view.kernel, view.groups, view.stride, tuple(_around(view)), view.dilation, view.padding_mode
        return ("linear",)

    def rows(self, x: Tensor, masks: Sequence[Tensor], positions: int | None, generator: torch.Generator) -> Rows:
        """An input of this layer, without what a mask of its shape leaves out.

        Of a convolution the patches that its kernel sees, those of all groups, at `positions` places of each sample.
        """
        if isinstance(self.view, ConvView):
            x = x if x.dim() == len(self.view.stride) + 2 else x.unsqueeze(0)
            patches = _patches(self.view, x, positions, generator)
            return Rows(patches, len(patches), len(x))
        flat = x.reshape(-1, x.shape[-1])
        for mask in masks:
            if x.shape[:-1] == mask.shape or (x.dim() == 2 and len(x) == mask.numel()):
                kept = mask.reshape(-1).to(x.device)
                return Rows(flat[kept].float(), len(flat), len(mask), kept)
        return Rows(flat.float(), len(flat), len(x) if x.dim() > 1 else 1)


@dataclass(frozen=True)
class Rows:
    """`values` (tokens, in) float32: of `every` rows, those that were `kept` (every,), or all. `samples`: how many."""

    values: Tensor
    every: int
    samples: int
    kept: Tensor | None = None

    def sample_of_each(self) -> Tensor:
        """(tokens,) int64: 0, 0, ..., 1, 1, ..."""
        counts = self.every // max(self.samples, 1)
        found = torch.arange(self.samples, device=self.values.device).repeat_interleave(counts)
        return found if self.kept is None else found[self.kept]


def layers_of(model: nn.Module, targets: Targets, exclude: Targets | None) -> list[Layer]:
    """As hosts choose what they adapt. ConfigError where nothing is chosen, ModelError for weights without values."""
    found = spots(model)
    chosen = [Layer(spot) for spot in choose(model, found, cast("type[Delta]", _Probed), targets, exclude)]
    for layer in chosen:
        weight = layer.parameter
        if weight.is_meta:
            raise ModelError(f"'{layer.name}' is on the meta device and has no values; load the base weights first")
        if is_dtensor(weight):
            raise ModelError(f"'{layer.name}' is sharded already; probe the model first, then call fully_shard")
    return chosen


def _patches(view: ConvView, x: Tensor, positions: int | None, generator: torch.Generator) -> Tensor:
    """(samples * groups * positions, in / groups * kernel), ordered as the weight flattened; only these are copied."""
    kernel, spatial = view.kernel[1:], len(view.stride)
    mode = "constant" if view.padding_mode == "zeros" else view.padding_mode
    windows = F.pad(x, _around(view), mode=mode) if any(_around(view)) else x
    for dim, (size, step, apart) in enumerate(zip(kernel, view.stride, view.dilation, strict=True), start=2):
        windows = windows.unfold(dim, (size - 1) * apart + 1, step)[..., ::apart]
    places = windows.shape[2 : 2 + spatial]
    count = places.numel()
    if positions is not None and positions < count:
        chosen = torch.randperm(count, generator=generator)[:positions].sort().values
        index: Any = [at.to(x.device) for at in torch.unravel_index(chosen, places)]
        windows = windows[(slice(None), slice(None), *index)]
    else:
        windows = windows.flatten(2, 1 + spatial)
    grouped = windows.unflatten(1, (view.groups, -1)).transpose(2, 3)  # (N, groups, positions, in / groups, *kernel)
    return grouped.flatten(3).flatten(0, 2).float()


def _around(view: ConvView) -> list[int]:
    return [int(size) for size in view.around]
