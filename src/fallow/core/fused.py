"""Several projections in one weight: a Delta of its own for each block of rows.

Fused query, key and value are n blocks of one (out, in) matrix, a stack of experts (E, out, in) is E of them. Each
block is a layer of fewer outputs to the method that is used; what it gives is put together again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from fallow.core.delta import Delta, MethodOptions, Site
from fallow.core.errors import ConfigError
from fallow.core.views import View


class _Rows(View):
    """Rows of the matrix of another view."""

    def __init__(self, whole: View, rows: int) -> None:
        super().__init__(rows, whole.shape[1])
        self.whole = whole
        self.kind = whole.kind  # type: ignore[misc]
        self.channels = whole.channels  # type: ignore[misc]
        self.op, self.down, self.up, self.mix, self.scale = (  # type: ignore[method-assign]
            whole.op, whole.down, whole.up, whole.mix, whole.scale,
        )  # fmt: skip


def _part(site: Site, rows: slice) -> Tensor:
    return site.stored()[rows]


class Fused(Delta):
    """`method` on each of the row blocks: `rows` of them of one size, or these sizes. `apart`: the options of single
    blocks that have others.

    ConfigError where they do not add up to the layer's outputs, or the layer is a grouped convolution.
    """

    supports = ("linear", "conv", "parameter")

    def __init__(
        self,
        site: Site,
        method: type[Delta],
        options: MethodOptions,
        rows: int | Sequence[int],
        apart: Mapping[int, MethodOptions] | None = None,
    ) -> None:
        out = site.shape[0]
        sizes = [out // rows] * rows if isinstance(rows, int) and rows > 0 else rows
        if isinstance(sizes, int) or sum(sizes) != out or min(sizes) < 1:
            raise ConfigError(f"fused={rows!r} does not divide the {out} rows of '{site.name}'; give sizes that add up")
        if getattr(site.view, "groups", 1) > 1:
            raise ConfigError(f"fused={rows!r}: '{site.name}' is a grouped convolution, which has blocks already")
        self.sizes, self.method, self.options, self.apart = list(sizes), method, options, dict(apart or {})
        self.name = method.name  # type: ignore[misc]
        super().__init__(site, options)

    def setup(self, site: Site) -> None:
        self.parts = nn.ModuleList(
            self.method(block, self.apart.get(number, self.options))
            for number, block in enumerate(self.block_sites(site))
        )
        self.mode, self.exact = self.deltas[0].mode, self.deltas[0].exact  # type: ignore[misc]  # options may choose them

    def block_sites(self, site: Site) -> list[Site]:
        """The sites of the blocks of this one."""
        ends = list(accumulate(self.sizes))
        blocks = [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        return [
            Site(
                f"{site.name}.{number}",
                _Rows(site.view, rows.stop - rows.start),
                partial(_part, site, rows),
                site.common,
                site.context,
                site.seed,
                site.fresh,
                (site.name, rows),
            )
            for number, rows in enumerate(blocks)
        ]

    @property
    def deltas(self) -> list[Delta]:
        return cast("list[Delta]", list(self.parts))

    @property
    def dtype(self) -> torch.dtype:
        return self.deltas[0].dtype

    def delta_weight(self) -> Tensor:
        return torch.cat([delta.delta_weight() for delta in self.deltas])

    def factors(self) -> tuple[Tensor, Tensor]:
        pairs = [delta.factors() for delta in self.deltas]
        return torch.block_diag(*[b for b, _ in pairs]), torch.cat([a for _, a in pairs])

    def delta_forward(self, x: Tensor) -> Tensor:
        return torch.cat([delta.delta_forward(x) for delta in self.deltas], self.view.channels)

    def transform(self, w: Tensor) -> Tensor:
        if self.mode == "add":
            return super().transform(w)
        pairs = zip(self.deltas, w.split(self.sizes), strict=True)
        return torch.cat([delta.transform(rows) for delta, rows in pairs])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.deltas, y.split(self.sizes, self.view.channels), strict=True)
        return torch.cat([delta(x, rows) for delta, rows in pairs], self.view.channels)

    def loss(self) -> Tensor | None:
        terms = [term for delta in self.deltas if (term := delta.loss()) is not None]
        return torch.stack(terms).sum() if terms else None

    def on_step(self, step: int, total: int | None) -> None:
        for delta in self.deltas:
            delta.on_step(step, total)

    def importance(self) -> Tensor:
        """(r,): over all blocks, the norm of what their first, second ... rank is worth, the largest first."""
        each = [delta.importance().sort(descending=True).values for delta in self.deltas]
        most = max(len(worth) for worth in each)
        return torch.stack([nn.functional.pad(worth, (0, most - len(worth))) for worth in each]).norm(dim=0)

    def resize(self, rank: int) -> None:
        """Of each block."""
        for delta in self.deltas:
            delta.resize(rank)

    @torch.no_grad()
    def randomize(self) -> None:
        for delta in self.deltas:
            delta.randomize()

    def all_parameters(self) -> list[Any]:
        return list(dict.fromkeys(param for delta in self.deltas for param in delta.all_parameters()))


def delta_at(
    site: Site,
    method: type[Delta],
    options: MethodOptions,
    rows: int | Sequence[int] | None = None,
    apart: Mapping[int, MethodOptions] | None = None,
) -> Delta:
    """A Delta of this method, or where the weight is a stack of matrices, or of `rows` blocks, one for each of them."""
    rows = site.view.blocks if rows is None else rows
    return method(site, options) if rows is None else Fused(site, method, options, rows, apart)


def single(key: str, delta: Delta) -> Iterator[tuple[str, Delta]]:
    """A Delta by its key, or those of its blocks, by key and number."""
    if isinstance(delta, Fused):
        yield from ((f"{key}.{number}", part) for number, part in enumerate(delta.deltas))
    else:
        yield key, delta
