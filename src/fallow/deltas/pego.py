"""PEGO: a group of LoRAs kept orthogonal to the base weight and to each other, for domains not seen in training.

"Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain Generalization"
(arXiv 2407.15085). N modules of rank r, W (out, in), A_i (r, in), B_i (out, r), scale 1:

    W' = W + sum_i B_i A_i      one LoRA of rank N r, but for the objective's term:
    loss = l (sum_i |W (B_i A_i)ᵀ|_1 + sum_(i<j) |B_i A_i (B_j A_j)ᵀ|_1)     l: orthogonality; (out, out)

The norms are sums of absolute entries. `side="output"`: of Wᵀ B_i A_i, (in, in). `norm="fro2"`: of squares. No such one
is made whole: of one L Rᵀ some rows at a time are made, summed and turned into gradients; squares need r x r ones only.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fallow.core.delta import Delta, MethodOptions, Site, number, one_of, whole
from fallow.core.errors import ConfigError
from fallow.core.factored import down
from fallow.core.views import View

CPU_CHUNK, CHUNK = 1 << 18, 1 << 24  # entries of L Rᵀ that exist at one time: of a core's cache, or on a GPU


class PEGO(Delta):
    """Sums over all entries grow with out²: for other sizes than a ViT-B's 768 change `orthogonality` inversely."""

    name = "pego"

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`rank`: r, of each module. `group`: N modules. `orthogonality`: what both terms count in the objective.
        `side`: products over the "input", (out, out), or over the "output", (in, in), see above. `norm`: "l1", sums of
        absolute entries, or "fro2", of squares.
        """

        rank: int = 4
        group: int = 4
        orthogonality: float = 1e-3
        side: Literal["input", "output"] = "input"
        norm: Literal["l1", "fro2"] = "l1"

        def check(self) -> None:
            whole("rank", self.rank)
            whole("group", self.group)
            number("orthogonality", self.orthogonality)
            one_of("side", self.side, ("input", "output"))
            one_of("norm", self.norm, ("l1", "fro2"))

    def setup(self, site: Site) -> None:
        (out, width), total = site.shape, self.o.group * self.o.rank
        if total > min(site.shape):
            raise ConfigError(
                f"group={self.o.group} times rank={self.o.rank} is above what '{site.name}' of {site.shape} can have; "
                f"give at most {min(site.shape)} in all"
            )
        self.A = nn.Parameter(torch.empty(total, width))  # the modules' factors, one below (B: beside) the other
        nn.init.kaiming_uniform_(self.A, math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(out, total))
        self.__dict__["_site"] = (site,)  # not W itself, which hosts may replace

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.B, self.A

    def loss(self) -> Tensor | None:
        if not self.o.orthogonality:
            return None
        preserve, diversify = self.penalties()
        return self.o.orthogonality * (preserve + diversify)

    def penalties(self) -> tuple[Tensor, Tensor]:
        """The sums for W and for pairs of modules, before they are weighed: differentiable scalars of A's dtype."""
        with torch.autocast(self.A.device.type, enabled=False):
            n, r = self.o.group, self.o.rank
            w = self.__dict__["_site"][0].stored()
            a, b = self.A.unflatten(0, (n, r)), self.B.unflatten(1, (n, r)).transpose(0, 1)  # (n, r, in), (n, out, r)
            if self.o.side == "input":
                # W (B A)ᵀ = (W Aᵀ) Bᵀ, the products of all modules in one; a half-precision W is never kept in float32
                against = down(View(*w.shape), w, self.A).unflatten(1, (n, r)).transpose(0, 1)
                ends, inner = b, a
            else:
                against = down(View(*w.T.shape), w.T, self.B.T).unflatten(1, (n, r)).transpose(0, 1)
                ends, inner = a.mT, b.mT
            preserve = self._size(against, ends)
            first, second = torch.triu_indices(n, n, 1, device=w.device)
            between = inner[first] @ inner[second].mT  # A_i A_jᵀ, or B_iᵀ B_j
            return preserve, self._size(ends[first] @ between, ends[second])

    def _size(self, left: Tensor, right: Tensor) -> Tensor:
        """Of all L Rᵀ, L (n, a, r), R (n, b, r): the sum of absolute or of squared entries."""
        if self.o.norm == "l1":
            return cast(Tensor, _AbsoluteSum.apply(left, right))
        return ((left.mT @ left) * (right.mT @ right)).sum()

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        """N r (in + out)"""
        return int(options.group * options.rank * sum(shape))


class _AbsoluteSum(torch.autograd.Function):
    """The sum of |L Rᵀ|; its gradients, S R and Sᵀ L of the signs S, are made along with it, chunk by chunk of rows.

    |P| is S * P, so the sum is that of L * (S R). Thin matrices lie as (r, n), the layout in which their products with
    S run fastest on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        left, right = left.mT.contiguous(), right.mT.contiguous()
        grad_left, grad_right = torch.empty_like(left), torch.zeros_like(right)
        rows = max(1, (CPU_CHUNK if left.device.type == "cpu" else CHUNK) // max(1, right.shape[2]))
        for i in range(len(left)):
            for start in range(0, left.shape[2], rows):
                part = left[i, :, start : start + rows]
                signs = (part.T @ right[i]).sign_()
                grad_left[i, :, start : start + rows] = right[i] @ signs.T
                if ctx.needs_input_grad[1]:
                    grad_right[i].addmm_(part, signs)
        ctx.save_for_backward(grad_left, grad_right)
        return (grad_left * left).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        grad_left, grad_right = ctx.saved_tensors
        return grad * grad_left.mT, grad * grad_right.mT
