"""LoLDU: r + 1 numbers per layer are trained, between the triangles of an LU decomposition of its weight.

"LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning", arXiv 2410.13618.

    W = P L diag(D) U        P L (out, k), D (k,), U (k, in), k = min(out, in); of these the first r pivots
    W' = W + (P L)_r diag(scale * z - scale_0 * z_0) U_r        z (r,) and scale (1,) trained, from z_0 and scale_0

The paper has y = W_res x + scale * (P L)_r diag(z) U_r x with W_res = W - scale_0 (P L)_r diag(z_0) U_r: the same
function. As a difference it is exact at the start in any dtype and for every `init`; and the two large parts that W_res
and the branch are (the first pivots are not the largest part of W, and the triangles are not orthogonal) do not have to
cancel in bf16. In the official code half of the starts leave W_res without the z_0 that is used, which wrecks the model
and makes up the paper's ranking of starts; and its files hold z alone, of no use on a fresh base unless z_0 is D.

Where D is zero, as in weights of lower rank, U's row stays undivided: no NaN. Pivots may tie, and then be chosen
otherwise elsewhere: their rows are in the file, and a file is refused where they come out otherwise.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fallow.core.bases import OnBases, check_bases, ldu
from fallow.core.delta import MethodOptions, Site, fits_rank, number, one_of, whole
from fallow.core.low_rank_linear import add_product, low_rank_linear

WORTH_SPLITTING = 512  # pivots above which products with parts of a triangle cost less than the whole does
INITS = ("uniform", "lu", "normal", "constant", "ones", "zeros", "s_uniform", "s_normal")


class LoLDU(OnBases):
    name = "loldu"
    PL: Tensor
    U: Tensor
    z_0: Tensor

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`rank`: how many pivots, the first ones, or "full" as in most of the paper. `alpha`: scale_0 = alpha / rank;
        None for scale_0 = 1, as in all of the paper's runs. `init`: z_0, with m the mean of D: "uniform" in +-|m| / 2,
        as in the paper, "lu" D itself, "normal" of D's mean and deviation, "constant" m, "ones", "zeros", "s_uniform"
        in +-1, "s_normal" of deviation 1. `train_scale`: as in the paper, at a tenth of the learning rate best; its
        code leaves the scale frozen. `normalize`: the rows of U get norm 1 and D takes what they had, for tiny pivots
        make rows, and so steps, huge. `form`: "added", D x beside the layer, or "rewritten", one product with W' in its
        place. `save_basis`: keep the factors in the file; if not, they are made of W again.

        Weight decay pulls z to 0, not to z_0: give none.
        """

        rank: int | str = "full"
        alpha: float | None = None
        init: str = "uniform"
        train_scale: bool = True
        normalize: bool = False
        form: str = "added"
        save_basis: bool = False

        def check(self) -> None:
            if self.rank != "full":
                whole('rank (or "full")', self.rank)
            if self.alpha is not None:
                number("alpha", self.alpha, open_below=True)
            one_of("init", self.init, INITS)
            one_of("train_scale", self.train_scale, (True, False))
            one_of("normalize", self.normalize, (True, False))
            check_bases(self)

    def setup(self, site: Site) -> None:
        rank = min(site.shape) if self.o.rank == "full" else self.o.rank
        fits_rank(site, rank)
        if self.o.save_basis and not site.fresh:
            left, upper = torch.empty(site.shape[0], rank), torch.empty(rank, site.shape[1])
            z, pivots = torch.empty(rank), torch.empty(rank, dtype=torch.int32)
        else:
            left, d, upper, pivots = ldu(site.weight())
            left, d, upper, pivots = left[:, :rank], d[:rank], upper[:rank], pivots[:rank]
            if self.o.normalize:
                norms = upper.norm(dim=1)
                norms = torch.where(norms > 0, norms, 1.0)
                d, upper = d * norms, upper / norms.unsqueeze(1)
            z = self.start(d)
        self.scale_0 = 1.0 if self.o.alpha is None else float(self.o.alpha) / rank
        self.z = nn.Parameter(z)
        if self.o.train_scale:
            self.scale = nn.Parameter(torch.full((1,), self.scale_0))
        self.register_buffer("z_0", z.detach().clone())
        self.keep(PL=left, U=upper)
        self.settle(site, pivots)

    def start(self, d: Tensor) -> Tensor:
        """z_0, given D (r,)."""
        mean, init = d.mean(), self.o.init
        drawn = torch.rand_like(d) - 0.5 if "uniform" in init else torch.randn_like(d)
        starts = {
            "uniform": drawn * mean.abs(), "lu": d, "normal": mean + d.std(correction=0) * drawn,
            "constant": mean.expand_as(d), "ones": torch.ones_like(d), "zeros": torch.zeros_like(d),
            "s_uniform": 2 * drawn, "s_normal": drawn,
        }  # fmt: skip
        return starts[init].clone()

    def gates(self) -> Tensor:
        """scale * z - scale_0 * z_0"""
        scale = self.scale if self.o.train_scale else self.scale_0
        return scale * self.z - self.scale_0 * self.z_0

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.PL * self.gates(), self.U

    def delta_forward(self, x: Tensor) -> Tensor:
        """For the backward only U_r x is kept, not x: the triangles have no gradients."""
        return self.view.up(self.view.scale(self.view.down(x, self.U), self.gates()), self.PL)

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        upper = _Upper(self.U) if x.device.type == "cpu" and len(self.U) >= WORTH_SPLITTING else self.U
        return low_rank_linear(x, w, bias, self.PL, upper, self.gates())

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        rank = min(shape) if options.rank == "full" else int(options.rank)
        return rank + int(options.train_scale)


class _Upper:
    """Products with the upper triangle U (r, in), which leave out most of what is zero."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, step = matrix, -(-len(matrix) // 4)
        self.blocks = [(slice(start, start + step), slice(start, None)) for start in range(0, len(matrix), step)]

    def down(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        made, rows = torch.empty(len(self.matrix), len(rows), dtype=dtype, device=rows.device), rows.to(dtype)
        for part, reach in self.blocks:
            torch.mm(self.matrix[part, reach], rows[:, reach].T, out=made[part])
        return made

    def back(self, rows: Tensor, h: Tensor) -> None:
        if rows.dtype != self.matrix.dtype:  # sums of blocks would be rounded to it block by block
            return add_product(rows, h.T, self.matrix)
        for part, reach in self.blocks:
            rows[:, reach].addmm_(h[part].T, self.matrix[part, reach])
        return None

    def plain(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return F.linear(x.to(dtype), self.matrix)
