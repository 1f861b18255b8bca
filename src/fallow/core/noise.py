"""Frozen random numbers that depend on a key and their place alone: not on the device, on how many are made, nor in
which order.

A matrix of them can grow and keeps its leading part; a part of it can be made again where it is needed, instead of
being stored. torch's own generators promise neither, and differ between devices and versions.

Each number is a hash of (key, row, column): two rounds of xor-shift and odd multiplication in wrapping 32 bits, with
keys of the row before and between them. In a row no two numbers are equal.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

CPU = torch.device("cpu")
FIRST, SECOND = 0x7FEB352D, 0x846CA68B - 2**32
BLOCK = 2**17  # numbers that a CPU makes at once: the work space stays in its cache
WIDER = 32  # how many times as many others do, whose time goes by the number of calls


def bits(key: int, rows: Tensor, columns: Tensor) -> Tensor:
    """int32 (rows, columns), equally distributed over all values; `rows`, `columns`: int32 vectors of one device."""
    one, two, three, four = _keys(key)
    return _mix(columns, _mix(rows, one, two)[:, None], _mix(rows, three, four)[:, None])


def uniform(key: int, rows: range, columns: int, device: torch.device = CPU) -> Tensor:
    """float32 (rows, columns) in [-1, 1]: these rows of the key's matrix, its first columns."""
    return _uniform(key, rows.start, rows.stop, columns, device)


# Opaque to torch.compile, which would count on in more than 32 bits where these wrap.
@torch.library.custom_op("fallow::uniform", mutates_args=())
def _uniform(key: int, start: int, stop: int, columns: int, device: torch.device) -> Tensor:
    row = torch.arange(start, stop, dtype=torch.int32, device=device)
    column = torch.arange(columns, dtype=torch.int32, device=device)
    return bits(key, row, column).to(torch.float32).mul_(2.0**-31)


@_uniform.register_fake
def _(key: int, start: int, stop: int, columns: int, device: torch.device) -> Tensor:
    return torch.empty(stop - start, columns, device=device)


def matrix(key: int, shape: tuple[int, int], zeros: float = 0.0, device: torch.device = CPU) -> Tensor:
    """float32 of this shape, of variance 1: uniform, or {-c, 0, c} with this share of zeros if it is above 0."""
    out = torch.empty(shape, device=device)
    for rows in blocks(*shape, device):
        out[rows.start : rows.stop] = part(key, rows, shape[1], zeros, device)
    return out


def part(key: int, rows: range, columns: int, zeros: float = 0.0, device: torch.device = CPU) -> Tensor:
    """These rows of a matrix."""
    drawn = uniform(key, rows, columns, device)
    if zeros:
        return torch.where(drawn.abs() < zeros, 0.0, drawn.sign() * (1.0 - zeros) ** -0.5)
    return drawn.mul_(3.0**0.5)


def combine(key: int, coefficients: Tensor, columns: int) -> Tensor:
    """coefficients (rows,) @ matrix (rows, columns), of which a few rows exist at a time, now and in the backward."""
    return cast(Tensor, _Combine.apply(key, coefficients, columns))


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: int, coefficients: Tensor, columns: int) -> Tensor:
        ctx.key, ctx.number, ctx.columns = key, len(coefficients), columns
        out = coefficients.new_zeros(columns)
        for rows in blocks(len(coefficients), columns, out.device):
            out += coefficients[rows.start : rows.stop] @ part(key, rows, columns, device=out.device).to(out.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = [
            part(ctx.key, rows, ctx.columns, device=grad.device).to(grad.dtype) @ grad
            for rows in blocks(ctx.number, ctx.columns, grad.device)
        ]
        return None, torch.cat(found), None


def blocks(rows: int, columns: int, device: torch.device) -> list[range]:
    """The rows in runs of about BLOCK numbers, or more where that is no CPU."""
    step = max(1, BLOCK * (1 if device.type == "cpu" else WIDER) // max(1, columns))
    return [range(start, min(rows, start + step)) for start in range(0, rows, step)]


def _mix(x: Tensor, before: int | Tensor, between: int | Tensor) -> Tensor:
    x = x ^ before
    x = (x ^ ((x >> 16) & 0xFFFF)) * FIRST + between
    x = (x ^ ((x >> 15) & 0x1FFFF)) * SECOND
    return x ^ ((x >> 16) & 0xFFFF)


def _keys(key: int) -> list[int]:
    """Four int32 of a key of 64 bits (splitmix64)."""
    found = []
    for step in (1, 2):
        z = (key + step * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        found += [z % 2**32 - 2**31, (z >> 32) - 2**31]
    return found
