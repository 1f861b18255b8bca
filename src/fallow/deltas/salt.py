"""SALT: the large singular values of each weight are scaled and shifted, the small directions mixed by a low rank.

"SALT: Parameter-Efficient Fine-Tuning via Singular Value Adaptation with Low-Rank Transformation", arXiv 2503.16055.

    W = U diag(s) Vᵀ        U (out, k), Vᵀ (k, in), k = min(out, in); the first r of s are the top, r' = k - r the tail
    W' = U relu(blockdiag(diag(a * s_top + b), diag(s_tail) + X Y)) Vᵀ
    a (r,), ones; b (r,), zeros; X (r', q), uniform; Y (q, r'), zero
    loss = reg (|a * s_top + b - s_top|_F + |X Y|_F)

Computed as a difference, W' = W + U M Vᵀ, with M zero at first: exact at the start, and W itself may be quantised. In a
Linear, few tokens are mixed one by one, and k numbers are kept for each; for many, W' is formed (`salt_linear`).

The relu acts on every entry, as the paper and the official code have it. Outside the diagonal that lets only positive
entries through, and at the start, where they are zero, none has a gradient. Its purpose is to keep the singular values
from turning negative: `relu="diag"` does that and leaves the mixing free; "none" leaves all free, and is a low-rank
change of rank r + q, the cheapest by far.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.bases import OnBases, all_triples, check_bases, probe, warn_if_close
from fallow.core.delta import MethodOptions, Site, fits_rank, number, one_of, whole
from fallow.deltas.salt_linear import blocks, mixed_linear


class SALT(OnBases):
    name = "salt"
    U: Tensor
    s: Tensor
    Vt: Tensor

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`ratio`: the share of singular values that is the top, at least one. `top`: their number instead. `rank`: q,
        cut to the size of the tail, above which X Y gains nothing (the paper counts 36,216 numbers for r = 700 and q =
        256 of 768: here 10,648). `relu`: of "all" the sum as in the paper, of its "diag" alone, or "none". `init`:
        "zero", or "gauss", X and Y normal of deviation 0.01, as in the official code for SAM, which does not start at
        W. `reg`: weight of the two norms in the loss; 0 as in the released settings, where the official trainer's own
        default is 0.01. `form`: "added", D x beside the layer, or "rewritten", one product with W' in its place.
        `save_basis`: keep the singular vectors in the file; if not, they are made of W again.

        The defaults are the official code's. Weight decay pulls `a` to 0 and not to 1: give it none.
        """

        ratio: float = 0.1
        top: int | None = None
        rank: int = 8
        relu: str = "all"
        init: str = "zero"
        reg: float = 0.0
        form: str = "added"
        save_basis: bool = False

        def check(self) -> None:
            number("ratio", self.ratio, most=1.0, open_below=True)
            if self.top is not None:
                whole("top", self.top)
            whole("rank", self.rank)
            one_of("relu", self.relu, ("all", "diag", "none"))
            one_of("init", self.init, ("zero", "gauss"))
            number("reg", self.reg)
            check_bases(self)

        def split(self, shape: tuple[int, int]) -> tuple[int, int]:
            """r and q in a layer of this (out, in)."""
            k = min(shape)
            top = min(k, max(1, int(k * self.ratio)) if self.top is None else self.top)
            return top, min(self.rank, k - top)

    def setup(self, site: Site) -> None:
        fits_rank(site, self.o.rank)
        (out, inner), k = site.shape, min(site.shape)
        self.top, q = self.o.split(site.shape)
        if self.o.save_basis and not site.fresh:
            u, s, vt, mark = torch.empty(out, k), torch.empty(k), torch.empty(k, inner), torch.empty(2, k)
        else:
            u, s, vt = all_triples(site.weight())
            mark = torch.stack([probe(u), s])
            if not self.o.save_basis:
                warn_if_close(site, s, k)
        self.a, self.b = nn.Parameter(torch.ones(self.top)), nn.Parameter(torch.zeros(self.top))
        if self.o.init == "gauss":
            x, y = 0.01 * torch.randn(k - self.top, q), 0.01 * torch.randn(q, k - self.top)
        else:  # kaiming_uniform(a=sqrt(20)) of q inputs
            x, y = (
                torch.empty(k - self.top, q).uniform_(-1, 1) * math.sqrt(2 / 7 / max(1, q)),
                torch.zeros(q, k - self.top),
            )
        self.X, self.Y = nn.Parameter(x), nn.Parameter(y)
        self.keep(U=u, s=s, Vt=vt)
        self.settle(site, mark)

    def shift(self) -> Tensor:
        """(r,): a * s_top + b - s_top, before the relu."""
        s = self.s[: self.top]
        return self.a * s + self.b - s

    def factors(self) -> tuple[Tensor, Tensor]:
        u, vt, top = self.U, self.Vt, self.top
        if self.o.relu == "none":
            left = torch.cat([u[:, :top] * self.shift(), u[:, top:] @ self.X], 1)
            return left, torch.cat([vt[:top], self.Y @ vt[top:]])
        gates, c = blocks(self.s, self.a, self.b, self.X, self.Y, self.o.relu)
        if u.shape[0] <= vt.shape[1]:
            return torch.cat([u[:, :top] * gates, u[:, top:] @ c], 1), vt
        return u, torch.cat([gates.unsqueeze(1) * vt[:top], c @ vt[top:]])

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if self.o.relu == "none":
            return super().linear(x, w, bias)
        return mixed_linear(x, w, bias, self.U, self.Vt, self.o.relu, self.s, self.a, self.b, self.X, self.Y)

    def loss(self) -> Tensor | None:
        """|X Y|_F from the Gram matrices of X and Y; 0 and without gradient while Y is 0."""
        if not self.o.reg:
            return None
        square = ((self.X.T @ self.X) * (self.Y @ self.Y.T)).sum()
        some = square > 0
        mixing = torch.where(some, torch.where(some, square, 1.0).sqrt(), 0.0)
        return self.o.reg * (torch.linalg.vector_norm(self.shift()) + mixing)

    def differs(self, mark: Tensor) -> bool:
        """Signs of the vectors count, as those of different pairs meet."""
        gap = (mark.to(self.mark) - self.mark).abs()
        return bool((gap[0] > 0.05).any() | (gap[1] > 5e-3 * self.mark[1, 0]).any())

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        top, q = options.split(shape)
        return int(2 * top + 2 * q * (min(shape) - top))
