"""How much two adapters of one base get into each other's way: the diagnostics of SHiRA (arXiv 2406.13175, section 4).

For the changes A1, A2 of one layer, seen as (n, m) matrices:

    awom   ||A1ᵀ A2||_F                       magnitude of the interference
    awor   1 - ||A1ᵀ A2||_0 / m²              share of zeros in A1ᵀ A2: 1 is no interference, a LoRA has about 0

The paper's lemma: the share of non-zeros is at most the sum of the two densities for structured masks. A1ᵀ A2 is formed
from the rows that both change, so two adapters on disjoint rows cost nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fallow.core.errors import AdapterError
from fallow.core.sparse import Entry, SparseDelta


@dataclass(frozen=True)
class Interference:
    """Of one layer: `awom` >= 0, `awor` in [0, 1], and the shared entries of the two masks."""

    awom: float
    awor: float
    shared: int


def interference(one: SparseDelta, other: SparseDelta) -> dict[str, Interference]:
    """{weight name: figures} for every weight that both adapters change; needs changes, not values.

    Memory: (m, m) of one layer at a time. Raises AdapterError for adapters of different shapes or with store="value".
    """
    found = {}
    for name in one.entries.keys() & other.entries.keys():
        a, b = one.entries[name], other.entries[name]
        if a.shape != b.shape or "value" in (one.store, other.store):
            raise AdapterError(
                f"'{name}' is {a.shape} and {b.shape}, stored as {one.store} and {other.store}; "
                "give two adapters of one base, saved with store='delta'"
            )
        x, y = _rows_of_both(a, b)
        product = x.T @ y
        columns = product.shape[0]
        shared = int(torch.isin(a.index, b.index, assume_unique=True).sum())
        found[name] = Interference(
            awom=float(product.norm()), awor=1 - float(product.count_nonzero()) / columns**2, shared=shared
        )
    return dict(sorted(found.items()))


def _rows_of_both(a: Entry, b: Entry) -> tuple[Tensor, Tensor]:
    """The rows of the two changes that neither leaves untouched, dense float64 (rows, m)."""
    columns = math.prod(a.shape[1:]) if len(a.shape) > 1 else 1
    rows = [entry.index.long() // columns for entry in (a, b)]
    common = rows[0].unique()
    common = common[torch.isin(common, rows[1])]
    dense = []
    for entry, row in zip((a, b), rows, strict=True):
        keep = torch.isin(row, common)
        part = torch.zeros(len(common), columns, dtype=torch.float64)
        part[torch.searchsorted(common, row[keep]), entry.index.long()[keep] % columns] = entry.values[keep].double()
        dense.append(part)
    return dense[0], dense[1]
