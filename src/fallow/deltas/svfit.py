"""SVFit: the singular values of each weight are trained, between its own frozen singular vectors.

"SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values", arXiv 2409.05926.

    W = U diag(s) Vᵀ        U (out, k), s (k,) descending, Vᵀ (k, in), k = min(out, in); of these the first r
    W' = W + U_r diag(delta) V_rᵀ        delta (r,) trained, zero at first; sigma = s_r + delta is the paper's vector

The paper has y = W_e x + U_r diag(sigma) V_rᵀ x with the residual W_e = W - U_r diag(s_r) V_rᵀ: the same function, and
under Adam without weight decay the same training. The difference is trained instead because it is exact at the start in
any dtype, leaves quantised bases alone, keeps small steps on large values that bf16 would round away, and lets weight
decay pull to the pretrained values. For full r the frozen vectors are twice a square weight: few trained numbers do not
mean little memory.

Where r is below a quarter of k, `svd="randomized"` finds the vectors by a range finder: exact at the start all the
same, but on flat spectra not quite the leading ones. "full" computes the exact ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.bases import OnBases, all_triples, check_bases, leading, warn_if_close
from fallow.core.delta import MethodOptions, Site, fits_rank, number, one_of, whole
from fallow.core.errors import ConfigError
from fallow.core.linalg import energy_rank
from fallow.core.low_rank_linear import low_rank_linear


class SVFit(OnBases):
    name = "svfit"
    U: Tensor
    s: Tensor
    Vt: Tensor

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`rank`: how many singular values are trained, the largest first, or "full". `energy`: in place of rank, as
        many as hold this share of the squared norm. `relative`: sigma = s (1 + delta), whose steps grow with s.
        `nonneg`: (ours) sigma = max(s + delta, 0). `svd`: "randomized" where the rank is below a quarter of k, or
        "full", always exact. `form`: "added", D x beside the layer, or "rewritten", one product with W' in its place.
        `save_basis`: keep the vectors in the file; if not, they are made of W again.
        """

        rank: int | str = "full"
        energy: float | None = None
        relative: bool = False
        nonneg: bool = False
        svd: str = "randomized"
        form: str = "added"
        save_basis: bool = False

        def check(self) -> None:
            if self.rank != "full":
                whole('rank (or "full")', self.rank)
            if self.energy is not None:
                number("energy", self.energy, most=1.0, open_below=True)
                if self.rank != "full":
                    raise ConfigError(f"rank={self.rank!r} and energy={self.energy} both choose the rank; give one")
            one_of("svd", self.svd, ("randomized", "full"))
            one_of("relative", self.relative, (True, False))
            one_of("nonneg", self.nonneg, (True, False))
            check_bases(self)

    def setup(self, site: Site) -> None:
        most = min(site.shape)
        rank = most if self.o.rank == "full" else self.o.rank
        fits_rank(site, rank)
        if self.o.energy is None and self.o.save_basis and not site.fresh:
            u, s, vt = torch.empty(site.shape[0], rank), torch.empty(rank), torch.empty(rank, site.shape[1])
            mark = torch.empty(3)
        else:
            weight = site.weight()
            if self.o.energy is not None or self.o.svd == "full":
                u, s, vt = all_triples(weight)
                rank = rank if self.o.energy is None else min(most, energy_rank(s, self.o.energy))
            else:
                u, s, vt = leading(weight, rank + 1, site.generator())  # one more tells the gap at the cut
            if not self.o.save_basis:
                warn_if_close(site, s, rank)
            u, s, vt = u[:, :rank], s[:rank], vt[:rank]
            mark = torch.stack([weight.norm(), s[0], s[-1]])
        self.delta = nn.Parameter(torch.zeros(rank))
        self.keep(U=u, s=s, Vt=vt)
        self.settle(site, mark)

    def sigma(self) -> Tensor:
        """(r,): the singular values as they are now, not sorted; negative ones may be among them without `nonneg`."""
        return self.s + self.gates()

    def gates(self) -> Tensor:
        """sigma - s"""
        gates = self.delta * self.s if self.o.relative else self.delta
        return torch.relu(self.s + gates) - self.s if self.o.nonneg else gates

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.U * self.gates(), self.Vt

    def delta_forward(self, x: Tensor) -> Tensor:
        """For the backward only V_rᵀ x is kept, not x: U and V have no gradients."""
        return self.view.up(self.view.scale(self.view.down(x, self.Vt), self.gates()), self.U)

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return low_rank_linear(x, w, bias, self.U, self.Vt, self.gates())

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        """ConfigError where `energy` chooses the rank: it depends on the weights."""
        if options.energy is not None:
            raise ConfigError(f"energy={options.energy} chooses a rank by the weights; no formula tells it")
        return min(shape) if options.rank == "full" else int(options.rank)

    def importance(self) -> Tensor:
        """How far each singular value has moved."""
        return self.gates().detach().abs()
