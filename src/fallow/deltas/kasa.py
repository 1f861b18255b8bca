"""KaSA: the smallest singular directions of each weight are taken out, and an update in the form of an SVD is trained.

"KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models", arXiv 2412.06071.

    W' = W - U_d diag(s_d) V_dᵀ + eta B diag(d) A
    U_d (out, t), s_d (t,), V_d (in, t): the t smallest singular triples of W, t = trunc_rank
    A (r, in), uniform in +-1 / sqrt(in); B (out, r), zero; d (r,), normal; eta = alpha / r
    loss = beta |d|² + gamma (|Bᵀ B - I|_F + |A Aᵀ - I|_F)

The model starts as the truncated one, not as the base. What is taken out is subtracted beside the layer, and never
written into W: so the base stays whole (quantised ones too), other adapters see all of it, a second KaSA truncates what
the first did and not its remains, and disabling shows the base, bit for bit. The truncated model without the update
shows within `fallow.condition(model, truncated_only=True)`. The price: two KaSA acting in one layer at once take the
directions out twice; give the second trunc_rank=0. A scale counts for both, the truncation and the update.

The official code keeps in - r directions, so that wide layers lose fewer or none, and its penalty has Gram matrices of
the large sides; here min(out, in) - r are kept, as in the paper, and `gram="official"` is that penalty, computed from
the small ones: |Aᵀ A - I|² = |A Aᵀ - I|² + in - r.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fallow.core.bases import smallest
from fallow.core.delta import Site, number, one_of, whole
from fallow.core.errors import ConfigError
from fallow.core.factor_pair import FactorPair, PairOptions
from fallow.core.factored import through
from fallow.core.low_rank_linear import low_rank_linear
from fallow.core.starting import Pair
from fallow.objectives.orthonormal import off_orthonormal


class KaSA(FactorPair):
    name = "kasa"
    starts = "the smallest singular directions of each weight are taken out"
    cut_A: Tensor  # V_dᵀ, up to a rotation among the directions
    cut_B: Tensor  # -U_d diag(s_d), likewise

    @dataclasses.dataclass(kw_only=True)
    class Options(PairOptions):
        """`rank`: r. `alpha`: None for 2 * rank, the ratio of all of the paper's runs. `trunc_rank`: how many
        directions are taken out; None for the rank, as in the paper; 0 for none. `dropout`: on the input of the update,
        not of what is taken out. `beta`: weight of |d|² in the loss. `gamma`: weight of the two distances from
        orthogonality. `reduction`: the penalty is the "mean" over the adapted layers, as in the official script, for
        which its values of beta and gamma are made; or their "sum", as in PEFT. `gram`: "small", the Gram matrices (r,
        r), or "official", those of the large sides.
        """

        rank: int = 8
        alpha: float | None = None
        trunc_rank: int | None = None
        dropout: float = 0.0
        beta: float = 1e-4
        gamma: float = 1e-3
        reduction: str = "mean"
        gram: str = "small"

        def check(self) -> None:
            super().check()
            whole("rank", self.rank)
            if self.trunc_rank is not None:
                whole("trunc_rank", self.trunc_rank, 0)
            if self.alpha is not None:
                number("alpha", self.alpha, open_below=True)
            number("dropout", self.dropout, most=0.99)
            number("beta", self.beta)
            number("gamma", self.gamma)
            one_of("reduction", self.reduction, ("mean", "sum"))
            one_of("gram", self.gram, ("small", "official"))

    def setup(self, site: Site) -> None:
        cut = self.o.rank if self.o.trunc_rank is None else self.o.trunc_rank
        for name, value in (("rank", self.o.rank), ("trunc_rank", cut)):
            if value >= min(site.shape):
                most = min(site.shape) - 1
                raise ConfigError(
                    f"{name}={value} leaves nothing of '{site.name}' of {site.shape}; give at most {most}"
                )
        a, d, b = self.start(self.o.rank)
        self.d = nn.Parameter(d)
        self.keep_pair(a, b)
        out_part, in_part = smallest(site.weight(), cut)
        self.register_buffer("cut_B", -out_part, persistent=False)
        self.register_buffer("cut_A", in_part, persistent=False)
        self.share("layers", site, lambda: torch.zeros(()))
        self.shared("layers").add_(1)

    def start(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Fresh A (rank, in), d (rank,), B (out, rank)."""
        out, inner = self.view.shape
        return torch.empty(rank, inner).uniform_(-1, 1) / inner**0.5, torch.randn(rank), torch.zeros(out, rank)

    def _layout(self) -> None:
        super()._layout()
        self.share_of_input, self.drop, self.any_dtype = self.drop, 0.0, True  # what is taken out sees the whole input

    @property
    def eta(self) -> float:
        return 2.0 if self.o.alpha is None else float(self.o.alpha / self.d.numel())

    def pair_form(self) -> tuple[int, float]:
        return self.d.numel(), self.eta

    @torch.no_grad()
    def take(self, pair: Pair) -> None:
        """d is 1 where a start fills the factors."""
        super().take(pair)
        self.d.fill_(1.0)

    def update(self) -> tuple[Tensor, Tensor]:
        """The factors of what is trained."""
        return self.with_start(self.B * (self.eta * self.d), self.A, self.eta)

    def factors(self) -> tuple[Tensor, Tensor]:
        b, a = self.update()
        return torch.cat([b, self.cut_B], 1), torch.cat([a, self.cut_A])

    def delta_forward(self, x: Tensor) -> Tensor:
        if self.context.get("truncated_only"):
            return through(self.view, x, self.cut_A, self.cut_B)
        if self.share_of_input and self.training:
            b, a = self.update()
            update = through(self.view, F.dropout(x, self.share_of_input), a, b)
            return update + through(self.view, x, self.cut_A, self.cut_B)
        b, a = self.factors()
        return through(self.view, x, a, b)

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if self.context.get("truncated_only"):
            return low_rank_linear(x, w, bias, self.cut_B, self.cut_A)
        if self.share_of_input and self.training:
            return (F.linear(x, w, bias) + self.delta_forward(x)).to(x.dtype)
        return super().linear(x, w, bias)

    def loss(self) -> Tensor | None:
        """In r² (out + in) multiplications and r² numbers, whatever the batch."""
        if not self.o.beta and not self.o.gamma:
            return None
        term = self.o.beta * self.d.square().sum()
        if self.o.gamma:
            term = term + self.o.gamma * (self.off_orthonormal(self.B.T) + self.off_orthonormal(self.A))
        return term / self.shared("layers") if self.o.reduction == "mean" else term

    def off_orthonormal(self, rows: Tensor) -> Tensor:
        """|R Rᵀ - I|_F of R (r, n), or |Rᵀ R - I|_F; its gradient is 0 where the rows are orthonormal."""
        return off_orthonormal(rows, self.o.gram)

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        return int(options.rank) * (shape[0] + shape[1] + 1)

    def importance(self) -> Tensor:
        """The norm of each rank's part of the update: eta |d_j| |B_j| |A_j|, or what it has changed since its start."""
        return self.eta * self.learned(self.B * self.d)

    @torch.no_grad()
    def resize(self, rank: int) -> None:
        """Of the update; what is taken out stays."""
        whole("rank", rank)
        keep = self.importance().topk(min(rank, self.d.numel())).indices.sort().values
        a, d, b = (fresh.to(self.A) for fresh in self.start(rank - len(keep)))
        before, cut, old = self.eta, self.cut_A.shape[0], self.d
        self.o = dataclasses.replace(self.o, rank=rank, trunc_rank=cut)
        eta = 2.0 if self.o.alpha is None else self.o.alpha / rank
        self.d = nn.Parameter(torch.cat([old[keep] * (before / eta), d]), old.requires_grad)
        if self.o.offset:
            self.start_B.mul_(before / eta)
        self.resize_pair(keep, a, b)
