"""WaRA: half-size factors act on wavelet coefficients, and the inverse transform makes the update of them.

"WaRA: Wavelet Low Rank Adaptation", arXiv 2506.24092. H (n, n): an orthonormal transform whose first half of rows is
low-pass, the last half high-pass. M = B A with A (r, in / 2) and B (out / 2, r):

    feature   D = s H_outᵀ diag(M, M) H_in                rank 2 r; what the paper does to an input's four bands
    weight    D = s H_outᵀ [LL LH; HL HH] H_in            each band a product of its own, of rank r
    tiny      feature with M = U R Vᵀ, U and V the leading singular vectors of the LL band of H_out W H_inᵀ, frozen

The paper's layer transforms an input over (features, tokens) and maps all four bands by M; the token transform cancels,
so that `feature` needs no even number of tokens and cannot leak between samples. D is kept in factors, (out, k) and
(k, in), of which only the rows go through the transform. Levels: the low band is transformed again; feature has a pair
for each level (the coarsest low band takes that of its high one), weight three bands for each and the coarsest LL.

Repaired: with Haar, `feature` is M times the identity of two neighbours, without any wavelet in it (`haar` warns); a
longer filter is the default. `wavelet="random_orthogonal"` is the control: no notion of neighbours.

Odd sides are padded with a zero. Convolutions: over channels, and over the flattened patch where their number is no
multiple of 2^levels. Not for embeddings: the rows of a table have no neighbours.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fallow.core.delta import Delta, MethodOptions, Site, number, one_of, whole
from fallow.core.errors import ConfigError
from fallow.core.linalg import low_rank
from fallow.core.views import ConvView
from fallow.core.wavelets import TAPS, dwt, idwt, padded

RANDOM = "random_orthogonal"
HIGH_OUT, HIGH_IN = (False, False, True, True), (False, True, False, True)  # of LL, LH, HL, HH


class WaRA(Delta):
    name = "wara"
    supports = ("linear", "conv", "parameter")

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`variant`: "feature", one pair for both bands, or "weight", a pair for each of four. `wavelet`: a filter's
        name such as "haar", "db2", or the control, "random_orthogonal". `levels`: how often the low band is
        transformed. `rank`: of a pair; None for 8, or for 4 for each band of "weight". `alpha`: None for rank, so that
        s = alpha / rank = 1. `dropout`: on the layer's input. `bands`: of "weight", the ranks of LL, LH, HL, HH apart;
        0 for none. `tiny`: None, or R alone is trained: "full" (r, r) or "diag" (r,).
        """

        variant: Literal["feature", "weight"] = "feature"
        wavelet: str = "db2"
        levels: int = 1
        rank: int | None = None
        alpha: float | None = None
        dropout: float = 0.0
        bands: tuple[int, ...] | None = None
        tiny: Literal["full", "diag"] | None = None

        def check(self) -> None:
            one_of("variant", self.variant, ("feature", "weight"))
            one_of("wavelet", self.wavelet, (*TAPS, RANDOM))
            whole("levels", self.levels, most=3)
            if self.rank is not None:
                whole("rank", self.rank)
            if self.alpha is not None:
                number("alpha", self.alpha, open_below=True)
            number("dropout", self.dropout, 0.0, 0.99)
            one_of("tiny", self.tiny, (None, "full", "diag"))
            if self.bands is not None:
                known = isinstance(self.bands, list | tuple) and len(self.bands) == 4
                if self.variant != "weight" or not known:
                    raise ConfigError(f"bands={self.bands!r} needs variant='weight' and the ranks of LL, LH, HL, HH")
                self.bands = tuple(self.bands)
                for band in self.bands:
                    whole("bands", band, 0)
                if not any(self.bands if self.levels == 1 else self.bands[1:]):
                    raise ConfigError(f"bands={self.bands!r} leave a level without any rank; give one above 0")
            if self.tiny and (self.variant != "feature" or self.levels > 1):
                raise ConfigError(f"tiny={self.tiny!r} is one level of variant='feature'; leave variant and levels out")
            if self.levels > 1 and self.wavelet == RANDOM:
                raise ConfigError(f"levels={self.levels} has no meaning for wavelet={RANDOM!r}; give 1")

        @property
        def ranks(self) -> tuple[int, ...]:
            """Of the four bands; of one pair for the others."""
            if self.variant == "weight":
                return self.bands or (self.rank or 4,) * 4
            return (self.rank or 8,)

    def setup(self, site: Site) -> None:
        o, rank = self.o, self.o.ranks[0]
        self.scaling = 1.0 if o.alpha is None else o.alpha / (o.rank or max(o.ranks))
        if o.variant == "feature" and o.wavelet == "haar":
            warnings.warn("wavelet='haar' leaves no wavelet in variant='feature'; take a longer filter", stacklevel=2)
        self.taps = 1
        if isinstance(site.view, ConvView) and len(site.view.kernel) > 1:
            channels = site.view.kernel[0]
            self.taps = site.shape[1] // channels if channels % 2**o.levels == 0 else 1
        if o.wavelet == RANDOM:
            for n in self._widths(0):
                generator = site.generator(f"wavelet{n}", shared=True)
                self.share(f"orthogonal_{n}", site, lambda n=n, g=generator: _orthogonal(n, g))  # type: ignore[misc]
        half_out, half_in = self._widths(1)[0], self._widths(1)[1] * self.taps
        if max(o.ranks) > min(half_out, half_in):
            raise ConfigError(
                f"rank={max(o.ranks)} is above what half of '{site.name}' {site.shape} can have; give less"
            )
        if o.tiny:
            u, v = torch.empty(half_out, rank), torch.empty(rank, half_in)
            if site.fresh:
                w = self._forth(self._forth(site.weight(), 0), 1).cpu()
                left, _, v = low_rank(w[:half_out, :half_in].contiguous(), rank, generator=site.generator())
                u, v = left.contiguous(), v.contiguous()
            self.register_buffer("U", u)  # saved: an ordering or a sign may differ elsewhere
            self.register_buffer("V", v)
            self.R = nn.Parameter(torch.zeros(rank, rank) if o.tiny == "full" else torch.zeros(rank))
            return
        for level in range(1, o.levels + 1):
            a, b = fresh_pair(_total(o, level), self._widths(level)[1] * self.taps, self._widths(level)[0])
            self.register_parameter(f"A{level}", a)
            self.register_parameter(f"B{level}", b)

    def _widths(self, level: int) -> tuple[int, int]:
        """Coefficients of the outputs and of the input channels in a band of this level; 0: of all."""
        out, width = self.view.shape
        levels = self.o.levels
        return padded(out, levels) >> level, padded(width // self.taps, levels) >> level

    def factors(self) -> tuple[Tensor, Tensor]:
        """Of all bands together."""
        o = self.o
        rows, columns = (t[:0] for t in self._pair(o.levels))  # what deeper levels add to the low band, as rows
        for level in range(o.levels, 0, -1):
            a, b = self._pair(level)
            if o.variant == "feature":
                twice = level == o.levels
                parts_in = [(a, False), (a, True)] if twice else [(a, True)]
                parts_out = [(b, False), (b, True)] if twice else [(b, True)]
            else:
                ranks = o.ranks if level == o.levels else (0, *o.ranks[1:])
                parts_in = list(zip(a.split(ranks), HIGH_IN, strict=True))
                parts_out = list(zip(b.split(ranks), HIGH_OUT, strict=True))
            rows, columns = self._back(rows, parts_in, self.taps), self._back(columns, parts_out, 1)
        out, width = self.view.shape
        return columns[:, :out].T * self.scaling, rows[:, :width]

    def _pair(self, level: int) -> tuple[Tensor, Tensor]:
        """A (k, in) and Bᵀ (k, out) of a level."""
        if not self.o.tiny:
            return getattr(self, f"A{level}"), getattr(self, f"B{level}").T
        u, v = cast(Tensor, self.U), cast(Tensor, self.V)
        return (self.R @ v if self.o.tiny == "full" else self.R.unsqueeze(1) * v), u.T

    def _back(self, deep: Tensor, parts: list[tuple[Tensor, bool]], taps: int) -> Tensor:
        """Hᵀ of one level: rows of a low or a high band (k, n taps) become rows (k, 2 n taps)."""
        stacked = torch.cat(
            [F.pad(t, (t.shape[1], 0) if high else (0, t.shape[1])) for t, high in [(deep, False), *parts]]
        )
        rows = stacked.unflatten(1, (-1, taps))
        if self.o.wavelet == RANDOM:
            return (rows.mT @ self.shared(f"orthogonal_{rows.shape[1]}")).mT.flatten(1)
        return idwt(rows, self.o.wavelet, dim=1).flatten(1)

    def _forth(self, w: Tensor, side: int) -> Tensor:
        """H along one side of W (out, in)."""
        taps = self.taps if side == 1 else 1
        rows = (w if side == 1 else w.T).unflatten(1, (-1, taps))
        if self.o.wavelet == RANDOM:
            h = self.shared(f"orthogonal_{padded(rows.shape[1])}").to(w)
            moved = (F.pad(rows.mT, (0, h.shape[0] - rows.shape[1])) @ h.T).mT.flatten(1)
        else:
            moved = dwt(rows, self.o.wavelet, dim=1).flatten(1)
        return moved if side == 1 else moved.T

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        rank = options.ranks[0]
        if options.tiny:
            return int(rank**2 if options.tiny == "full" else rank)
        sides = sum(padded(n, options.levels) for n in shape)
        return sum(_total(options, level) * (sides >> level) for level in range(1, options.levels + 1))


def _total(options: Any, level: int) -> int:
    """The ranks of a level's pairs together."""
    if options.variant == "weight":
        return sum(options.ranks if level == options.levels else options.ranks[1:])
    return int(options.ranks[0])


def fresh_pair(rank: int, width: int, out: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, width) as LoRA's and a zero B (out, rank)."""
    a = torch.empty(rank, width).uniform_(-1, 1) / math.sqrt(width)
    return nn.Parameter(a), nn.Parameter(torch.zeros(out, rank))


def _orthogonal(n: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0].to(torch.get_default_dtype())
