"""WaRA over a grid of tokens: a low-rank update whose wavelet bands have gains of their own.

"WaRA: Wavelet Low Rank Adaptation", arXiv 2506.24092, second version: adapters on a 2-D transform of the patch tokens.

    y' = y + s B idwt2(g_b * phi(dwt2(A x)))      A (r, in), B (out, r), gains g (4, r) of LL, LH, HL, HH; s = alpha / r

The transform is over rows and columns of the tokens, for each channel. It commutes with maps of channels, so it runs on
the r channels of A x; and an adapter that all bands share would be LoRA exactly, with the transform for nothing. What
the paper does about it could not be seen; here each band has a trained gain for each of the r channels, one at the
start, and `phi` may be a non-linearity. Tokens are mixed, so there is no weight to merge.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fallow.core.delta import Delta, MethodOptions, Site, fits_rank, number, one_of, whole
from fallow.core.errors import ConfigError
from fallow.core.wavelets import TAPS, dwt, idwt
from fallow.deltas.wara import fresh_pair


class WaRASpatial(Delta):
    name = "wara-spatial"
    supports = ("linear",)

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`wavelet`: the filter, such as "haar" or "db2". `rank`: r. `alpha`: None for rank, so that s = 1. `dropout`:
        on the layer's input. `grid`: rows and columns of tokens, None for a square. `prefix`: tokens before them
        (class, registers), which pass unchanged. `adapt_prefix`: those get B phi(A x) instead. `phi`: on the
        coefficients, "identity" or "gelu".
        """

        wavelet: str = "db2"
        rank: int = 8
        alpha: float | None = None
        dropout: float = 0.0
        grid: tuple[int, ...] | None = None
        prefix: int = 1
        adapt_prefix: bool = False
        phi: Literal["identity", "gelu"] = "identity"

        def check(self) -> None:
            one_of("wavelet", self.wavelet, tuple(TAPS))
            whole("rank", self.rank)
            if self.alpha is not None:
                number("alpha", self.alpha, open_below=True)
            number("dropout", self.dropout, 0.0, 0.99)
            if self.grid is not None:
                if not isinstance(self.grid, list | tuple) or len(self.grid) != 2:
                    raise ConfigError(f"grid={self.grid!r} must be the rows and the columns of the tokens")
                self.grid = tuple(self.grid)
                for side in self.grid:
                    whole("grid", side)
            whole("prefix", self.prefix, 0)
            one_of("adapt_prefix", self.adapt_prefix, (True, False))
            one_of("phi", self.phi, ("identity", "gelu"))

    def setup(self, site: Site) -> None:
        fits_rank(site, self.o.rank)
        out, width = site.shape
        self.A, self.B = fresh_pair(self.o.rank, width, out)
        self.gains = nn.Parameter(torch.ones(4, self.o.rank))
        self.scaling = 1.0 if self.o.alpha is None else self.o.alpha / self.o.rank

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """ConfigError where the tokens of x (..., tokens, in) are no such grid."""
        rows, columns = self._grid(x)
        if self.training and self.o.dropout:
            x = F.dropout(x, self.o.dropout)
        h = F.linear(x, self.A)
        prefix, tokens = h.split((self.o.prefix, rows * columns), -2)
        tokens = self._filtered(tokens.unflatten(-2, (rows, columns))).flatten(-3, -2)
        prefix = self._phi(prefix) if self.o.adapt_prefix else torch.zeros_like(prefix)
        return y + F.linear(torch.cat([prefix, tokens], -2), self.B) * self.scaling

    def _grid(self, x: Tensor) -> tuple[int, int]:
        tokens = x.shape[-2] - self.o.prefix if x.dim() > 2 else 0
        rows, columns = self.o.grid or (math.isqrt(max(tokens, 0)),) * 2
        if tokens < 1 or rows * columns != tokens:
            raise ConfigError(
                f"the input of '{self.site_name}' {tuple(x.shape)} is no grid of {rows} x {columns} tokens after "
                f"prefix={self.o.prefix}; give grid=(rows, columns) and prefix=, or exclude that layer"
            )
        return rows, columns

    def _filtered(self, grid: Tensor) -> Tensor:
        """(..., rows, columns, r), its bands weighed."""
        rows, columns, r = grid.shape[-3:]
        c = self._phi(dwt(dwt(grid, self.o.wavelet, dim=-2), self.o.wavelet, dim=-3))
        bands = c.unflatten(-2, (2, -1)).unflatten(-4, (2, -1))  # (..., 2, rows / 2, 2, columns / 2, r)
        c = (bands * self.gains.view(2, 1, 2, 1, r)).flatten(-5, -4).flatten(-3, -2)
        return idwt(idwt(c, self.o.wavelet, dim=-2, size=columns), self.o.wavelet, dim=-3, size=rows)

    def _phi(self, h: Tensor) -> Tensor:
        return F.gelu(h) if self.o.phi == "gelu" else h

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        return int(options.rank * (sum(shape) + 4))
