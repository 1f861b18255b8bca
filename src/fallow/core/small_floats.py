"""Small floats with a scale for each block of entries: how moments of optimizers are kept in 8 or 4 bits.

    M8   sign + 4 bits of exponent + 3 of mantissa      relative step 2^-3, range 2^-15 to 1 of the block's largest |x|
    V8   5 bits of exponent + 3 of mantissa             relative step 2^-3, range 2^-31 to 1
    M4   sign + 3 bits of exponent                      powers of two, 2^-6 to 1, and zero
    V4   4 bits of exponent                             powers of two, 2^-14 to 1

The code of x is the top of the bit pattern of the float32 x / scale, so encoding and decoding are shifts and additions
on every device. Rounding is dithered: before the low bits are cut off, a number is added that is spread evenly over
them, from the entry's place and the step. Over the steps the mean is then exact; and as nothing is drawn by chance, a
resumed run goes on bit for bit. What has no sign never rounds to zero. `to_bfloat16` dithers in the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Fractions of 2^32 whose multiples fill the range most evenly: the golden ratio over the steps, where the mean counts;
# the plastic number over the places.
STEP, PLACE, SIGNED = 0x9E3779B9, 0xC13FA9A9, 0x5851F42D


@dataclass(frozen=True)
class Format:
    """`linear`: values below the least one are rounded to it or to zero by their size, so that their mean is exact."""

    exponent: int
    mantissa: int
    signed: bool
    block: int
    linear: bool = False

    @property
    def bits(self) -> int:
        return self.exponent + self.mantissa + self.signed

    @property
    def cut(self) -> int:
        """Low bits of a float32 that are cut off."""
        return 23 - self.mantissa

    @property
    def lowest(self) -> int:
        """Of the exponent, in units of the code."""
        return (127 - (1 << self.exponent) + 1) << self.mantissa

    @property
    def top(self) -> float:
        """What the largest code stands for: (2 - 2^-mantissa) * 2^0."""
        return 2 - 2.0**-self.mantissa


M8, V8 = Format(4, 3, True, 256), Format(5, 3, False, 256)
M4, V4 = Format(3, 0, True, 128, linear=True), Format(4, 0, False, 128)


def encode(x: Tensor, form: Format, step: int, place: int = 0) -> tuple[Tensor, Tensor]:
    """(codes uint8, scales (b,) float32) of x (k,), padded by zeros to b whole blocks; two 4-bit codes to a byte.

    `place`: of the first among entries that are encoded a part at a time.
    """
    blocks = nn.functional.pad(x, (0, -x.numel() % form.block)).view(-1, form.block)
    size = blocks.abs() if form.signed else blocks
    scale = size.amax(dim=1)
    size = size * (form.top / torch.where(scale > 0, scale, 1.0)).unsqueeze(1)
    bits, dither = size.view(torch.int32), _dither(size, form.cut, step, form.signed, place)
    code = bits.add(dither).bitwise_right_shift_(form.cut).sub_(form.lowest)
    most = (1 << (form.exponent + form.mantissa)) - 1
    if form.linear:  # below the least one this is the larger of the two, and above never
        least = math.ldexp(1.0, 2 - (1 << form.exponent))
        part = (size.clamp(max=least).mul_(2.0**form.cut / least)).int().add_(dither).bitwise_right_shift_(form.cut)
        code = torch.maximum(part, code)
    code = code.clamp_(0 if form.signed else 1, most)
    if form.signed:  # the sign bit, moved to the top of the code
        code |= blocks.view(torch.int32).bitwise_right_shift(32 - form.bits).bitwise_and_(most + 1)
    found = code.to(torch.uint8).view(-1)
    return (found if form.bits == 8 else _packed(found, form.block)), scale


def decode(codes: Tensor, scale: Tensor, size: int, form: Format) -> Tensor:
    """(size,) float32, what the codes stand for."""
    code = (codes if form.bits == 8 else _unpacked(codes, form.block)).to(torch.int32).view(-1, form.block)
    if form.signed:  # the code to the top, down again with its sign, and what the sign has filled taken away
        code = code.bitwise_left_shift_(32 - form.bits).bitwise_right_shift_(8 - form.exponent)
        code = code.bitwise_and_(_int32(1 << 31 | (1 << (form.exponent + 23)) - (1 << form.cut)))
        value = code.add_(form.lowest << form.cut).view(torch.float32)
        value = nn.functional.hardshrink(value, math.ldexp(1.0, 1 - (1 << form.exponent)))  # a magnitude of 0 is zero
    else:
        value = code.add_(form.lowest).bitwise_left_shift_(form.cut).view(torch.float32)
    return value.mul_((scale / form.top).unsqueeze(1)).view(-1)[:size]


def to_bfloat16(x: Tensor, step: int, place: int = 0) -> Tensor:
    """`x` (float32, any shape) in bfloat16, rounded up or down so that the mean over steps is x; NaNs stay.

    `place`: of the first entry among all that are rounded together, so that parts of a tensor differ.
    """
    bits = _dither(x, 16, step, True, place).add_(x.contiguous().view(torch.int32)).bitwise_and_(~0xFFFF)
    moved = bits.view(torch.float32)
    return torch.maximum(moved, torch.minimum(moved, x)).to(torch.bfloat16)  # `moved`, and NaN where x is


def uniform(like: Tensor, step: int, place: int = 0) -> Tensor:
    """(...) float32 of [0, 1), evenly over places and steps, by which to round without a bias."""
    return _dither(like, 24, step, True, place).to(torch.float32).mul_(2.0**-24)


def _dither(like: Tensor, bits: int, step: int, signed: bool, place: int = 0) -> Tensor:
    """Whole numbers of so many bits, spread evenly over places and steps."""
    first, width = place * PLACE + step * STEP + signed * SIGNED, 256
    across = torch.arange(width, dtype=torch.int32, device=like.device).mul_(_int32(PLACE)).add_(_int32(first))
    down = torch.arange(-(-like.numel() // width), dtype=torch.int32, device=like.device).mul_(_int32(PLACE * width))
    mixed = (down.unsqueeze(1) + across).view(-1)[: like.numel()].view(like.shape)  # the place times PLACE, plus first
    return mixed.bitwise_right_shift_(32 - bits).bitwise_and_((1 << bits) - 1)


def _int32(number: int) -> int:
    """The number modulo 2^32 as a signed one."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def _packed(codes: Tensor, block: int) -> Tensor:
    """Two codes to a byte, the halves of a block together, so that blocks stay apart."""
    low, high = codes.view(-1, 2, block // 2).unbind(1)
    return (low | high << 4).view(-1)


def _unpacked(codes: Tensor, block: int) -> Tensor:
    halves = codes.view(-1, block // 2)
    return torch.stack([halves & 15, halves >> 4], 1).view(-1)
