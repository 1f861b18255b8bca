"""How many bytes `fallow.probe` keeps, told before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fallow.core.errors import ConfigError
from fallow.core.probing.gradients import sketched
from fallow.core.probing.layers import Layer
from fallow.core.probing.options import Options
from fallow.core.statistics import Sketch

WIDE = 4  # bytes of a float32


@dataclass(frozen=True)
class Bytes:
    """At most so many bytes, beside the model, its activations and the batches.

    `kept`: in main memory until the end, by what was asked for (principal components: where the model is). `passing`:
    where the model is, for one layer at a time. Inputs that layers share are counted for each: who shares shows only
    when the model runs.
    """

    kept: dict[str, int]
    passing: int

    @property
    def total(self) -> int:
        return sum(self.kept.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_told(size)}" for name, size in self.kept.items())
        return f"keeps at most {_told(self.total)} ({parts}), and {_told(self.passing)} for one layer at a time"


def _told(size: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:,.3g} {unit}" if unit != "bytes" else f"{size} bytes"
        size /= 1000  # type: ignore[assignment]
    return f"{size:,.3g} GB"


def bytes_of(model: nn.Module, layers: Sequence[Layer], want: frozenset[str], options: Options) -> Bytes:
    """What a run keeps."""
    weights = list({id(layer.parameter): layer for layer in layers}.values())
    inner = [layer.shape[1] for layer in layers if layer.shows_input]
    kept, passing = {}, [0]
    if "gradient" in want:
        kept["gradient"] = sum(_gradient(layer, options) for layer in weights)
    if "fisher" in want:
        kept["fisher"] = sum(WIDE * layer.view.shape[0] * layer.view.shape[1] for layer in weights)
    if {"gradient", "fisher"} & want:
        passing += [(WIDE + layer.parameter.element_size()) * _entries(layer) for layer in weights]
    if "input_covariance" in want:
        kept["input_covariance"] = WIDE * sum(n * n for n in inner)
        passing += [WIDE * n * n for n in inner]
    if "activation" in want:
        kept["activation"] = sum(WIDE * min(options.components, n) * n + 3 * WIDE * n for n in inner)
        passing += [WIDE * 2 * options.components * n for n in inner]
    if "contribution" in want:
        moved = sum(param.numel() * param.element_size() for param in model.parameters())
        kept["contribution"] = moved + WIDE * sum(_entries(layer) for layer in weights)
        kept["contribution"] += sum(2 * WIDE * layer.shape[0] for layer in layers)
    if "spectrum" in want:
        kept["spectrum"] = WIDE * sum(min(layer.shape) for layer in layers)
        passing += [2 * WIDE * _entries(layer) for layer in layers]
    return Bytes(kept, max(passing))


def _entries(layer: Layer) -> int:
    return layer.shape[0] * layer.shape[1]


def _gradient(layer: Layer, options: Options) -> int:
    if options.sketch is None or not sketched(layer.shape, options.sketch):
        return WIDE * _entries(layer)
    width, height = Sketch.sizes(layer.shape, options.sketch)
    return 2 * WIDE * (width * layer.shape[0] + height * layer.shape[1])  # the projections are as large


def refuse_above(limit: float | None, needed: Bytes) -> None:
    """ConfigError where more is kept than is allowed."""
    if limit is not None and needed.total > limit:
        raise ConfigError(
            f"limit={limit:.4g} bytes: this probe {needed}; give fewer targets, ask for less, give sketch=k in place "
            "of whole gradients, or raise the limit"
        )
