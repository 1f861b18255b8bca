"""NOLA: an adapter of any size: coefficients of random bases of LoRA's two factors, and a seed.

Koohpayegani et al., "NOLA: Compressing LoRA using Linear Combination of Random Basis", arXiv 2310.02556.

    W' = W + (alpha / r) B A      A = A0 + sum_i a_i V_i (r, in)      B = sum_j b_j U_j (out, r)      i, j = 1 ... k
    target="full":  W' = W + (alpha / r) sum_i a_i W_i (out, in), the paper's predecessor, for small layers
    trained: a (k,), b (k,), from 0      frozen: V, U, uniform in ±1 / sqrt(k), and A0, uniform in ±1 / sqrt(in)

The paper's equation has no A0; with a = b = 0 no gradient would then be other than zero. `anchor=False` is that form,
repaired by a random start of a, of the scale that A0 has. The official merge leaves a and b out; here it is exact.

All layers slice the same bases, V_i and U_i the first numbers of their i-th rows, all drawn from the seed; a file holds
a and b. `stored=False` makes them again in each forward and backward, a few at a time; both are the same numbers.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fallow.core import noise
from fallow.core.delta import Delta, MethodOptions, Site, fits_rank, number, one_of, whole


class NOLA(Delta):
    name = "nola"

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`num_basis`: k, the trained numbers of one factor. `rank`: r; costs time, no trained numbers; with
        target="full" it only divides alpha. `alpha`: the scale is alpha / r. `dropout`: on the layer's input. `target`:
        what is combined, the two "factors" or the "full" matrix (out, in). `anchor`: start from A0, else from random a.
        `stored`: keep the bases, once for all layers, k r (max in + max out) numbers; if not, they are made in each
        pass.
        """

        num_basis: int = 128
        rank: int = 16
        alpha: float = 4.0
        dropout: float = 0.0
        target: Literal["factors", "full"] = "factors"
        anchor: bool = True
        stored: bool = True

        def check(self) -> None:
            whole("num_basis", self.num_basis)
            whole("rank", self.rank)
            number("alpha", self.alpha, open_below=True)
            number("dropout", self.dropout, 0.0, 0.99)
            one_of("target", self.target, ("factors", "full"))
            one_of("anchor", self.anchor, (True, False))
            one_of("stored", self.stored, (True, False))

    def setup(self, site: Site) -> None:
        k, r, (out, inner) = self.o.num_basis, self.o.rank, site.shape
        self.keys: dict[str, int] = {}
        self.exact = self.o.target == "factors"  # type: ignore[misc]
        if not self.exact:
            self._bases("bases_w", site, out * inner)
            self.a = nn.Parameter(torch.zeros(k))
            return
        fits_rank(site, r)
        self._bases("bases_a", site, r * inner)
        self._bases("bases_b", site, out * r)
        if self.o.anchor:
            self.share_matrix("anchor", site, (r, inner), partial(noise.matrix, site.key("anchor", shared=True)))
        self.a = nn.Parameter(torch.zeros(k) if self.o.anchor else torch.randn(k) / math.sqrt(inner))
        self.b = nn.Parameter(torch.zeros(k))

    def _bases(self, name: str, site: Site, size: int) -> None:
        self.keys[name] = site.key(name, shared=True)
        if self.o.stored:
            self.share_matrix(name, site, (self.o.num_basis, size), partial(noise.matrix, self.keys[name]))

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Options) -> int:
        return options.num_basis * (2 if options.target == "factors" else 1)

    def mixed(self, name: str, coefficients: Tensor, rows: int, columns: int) -> Tensor:
        """The sum of the bases (rows, columns), which have variance 1 / (3 k), times their coefficients."""
        coefficients, size = coefficients / math.sqrt(3 * self.o.num_basis), rows * columns
        with torch.autocast(coefficients.device.type, enabled=False):  # sums of so many terms lose digits in bf16
            if self.o.stored:
                return (coefficients @ self.shared(name)[: self.o.num_basis, :size]).view(rows, columns)
            return noise.combine(self.keys[name], coefficients, size).view(rows, columns)

    def factors(self) -> tuple[Tensor, Tensor]:
        r, (out, inner) = self.o.rank, self.view.shape
        if not self.exact:
            return super().factors()
        a = self.mixed("bases_a", self.a, r, inner)
        if self.o.anchor:
            a = torch.add(a, self.shared("anchor")[:r, :inner], alpha=1 / math.sqrt(3 * inner))
        return self.mixed("bases_b", self.b * (self.o.alpha / r), out, r), a

    def delta_weight(self) -> Tensor:
        if self.exact:
            return super().delta_weight()
        return self.mixed("bases_w", self.a * (self.o.alpha / self.o.rank), *self.view.shape)
