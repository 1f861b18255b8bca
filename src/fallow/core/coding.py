"""Sorted flat indices in 1 to 2 bytes each: in files as gaps or a bitmap, in memory as low bits by block.

In files, by `encode` and `decode`: gaps between the indices, or a bitmap where they are dense.

gaps    g_0 = i_0,  g_j = i_j - i_{j-1} - 1; each gap is a number below the escape value E, after as many escapes
        (each worth E) as it needs. One byte each (E = 255) or two (E = 65535), whichever is smaller.
bits    one bit an entry, lowest bit first, where that is smaller still (more than about one entry in eight).

In memory, by `PackedIndex`: a code that any device decodes in three element-wise operations, without a host sync.

blocks  i = 2^b * block(i) + low(i): the low b bits of each index (b = 8 or 16), and how many indices each block of 2^b
        entries holds. k + 2 n / 256 bytes, or 2 k + 4 n / 65536, or 4 k (8 k) unpacked: whichever is smallest.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fallow.core.errors import AdapterError

NARROW = 1 << 31  # below this many entries an index fits int32
ESCAPES = {torch.uint8: 255, torch.uint16: 65535}
NUMPY = {torch.uint8: np.uint8, torch.uint16: np.uint16}


def encode(index: Tensor, numel: int) -> tuple[str, Tensor]:
    """("gaps" or "bits", code): the smallest coding of sorted distinct indices (k,) below `numel`."""
    flat = index.detach().cpu().numpy().astype(np.int64)
    gaps = np.diff(flat, prepend=-1) - 1
    sizes = {dtype: dtype.itemsize * int(len(gaps) + (gaps // e).sum()) for dtype, e in ESCAPES.items()}
    dtype = min(sizes, key=lambda kind: sizes[kind])
    if (numel + 7) // 8 < sizes[dtype]:
        bits = np.zeros(numel, dtype=bool)
        bits[flat] = True
        return "bits", torch.from_numpy(np.packbits(bits, bitorder="little"))
    escape = ESCAPES[dtype]
    escapes = gaps // escape
    code = np.full(len(gaps) + int(escapes.sum()), escape, dtype=NUMPY[dtype])
    code[np.cumsum(escapes + 1) - 1] = gaps % escape
    return "gaps", torch.from_numpy(code)


def decode(kind: str, code: Tensor, numel: int) -> Tensor:
    """Sorted indices (k,), int32 below 2^31 entries. AdapterError where the code is none of a tensor of this size."""
    if kind == "bits":
        if code.dtype != torch.uint8 or code.numel() != (numel + 7) // 8:
            raise AdapterError(f"a bitmap of {code.numel()} bytes ({code.dtype}) does not fit {numel} entries")
        flat = np.flatnonzero(np.unpackbits(code.numpy(), bitorder="little", count=numel))
    else:
        if code.dtype not in ESCAPES or code.ndim != 1:
            raise AdapterError(f"index gaps are one-dimensional uint8 or uint16, not {tuple(code.shape)} {code.dtype}")
        values = code.numpy()
        last = values != ESCAPES[code.dtype]
        if len(last) and not last[-1]:
            raise AdapterError("the index gaps end in the middle of a number")
        flat = np.cumsum(values, dtype=np.int64)[last] + np.arange(int(last.sum()))
    if len(flat) and flat[-1] >= numel:
        raise AdapterError(f"an index of {int(flat[-1])} does not fit {numel} entries")
    return torch.from_numpy(flat.astype(np.int32 if numel < 2**31 else np.int64))


class PackedIndex:
    """Sorted distinct flat indices (k,) of a tensor of `numel` entries, kept on their device in about 1 byte each.

    `decode()` gives them as int32 (int64 from 2^31 entries), anew each time, at 0.4 ns an index on one core: about what
    reading the decoded form from memory takes.
    """

    def __init__(self, index: Tensor, numel: int) -> None:
        self.size, self.numel = index.numel(), numel
        self.dtype = torch.int32 if numel < NARROW else torch.int64
        self.bits, self.nbytes = packed(self.size, numel)
        if not self.bits:
            self.low, self.counts = index.to(self.dtype, copy=True), None
            return
        block = 1 << self.bits
        edges = torch.arange(1, -(-numel // block), dtype=index.dtype, device=index.device) * block
        ends = torch.searchsorted(index.contiguous(), edges)
        first, last = ends.new_zeros(1), ends.new_full((1,), self.size)
        counts = torch.cat([first, ends, last]).diff()
        self.counts = counts.to(torch.int16 if self.bits == 8 else torch.int32)
        low = index & (block - 1)
        # int16 holds 0 .. 65535 shifted down, since torch does arithmetic in uint16 on no device
        self.low = low.to(torch.uint8) if self.bits == 8 else (low - (block >> 1)).to(torch.int16)

    def decode(self) -> Tensor:
        """(k,) the indices; where they are kept unpacked the very tensor, so change nothing in it."""
        return unpack(self.low, self.counts, self.numel)


def unpack(low: Tensor, counts: Tensor | None, numel: int) -> Tensor:
    """(k,) the indices of a PackedIndex, from what it keeps; for those who keep it as buffers of a module."""
    if counts is None:
        return low
    index = torch.repeat_interleave(counts.to(torch.int32 if numel < NARROW else torch.int64), output_size=len(low))
    if low.dtype == torch.uint8:
        return index.mul_(1 << 8).add_(low)
    return index.mul_(1 << 16).add_(low).add_(1 << 15)


def packed(size: int, numel: int) -> tuple[int, int]:
    """(low bits kept of each index, 0 for all; bytes) of `size` packed indices into `numel` entries."""
    plain = (4 if numel < NARROW else 8) * size
    return min(
        ((0, plain), (8, size + 2 * -(-numel // 256)), (16, 2 * size + 4 * -(-numel // 65536))),
        key=lambda kind: kind[1],
    )
