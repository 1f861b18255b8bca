"""Layers of FLUX and Stable Diffusion 3 as their authors named them, where queries, keys and values are one layer.

Each original layer is one or more of diffusers' layers, whose weights lie one below the other in it: up (or change) is
cut by rows, down is theirs in common. The way back stacks the rows; where the parts' downs differ, the factors become
block-diagonal, so that the change is the same, at the sum of the ranks. The two halves (scale and shift) of the last
modulation stand in the other order.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fallow.core.errors import AdapterError
from fallow.recipes.formats.layers import Factors


@dataclass(frozen=True)
class Rows:
    """Where the rows of a diffusers layer lie in the original one: part `at` of `of`. The parts are equally large; with
    `square` all but the last have as many rows as the layer has columns. `swapped`: the halves stand the other way.
    """

    original: str
    at: int = 0
    of: int = 1
    square: bool = False
    swapped: bool = False

    def bounds(self, rows: int, columns: int) -> tuple[int, int]:
        """First row and the one behind the last, of an original of that many rows and columns."""
        if self.of == 1:
            return 0, rows
        step = columns if self.square else rows // self.of
        return self.at * step, rows if self.at == self.of - 1 else (self.at + 1) * step


_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
# {n}: the number of the block. original -> diffusers, in order of the rows
FLUX: dict[str, tuple[str, ...]] = {
    "double_blocks.{n}.img_attn.qkv": tuple(f"transformer_blocks.{{n}}.attn.{name}" for name in _QKV),
    "double_blocks.{n}.txt_attn.qkv": tuple(f"transformer_blocks.{{n}}.attn.{name}" for name in _ADDED),
    "double_blocks.{n}.img_attn.proj": ("transformer_blocks.{n}.attn.to_out.0",),
    "double_blocks.{n}.txt_attn.proj": ("transformer_blocks.{n}.attn.to_add_out",),
    "double_blocks.{n}.img_mlp.0": ("transformer_blocks.{n}.ff.net.0.proj",),
    "double_blocks.{n}.img_mlp.2": ("transformer_blocks.{n}.ff.net.2",),
    "double_blocks.{n}.txt_mlp.0": ("transformer_blocks.{n}.ff_context.net.0.proj",),
    "double_blocks.{n}.txt_mlp.2": ("transformer_blocks.{n}.ff_context.net.2",),
    "double_blocks.{n}.img_mod.lin": ("transformer_blocks.{n}.norm1.linear",),
    "double_blocks.{n}.txt_mod.lin": ("transformer_blocks.{n}.norm1_context.linear",),
    "single_blocks.{n}.linear1": (
        *(f"single_transformer_blocks.{{n}}.attn.{name}" for name in _QKV),
        "single_transformer_blocks.{n}.proj_mlp",
    ),
    "single_blocks.{n}.linear2": ("single_transformer_blocks.{n}.proj_out",),
    "single_blocks.{n}.modulation.lin": ("single_transformer_blocks.{n}.norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
SD3: dict[str, tuple[str, ...]] = {
    "joint_blocks.{n}.x_block.attn.qkv": tuple(f"transformer_blocks.{{n}}.attn.{name}" for name in _QKV),
    "joint_blocks.{n}.x_block.attn2.qkv": tuple(f"transformer_blocks.{{n}}.attn2.{name}" for name in _QKV),
    "joint_blocks.{n}.context_block.attn.qkv": tuple(f"transformer_blocks.{{n}}.attn.{name}" for name in _ADDED),
    "joint_blocks.{n}.x_block.attn.proj": ("transformer_blocks.{n}.attn.to_out.0",),
    "joint_blocks.{n}.x_block.attn2.proj": ("transformer_blocks.{n}.attn2.to_out.0",),
    "joint_blocks.{n}.context_block.attn.proj": ("transformer_blocks.{n}.attn.to_add_out",),
    "joint_blocks.{n}.x_block.mlp.fc1": ("transformer_blocks.{n}.ff.net.0.proj",),
    "joint_blocks.{n}.x_block.mlp.fc2": ("transformer_blocks.{n}.ff.net.2",),
    "joint_blocks.{n}.context_block.mlp.fc1": ("transformer_blocks.{n}.ff_context.net.0.proj",),
    "joint_blocks.{n}.context_block.mlp.fc2": ("transformer_blocks.{n}.ff_context.net.2",),
    "joint_blocks.{n}.x_block.adaLN_modulation.1": ("transformer_blocks.{n}.norm1.linear",),
    "joint_blocks.{n}.context_block.adaLN_modulation.1": ("transformer_blocks.{n}.norm1_context.linear",),
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
SWAPPED = "final_layer.adaLN_modulation.1"
CONTEXT_MODULATION = re.compile(r"joint_blocks\.\d+\.context_block\.adaLN_modulation\.1")
_NUMBER = re.compile(r"(?<=blocks\.)\d+")
HEADS = {original.split(".", 1)[0] for original in (*FLUX, *SD3)} - {"x_embedder", "context_embedder"}


def is_original(layer: str) -> bool:
    """Whether a dotted layer name is the authors'."""
    return layer.split(".", 1)[0] in HEADS or layer == "x_embedder.proj"


