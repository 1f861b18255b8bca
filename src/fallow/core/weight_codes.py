"""Codes in which a frozen weight is kept: 8 bits with a scale a row, or 4-bit NormalFloat with one for each block.

    fp8    W[r, c] ~ q[r, c] * s[r],   q float8 e4m3, s = max_c |W[r, c]| / 448          1 + 4/columns bytes an entry
    int8   the same with q = round(W / s) of -127 .. 127, s = max_c |W[r, c]| / 127
    nf4    W.flat[64 b + i] ~ table[q] * a[b],   q of 16 levels, a the block's largest magnitude        0.516 bytes
           a itself in 8 bits: a[b] ~ low[g] + step[g] * code[b] for each group of 256 blocks
    plain  the values themselves: for weights that wait in host memory (`core.block_swap`)

A convolution counts as the matrix (C_out, C_in * kh * kw). Codes, table and the order of packing are those of
bitsandbytes, whose kernel decodes nf4 on CUDA where it is installed; elsewhere plain torch does, on any device.
Sources: QLoRA (arXiv 2305.14314) for nf4 and the doubly quantised maxima, FP8 Formats (arXiv 2209.05433) for e4m3.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

Mode = Literal["fp8", "int8", "nf4", "plain"]
Parts = dict[str, Tensor]
BLOCK, GROUP = 64, 256  # entries of an nf4 block, blocks whose maxima share a range
CHUNK = 1 << 16  # entries that are decoded at once: temporaries of 0.4 MiB that stay in a core's cache
CHUNK_ON_ACCELERATOR = 1 << 24
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Code(Protocol):
    """How one weight is kept. `matrix` (rows, columns) and `out` are dense; `small` gives, for each entry, the mean
    magnitude of what its code rounds to 0: a quarter of the step there, None where nothing is rounded.
    """

    def encode(self, matrix: Tensor) -> Parts: ...
    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None: ...
    def small(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor | None: ...


class Rows:
    """8 bits an entry and a float32 scale for each row."""

    def __init__(self, dtype: torch.dtype, top: float, least: float) -> None:
        self.dtype, self.top, self.least = dtype, top, least  # `least`: the smallest code above 0

    def encode(self, matrix: Tensor, dither: Tensor | None = None) -> Parts:
        """`dither`: of the matrix's shape, evenly in [0, 1): codes are rounded up or down by it, so that their mean
        over many is the value; for int8.
        """
        matrix = matrix.float()
        scale = matrix.abs().amax(1) / self.top
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        codes = (matrix / scale[:, None]).clamp_(-self.top, self.top)
        if dither is not None:
            codes.add_(dither).floor_()
        elif not self.dtype.is_floating_point:
            codes.round_()
        return {"codes": codes.to(self.dtype), "scale": scale}

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        out.copy_(parts["codes"]).mul_(parts["scale"][:, None])

    def small(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return (parts["scale"] * (self.least / 4))[:, None].expand(shape)


class NormalFloat:
    """4 bits an entry, two to a byte, the first in the high half; blocks of 64 in row-major order."""

    def encode(self, matrix: Tensor) -> Parts:
        flat = matrix.reshape(-1).float()
        blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        parts = encode_maxima(blocks.abs().amax(1))
        # By the maxima as they will be read: their rounding then moves the levels, not the codes away from the values.
        largest = decode_maxima(parts)
        levels = nf4_codes(blocks / torch.where(largest > 0, largest, torch.ones_like(largest))[:, None])
        return {"codes": pack(levels.view(-1)), **parts}

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        decode_nf4(parts["codes"], decode_maxima(parts), out.view(-1))

    def small(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        largest = decode_maxima(parts) * (NF4[8] / 4)
        return largest[:, None].expand(-1, BLOCK).reshape(-1)[: math.prod(shape)].view(shape)


class Plain:
    """The values themselves."""

    def encode(self, matrix: Tensor) -> Parts:
        return {"codes": matrix.detach()}

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        out.copy_(parts["codes"])

    def small(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        return None


INT8 = Rows(torch.int8, 127.0, 1.0)
CODES: dict[str, Code] = {
    "fp8": Rows(torch.float8_e4m3fn, 448.0, 2.0**-9),
    "int8": INT8,
    "nf4": NormalFloat(),
    "plain": Plain(),
}


# -- 4 bits ------------------------------------------------------------------------------------------------------------


def nf4_codes(normalised: Tensor) -> Tensor:
    """uint8 0 .. 15 of the nearest level to each of values in [-1, 1]; those beyond take the ends."""
    table = _table(normalised.device)
    return torch.bucketize(normalised, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)


def pack(codes: Tensor) -> Tensor:
    """(n / 2,) bytes of (n,) codes below 16."""
    return codes[::2] << 4 | codes[1::2]


def decode_nf4(codes: Tensor, largest: Tensor, out: Tensor) -> None:
    """Write the values of packed codes into `out` (n,), by the maxima (blocks,) of their blocks."""
    count = out.numel()
    if out.is_cuda and count % BLOCK == 0 and has_bitsandbytes():
        from bitsandbytes.functional import dequantize_4bit

        dequantize_4bit(codes, absmax=largest, out=out, blocksize=BLOCK, quant_type="nf4")
        return
    pairs = _pairs(out.device)
    chunk = CHUNK if out.device.type == "cpu" else CHUNK_ON_ACCELERATOR
    for start in range(0, count, chunk):
        end = min(start + chunk, count)
        some = codes[start // 2 : -(-end // BLOCK) * BLOCK // 2].int()
        values = pairs.index_select(0, some).view(-1, BLOCK)
        values.mul_(largest[start // BLOCK : start // BLOCK + values.shape[0], None])
        out[start:end].copy_(values.view(-1)[: end - start])


def encode_maxima(largest: Tensor) -> Parts:
    """Non-negative maxima (blocks,) in 8 bits, with a float32 range for each group."""
    blocks = largest.numel()
    filler = largest[-1:].expand(-blocks % GROUP)
    groups = torch.cat([largest, filler]).view(-1, GROUP)
    low, high = groups.amin(1), groups.amax(1)
    step = (high - low) / 255
    codes = ((groups - low[:, None]) / torch.where(step > 0, step, torch.ones_like(step))[:, None]).round_()
    return {"maxima": codes.to(torch.uint8).view(-1)[:blocks].clone(), "low": low, "step": step}


def decode_maxima(parts: Mapping[str, Tensor]) -> Tensor:
    """(blocks,) float32 maxima."""
    codes = parts["maxima"]
    low, step = (parts[name].repeat_interleave(GROUP)[: codes.numel()] for name in ("low", "step"))
    return codes.float().mul_(step).add_(low)


@lru_cache
def has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _table(device: torch.device) -> Tensor:
    return torch.tensor(NF4, device=device)


def _pairs(device: torch.device) -> Tensor:
    """(256, 2): the two levels of each byte."""
    table = _table(device)
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)
