"""Sorted flat indices in 1 to 2 bytes each: gaps between them, or a bitmap where they are dense.

gaps    g_0 = i_0,  g_j = i_j - i_{j-1} - 1; each gap is a number below the escape value E, after as many escapes
        (each worth E) as it needs. One byte each (E = 255) or two (E = 65535), whichever is smaller.
bits    one bit an entry, lowest bit first, where that is smaller still (more than about one entry in eight).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fallow.core.errors import AdapterError

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
