"""TLoRA: the weight is aligned by a cheap full-rank transform of its inputs, then a tiny residual is added.

"Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image Models",
arXiv 2501.08727. ("T-LoRA", which depends on the timestep, is another method.)

    W' = W T + s Delta      s = alpha / sqrt(r), or alpha / r       out = prod O_d, in = prod I_d

    T       tensor ring of cores A_d (I_d, I_d, R_T, R_T): T[i, j] = trace(A_1[i_1, j_1] .. A_D[i_D, j_D]), identity
            at the start; R_T = 1: a Kronecker product; R_T = 0: none
    Delta   "lora"   B A, B (out, r) zero, A (r, in)                    (the paper's TLoRA*)
            "tr"     trace(B_1[o_1] .. B_D[o_D] C_1[i_1] .. C_D[i_D]), cores (n_d, r, r), B_1 zero; of rank r^2
            "ttm"    a ring of cores (O_d, I_d, r, r), the first zero
            "none"

Repaired: with the published start, A_d[:, :, r, s] = I / R_T for all r, s, the R_T^2 slices of a core get the same
gradient and stay equal for ever: a Kronecker product with R_T^2 times the numbers. rings="bonds", the default above
R_T = 1, breaks that and is the identity too: A_d[i, j, r, s] = delta_ij u_d[r] v_d[s] with random unit u_d and
v_d = u_{d+1} + w, w a unit vector orthogonal to u_{d+1}, so that every v_d . u_{d+1} is 1.

Departures. What is trained is each core's difference from its start, so that weight decay pulls T to the identity and
not to zero. A Linear takes T on its input, W (T x), core by core, where that is cheaper than making W', which in other
layers is made in both passes; T is formed only where it is cheaper than its cores. Neither T nor W' is kept, as both
are in the official code. The "tr" cores start as in the official code: with
the paper's standard deviations, 1 / (I_d sqrt(r)), the gradient of B_1 is 5,000 times smaller (1280 x 1280, r = 6), too
near Adam's epsilon. Convolutions: T acts on the flattened patch. Not for embeddings, whose T would be one of the
table's rows.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fallow.core.delta import Delta, MethodOptions, Site, fits_rank, number, one_of, whole
from fallow.core.errors import ConfigError
from fallow.core.factored import down
from fallow.core.low_rank_linear import low_rank_linear
from fallow.core.tensor_ring import balanced, ring_apply, ring_cost, ring_matrix, ring_rows, taken_apart


class TLoRA(Delta):
    name = "tlora"
    supports = ("linear", "conv", "parameter")

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`transform_rank`: R_T of the transform; 1 for a Kronecker product, 0 for none. `rank`: r of the residual.
        `residual`: "lora", "tr", "ttm" or "none", see above. `alpha`: of the residual's scale. `scaling`: "rslora"
        alpha / sqrt(r), or "standard" alpha / r. `order`: D, factors of a width. `rings`: None for "paper" up to R_T =
        1, "bonds" above; "noise" adds N(0, 0.01^2) to the paper's, which is the identity to 4e-2 only. `penalty`: mu of
        the regulariser, which adds the norms of all slices' distances from the start.
        """

        transform_rank: int = 2
        rank: int = 4
        residual: Literal["lora", "tr", "ttm", "none"] = "lora"
        alpha: float = 1.0
        scaling: Literal["rslora", "standard"] = "rslora"
        order: int = 3
        rings: Literal["paper", "bonds", "noise"] | None = None
        penalty: float = 0.0

        def check(self) -> None:
            whole("transform_rank", self.transform_rank, 0, 8)
            whole("rank", self.rank)
            one_of("residual", self.residual, ("lora", "tr", "ttm", "none"))
            number("alpha", self.alpha, open_below=True)
            one_of("scaling", self.scaling, ("rslora", "standard"))
            whole("order", self.order, most=16)
            one_of("rings", self.rings, (None, "paper", "bonds", "noise"))
            number("penalty", self.penalty)
            if not self.transform_rank and self.residual == "none":
                raise ConfigError("transform_rank=0 with residual='none' changes nothing; give one of them")
            if self.rings == "bonds" and self.transform_rank < 2:
                raise ConfigError(f"rings='bonds' needs transform_rank of 2 or more, not {self.transform_rank}")

    def setup(self, site: Site) -> None:
        o, (out, width) = self.o, site.shape
        self.outs, self.ins = balanced(out, o.order), balanced(width, o.order)
        self.scaling = o.alpha / (math.sqrt(o.rank) if o.scaling == "rslora" else o.rank)
        if o.transform_rank:
            self._setup_transform(site)
        rings = [([(n, n) for n in self.ins], o.transform_rank)] if o.transform_rank else []
        if o.residual == "ttm":
            rings.append(([(n, m) for m, n in _paired(self.outs, self.ins)], o.rank))
        apart = all(taken_apart(*ring) for ring in rings)
        # four times in a step, twice of them for the backward, at half the speed of large products
        self.both = 8 * sum(ring_cost(*ring) for ring in rings) if apart else None
        r = o.rank
        if o.residual == "lora":
            fits_rank(site, r)
            self.B = nn.Parameter(torch.zeros(out, r))
            self.A = nn.Parameter(torch.empty(r, width).uniform_(-1, 1) / math.sqrt(width))
        elif o.residual == "tr":
            for d, n in enumerate(self.outs):
                core = torch.randn(n, r, r) * (math.sqrt(n) / r**2) if d else torch.zeros(n, r, r)
                self.register_parameter(f"B{d}", nn.Parameter(core))
            for d, n in enumerate(self.ins):
                self.register_parameter(f"C{d}", nn.Parameter(torch.randn(n, r, r) / math.sqrt(n)))
        elif o.residual == "ttm":
            for d, (m, n) in enumerate(_paired(self.outs, self.ins)):
                core = torch.randn(m, n, r, r) / math.sqrt(n * r) if d else torch.zeros(m, n, r, r)
                self.register_parameter(f"B{d}", nn.Parameter(core))

    def _setup_transform(self, site: Site) -> None:
        o, r = self.o, self.o.transform_rank
        if len(self.ins) == 1 and site.shape[1] > 16:
            warnings.warn(f"'{site.name}' has {site.shape[1]} inputs, a prime: its transform is dense", stacklevel=3)
        left = right = torch.full((len(self.ins), r), 1 / math.sqrt(r))  # the paper's: I / R_T
        if o.rings == "bonds" or (o.rings is None and r > 1):
            generator = site.generator()
            left = nn.functional.normalize(torch.randn(len(self.ins), r, generator=generator), dim=1)
            other = torch.randn(len(self.ins), r, generator=generator)
            ahead = left.roll(-1, 0)
            other = other - (other * ahead).sum(1, keepdim=True) * ahead
            right = ahead + nn.functional.normalize(other, dim=1)
        self.register_buffer("left", left)  # saved: random, and a few numbers only
        self.register_buffer("right", right.clone())
        for d, n in enumerate(self.ins):
            core = torch.randn(n, n, r, r) * 1e-2 if o.rings == "noise" else torch.zeros(n, n, r, r)
            self.register_parameter(f"T{d}", nn.Parameter(core))
        if o.rings == "noise":
            self.starts = "noise breaks the symmetry of its bonds"  # type: ignore[misc]

    def _named(self, letter: str, count: int) -> list[Tensor]:
        return [getattr(self, f"{letter}{d}") for d in range(count)]

    def cores(self) -> list[Tensor]:
        """A_d (I_d, I_d, R_T, R_T)"""
        bonds = cast(Tensor, self.left).unsqueeze(2) * cast(Tensor, self.right).unsqueeze(1)
        return [
            t + torch.eye(n, dtype=t.dtype, device=t.device)[:, :, None, None] * bond
            for t, n, bond in zip(self._named("T", len(self.ins)), self.ins, bonds, strict=True)
        ]

    def transform(self, w: Tensor) -> Tensor:
        o = self.o
        if o.transform_rank:
            w = ring_apply(w, self.cores())
        if o.residual == "none":
            return w
        if o.residual == "ttm":
            return w + self.scaling * ring_matrix(self._named("B", max(len(self.outs), len(self.ins))))
        b, a = self.residual_factors()
        return torch.addmm(w, b.to(w.dtype), a.to(w.dtype), alpha=self.scaling)

    def joins(self, x: Tensor) -> bool:
        """Whether rings on x cost less than on W's rows, in both passes, and the whole gradient of W'."""
        if self.both is None:
            return False
        (out, width), rows = self.view.shape, x.numel() // x.shape[-1]
        return rows * (self.both - out * width) < self.both * out or not self.both

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """W (T x) + bias + s Delta x"""
        o, rings = self.o, self._rings()
        if not rings:
            b, a = self.residual_factors()
            return low_rank_linear(x, w, bias, self.scaling * b, a)
        y = F.linear(ring_apply(x, rings[0]) if o.transform_rank else x, w, bias)
        if o.residual == "none":
            return y
        if o.residual == "ttm":
            return y.add_(ring_apply(x, rings[-1]), alpha=self.scaling)
        b, a = self.residual_factors()
        return y.add_(F.linear(down(self.view, x, a), self.scaling * b))

    def _rings(self) -> list[list[Tensor]]:
        """The cores of Tᵀ and, of "ttm", of Deltaᵀ: what they make of x are T and Delta on each of its rows."""
        rings = [self.cores()] if self.o.transform_rank else []
        if self.o.residual == "ttm":
            rings.append(self._named("B", max(len(self.outs), len(self.ins))))
        return [[core.transpose(0, 1) for core in cores] for cores in rings]

    def residual_factors(self) -> tuple[Tensor, Tensor]:
        """Delta of "lora" or "tr" as a product, (out, k) (k, in); the trace of a product is an inner product of r^2."""
        if self.o.residual == "lora":
            return self.B, self.A
        b = ring_rows(self._named("B", len(self.outs)))
        c = ring_rows(self._named("C", len(self.ins)))
        return b.flatten(1), c.mT.flatten(1).T

    def loss(self) -> Tensor | None:
        if not (self.o.penalty and self.o.transform_rank):
            return None
        norms = [torch.linalg.vector_norm(t, dim=(0, 1)).sum() for t in self._named("T", len(self.ins))]
        return self.o.penalty * torch.stack(norms).sum()

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        """R_T^2 sum I_d^2, and r (out + in), r^2 (sum O_d + sum I_d) or r^2 sum O_d I_d."""
        outs, ins = balanced(shape[0], options.order), balanced(shape[1], options.order)
        residual = {
            "lora": options.rank * sum(shape),
            "tr": options.rank**2 * (sum(outs) + sum(ins)),
            "ttm": options.rank**2 * sum(m * n for m, n in _paired(outs, ins)),
            "none": 0,
        }
        return int(options.transform_rank**2 * sum(n * n for n in ins) + residual[options.residual])


def _paired(outs: tuple[int, ...], ins: tuple[int, ...]) -> list[tuple[int, int]]:
    """Both with as many factors, the missing ones 1."""
    most = max(len(outs), len(ins))
    both = [(1,) * (most - len(sizes)) + sizes for sizes in (outs, ins)]
    return list(zip(*both, strict=True))