def parts(layer: str, rows: int, columns: int) -> list[tuple[str, Rows]] | None:
    """The diffusers layers of an original one of that shape, and where their rows are; None where it is none."""
    number = _NUMBER.search(layer)
    pattern = _NUMBER.sub("{n}", layer, count=1)
    names = FLUX.get(pattern) or SD3.get(pattern)
    if names is None:
        return None
    # SD3's last block modulates its context by scale and shift alone, as the last layer does
    swapped = layer == SWAPPED or (CONTEXT_MODULATION.fullmatch(layer) is not None and rows == 2 * columns)
    square = pattern == "single_blocks.{n}.linear1"
    filled = [name.replace("{n}", number.group() if number else "") for name in names]
    return [(name, Rows(layer, at, len(names), square, swapped)) for at, name in enumerate(filled)]


def original_of(layer: str, flux: bool) -> tuple[str, int] | None:
    """The original layer that holds a diffusers layer, and its place in it; None where there is none."""
    number = _NUMBER.search(layer)
    pattern = _NUMBER.sub("{n}", layer, count=1)
    for original, names in (FLUX if flux else SD3).items():
        if pattern in names:
            return original.replace("{n}", number.group() if number else ""), names.index(pattern)
    return None


def members(original: str, flux: bool) -> int:
    """How many diffusers layers an original one holds."""
    return len((FLUX if flux else SD3)[_NUMBER.sub("{n}", original, count=1)])


def is_flux(names: Collection[str]) -> bool:
    """Whether weights of diffusers' names are of FLUX rather than of Stable Diffusion 3, of which blocks are alike."""
    return any(name.startswith(("single_transformer_blocks.", "x_embedder.")) for name in names)


def swap(rows: Tensor) -> Tensor:
    """The two halves of the rows in the other order."""
    first, second = rows.chunk(2)
    return torch.cat([second, first])


def cut(tensor: Tensor, where: Rows, columns: int) -> Tensor:
    """The rows of one diffusers layer out of those of the original (its up, its change, its bias)."""
    start, end = where.bounds(tensor.shape[0], columns)
    part = tensor[start:end]
    return swap(part) if where.swapped else part


def stack(original: str, given: Mapping[int, Factors], count: int) -> Factors:
    """The factors of an original layer out of those of its parts; parts that are not given do not change.

    AdapterError where the rows of a missing part cannot be known.
    """
    present = [given[at] for at in sorted(given)]
    if len(given) < count and (count != 3 or len({one.up.shape[0] for one in present}) != 1):
        raise AdapterError(
            f"{original} is {count} layers in one, of which the adapter has {len(given)}; convert it to diffusers"
        )
    if any(one.magnitude is not None for one in present):
        raise AdapterError(f"{original} is {count} layers in one, which DoRA's magnitudes of some cannot be put in")
    rows = [given[at].up.shape[0] if at in given else present[0].up.shape[0] for at in range(count)]
    first = present[0]
    if len(given) == count and all(
        one.alpha == first.alpha and torch.equal(one.down, first.down) for one in present[1:]
    ):
        return Factors(first.down, torch.cat([one.up for one in present]), first.alpha)
    return _blocks(rows, given)


def _blocks(rows: Sequence[int], given: Mapping[int, Factors]) -> Factors:
    """Block-diagonal: the rank is the sum of the ranks; unequal scales go into up."""
    order = sorted(given)
    scales = {given[at].scale for at in order}
    common = scales.pop() if len(scales) == 1 else 1.0
    down = torch.cat([given[at].down for at in order])
    up = down.new_zeros(sum(rows), down.shape[0])
    row = column = 0
    for at, height in enumerate(rows):
        if at in given:
            one = given[at]
            up[row : row + height, column : column + one.rank] = one.up.flatten(1) * (one.scale / common)
            column += one.rank
        row += height
    return Factors(down, up, common * down.shape[0])
