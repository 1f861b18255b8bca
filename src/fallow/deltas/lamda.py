"""LaMDA: a small trained core between two spectral projections, of which the second one is frozen column by column.

"LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation" (arXiv 2406.12832). With the r
leading singular triples U, s, V of W (out, in):

    W' = W + eta (B S - B0 S0) A     A (r, in) = Vᵀ, never trained;  B (out, r), S (r, r)
    core="sigma"     B0 = U            S0 = diag(s)
    core="identity"  B0 = U diag(s)    S0 = I
    core="sqrt"      B0 = U diag(s)^½  S0 = I, A = diag(s)^½ Vᵀ

`core`, `shift` are trained: S - S0 and B - B0, which start at zero. Thus the start is W bit for bit in any precision (a
residual W - B0 S0 A would not be, in bf16) and weight decay draws to W, not to a W without its leading subspace. S is
trained throughout; of B, floor(r t / T_i) columns are frozen at step t (from 0), T_i = freeze * total, from the
largest singular value on. The paper's text could not be read in full: the split of s and this order are options.

LaMDA++, a rank for each layer from the spectra alone, is the budget `fallow.LaMDARanks`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fallow.core.delta import Delta, MethodOptions, Site, fits_rank, number, one_of, whole
from fallow.core.errors import ConfigError
from fallow.core.freezing import keep_frozen
from fallow.core.linalg import low_rank


class LaMDA(Delta):
    """Needs `fallow.step` (or the callback) after optimizer steps, unless `freeze` is 0."""

    name = "lamda"
    A: Tensor
    B0: Tensor
    S0: Tensor
    frozen: Tensor  # how many columns
    core: nn.Parameter
    shift: nn.Parameter

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`rank`: r. `freeze`: the part of the run (a float) or the step (a whole number) at which all of B is frozen;
        0 trains the core alone. `core`: how B0 and S0 share the singular values, "sigma", "identity" or "sqrt", see
        above. `order`: of the singular values, as columns are frozen, "descending" or "ascending". `basis`: "spectral",
        or "random", what the released code does. `alpha`: of basis="random", whose scale is alpha / r; else it is 1.
        `dropout`: on the layer's input.
        """

        rank: int = 64
        freeze: float = 0.3
        core: Literal["sigma", "identity", "sqrt"] = "sigma"
        order: Literal["descending", "ascending"] = "descending"
        basis: Literal["spectral", "random"] = "spectral"
        alpha: float = 16.0
        dropout: float = 0.1

        def check(self) -> None:
            whole("rank", self.rank)
            if isinstance(self.freeze, int):
                whole("freeze", self.freeze, 0)
            else:
                number("freeze", self.freeze, 0.0, 1.0)
            one_of("core", self.core, ("sigma", "identity", "sqrt"))
            one_of("order", self.order, ("descending", "ascending"))
            one_of("basis", self.basis, ("spectral", "random"))
            number("alpha", self.alpha, open_below=True)
            number("dropout", self.dropout, 0.0, 0.999)
            if self.basis == "random" and not self.freeze:
                raise ConfigError("freeze=0 with basis='random' trains nothing: B would stay zero; freeze later")

    def setup(self, site: Site) -> None:
        (out, width), r = site.shape, self.o.rank
        fits_rank(site, r)
        a, b, s = self._start(site) if site.fresh else (torch.empty(r, width), torch.empty(out, r), torch.empty(r, r))
        # saved: of singular vectors that lie close, other machines find others
        for name, tensor in (("A", a), ("B0", b), ("S0", s)):
            self.register_buffer(name, tensor)
        self.core = nn.Parameter(torch.zeros(r, r))
        if self.o.freeze:
            self.shift = nn.Parameter(torch.zeros(out, r))
            self.register_buffer("frozen", torch.zeros((), dtype=torch.long))
            keep_frozen(self)

    def _start(self, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        """A, B0, S0"""
        (out, width), r = site.shape, self.o.rank
        if self.o.basis == "random":
            a, s = torch.empty(r, width), torch.empty(r, r)
            for tensor in (a, s):
                nn.init.kaiming_uniform_(tensor, math.sqrt(5), generator=site.generator("S" if tensor is s else "A"))
            return a, torch.zeros(out, r), s
        u, s, v = (t.cpu() for t in low_rank(site.weight(), r, generator=site.generator()))
        if self.o.core == "sigma":
            return v.contiguous(), u.contiguous(), torch.diag(s)
        root = s if self.o.core == "identity" else s.sqrt()
        return (v if self.o.core == "identity" else root[:, None] * v).contiguous(), u * root, torch.eye(r)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B S - B0 S0 (out, r), as B0 (S - S0) + (B - B0) S, and A; only the r-wide A x is kept for the backward."""
        b = self.B0 @ self.core
        if self.o.freeze:
            # a frozen column has no gradient, which would count where gradients are clipped
            shift = torch.where(self.frozen_columns()[1], self.shift.detach(), self.shift)
            b = b + shift @ (self.S0 + self.core)
        return (b * (self.o.alpha / self.o.rank) if self.o.basis == "random" else b), self.A

    def frozen_columns(self) -> tuple[nn.Parameter, Tensor]:
        columns = torch.arange(self.o.rank, device=self.shift.device)
        places = columns if self.o.order == "descending" else columns.flip(0)
        return self.shift, places < self.frozen

    @torch.no_grad()
    def on_step(self, step: int, total: int | None) -> None:
        """Freeze what step number `step` + 1 must not move. ConfigError for a share of a run of unknown length."""
        if not self.o.freeze:
            return
        if isinstance(self.o.freeze, int):
            last = self.o.freeze
        elif total is None:
            raise ConfigError(f"freeze={self.o.freeze} is a share of the run; give its length, or a whole step instead")
        else:
            last = round(self.o.freeze * total)
        count = self.o.rank if step >= last else self.o.rank * step // last
        self.frozen.fill_(count)
        keep_frozen(self)  # copies of a model are told here
        # DDP waits for a gradient of all that was trained at its start: there, B stays and is put back in each step
        if count == self.o.rank and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            self.shift.requires_grad_(False)
            self.shift.grad = None

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        """r² + r out at the start, r² from the freezing of the last column on (and where freeze is 0)."""
        r = options.rank
        return int(r * r + (r * shape[0] if options.freeze else 0))
