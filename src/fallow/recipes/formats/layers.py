"""What the file formats have in common: by part of the pipeline and by weight, a pair of factors or a dense change.

    Factors   change = alpha / r * up @ down; down (r, in[, kh, kw]), up (out, r[, 1, 1]), as in the file, bit for bit
    Dense     change in full, read from the file when it is wanted

Weights bear diffusers' names (`down_blocks.0...to_q.weight`), those of text encoders without `text_model.` before them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fallow.core.errors import AdapterError

Format = Literal["peft", "diffusers", "kohya", "kohya-ldm", "lycoris-diff", "fallow"]


@dataclass(frozen=True)
class Factors:
    """Low-rank factors of one weight. `magnitude` (out,): DoRA's, the norms of the rows of the changed weight."""

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def trained(self) -> int:
        return self.down.numel() + self.up.numel() + (0 if self.magnitude is None else self.magnitude.numel())

    def matrices(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """up (out, r) and down (r, in * kh * kw), without the scale."""
        return self.up.to(dtype).flatten(1), self.down.to(dtype).flatten(1)

    def change(self, base: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The change (out, in[, kh, kw]); DoRA's depends on the `base` weight."""
        up, down = self.matrices(dtype)
        change = (self.scale * (up @ down)).view(self.shape)
        if self.magnitude is None:
            return change
        if base is None:
            raise ValueError("the change of DoRA depends on the base")
        moved = base.to(dtype).view(self.shape) + change
        rows = (self.shape[0], *[1] * (len(self.shape) - 1))
        norm = moved.flatten(1).norm(dim=1).view(rows)
        return self.magnitude.to(dtype).view(rows) / norm * moved - base.to(dtype).view(self.shape)


@dataclass(frozen=True)
class Dense:
    """A change in full, of a weight or a bias; `read` gives the tensor as it is in the file."""

    read: Callable[[], Tensor]
    shape: tuple[int, ...]

    @property
    def trained(self) -> int:
        return math.prod(self.shape)


Layer = Factors | Dense
LARGEST = 1e12  # of a value in a file; products of larger ones are beyond all numbers
Layers = dict[str, Layer]  # by weight name


@dataclass
class Adapter:
    """An adapter as formats see it.

    `base`: by part, weight name -> [fingerprint, dtype], {} where the file has none. `notes`: what Fallow noted of the
    training (JSON values). `foreign`: other safetensors metadata (`ss_*`, `modelspec.*`).
    """

    format: Format
    parts: dict[str, Layers]
    base: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)

    def layers(self) -> Iterator[tuple[str, str, Layer]]:
        """(part, weight name, layer) of all."""
        for part, layers in self.parts.items():
            for name, layer in layers.items():
                yield part, name, layer

    @property
    def trained(self) -> int:
        return sum(layer.trained for _, _, layer in self.layers())


def different_alphas(adapter: Adapter) -> bool:
    """Whether layers have alphas of their own, which diffusers does not heed in attentions of kohya's format."""
    return len({layer.alpha for *_, layer in adapter.layers() if isinstance(layer, Factors)}) > 1


def evened(adapter: Adapter) -> Adapter:
    """The same changes with one alpha, the largest, in all layers; where it was smaller, up is."""
    if not different_alphas(adapter):
        return adapter
    alpha = max(layer.alpha for *_, layer in adapter.layers() if isinstance(layer, Factors))
    parts: dict[str, Layers] = {}
    for part, name, layer in adapter.layers():
        if isinstance(layer, Factors):
            layer = Factors(layer.down, layer.up * (layer.alpha / alpha), alpha, layer.magnitude)
        parts.setdefault(part, {})[name] = layer
    return Adapter(adapter.format, parts, adapter.base, adapter.notes, adapter.foreign)


def plain(name: str) -> str:
    """A weight's name without what only some versions of transformers put before the names of text encoders."""
    return name.removeprefix("text_model.")


def prefixed(name: str) -> str:
    """The way back: CLIP's weights as files of other programs have them."""
    return f"text_model.{name}" if name.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")) else name


def part_of(names: Iterable[str]) -> str:
    """The part of a pipeline that weights of these names are in."""
    names = [plain(name) for name in names]
    heads = {name.split(".", 1)[0] for name in names}
    if heads & {"transformer_blocks", "single_transformer_blocks", "pos_embed", "context_embedder", "x_embedder"}:
        return "transformer"
    if heads & {"encoder", "embeddings", "final_layer_norm", "text_projection", "shared"}:
        return "text_encoder"
    return "unet"


def finite(name: str, tensor: Tensor, where: object) -> Tensor:
    """The tensor itself. AdapterError where it is of integers, or holds NaN or infinite values."""
    if not tensor.is_floating_point():
        raise AdapterError(f"{where} is broken: '{name}' is of {tensor.dtype}, not of real numbers; copy it again")
    if tensor.numel() and not bool(torch.isfinite(tensor.float()).all()):
        raise AdapterError(f"{where} is broken: '{name}' holds NaN or infinite values; train it again")
    if tensor.numel() and float(tensor.float().abs().max()) > LARGEST:
        raise AdapterError(f"{where} is broken: '{name}' holds values above {LARGEST:g}; copy or train it again")
    return tensor
