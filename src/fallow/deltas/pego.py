"""PEGO: a group of LoRAs kept orthogonal to the base weight and to each other, for domains not seen in training.

"Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain Generalization"
(arXiv 2407.15085). N modules of rank r, W (out, in), A_i (r, in), B_i (out, r), scale 1:

    W' = W + sum_i B_i A_i      one LoRA of rank N r, but for the objective's term:
    loss = l (sum_i |W (B_i A_i)ᵀ|_1 + sum_(i<j) |B_i A_i (B_j A_j)ᵀ|_1)     l: orthogonality; (out, out)

The norms are sums of absolute entries. `side="output"`: of Wᵀ B_i A_i, (in, in). `norm="fro2"`: of squares. No such one
is made whole: of one L Rᵀ a tile at a time is made, summed and turned into gradients, which alone are kept for the
backward; squares need r x r ones only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fallow.core.delta import Site, number, one_of, whole
from fallow.core.errors import ConfigError
from fallow.core.factor_pair import FactorPair, PairOptions
from fallow.core.factored import down
from fallow.core.views import View

CPU_TILE, TILE = (1024, 256), (4096, 4096)  # rows and columns of L Rᵀ that exist at one time: in cache, or on a GPU


class PEGO(FactorPair):
    """Sums over all entries grow with out²: for other sizes than a ViT-B's 768 change `orthogonality` inversely."""

    name = "pego"

    @dataclasses.dataclass(kw_only=True)
    class Options(PairOptions):
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
            super().check()
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
        a = torch.empty(total, width)  # the modules' factors, one below (B: beside) the other
        nn.init.kaiming_uniform_(a, math.sqrt(5))
        self.keep_pair(a, torch.zeros(out, total))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.with_start(self.B, self.A)

    def loss(self) -> Tensor | None:
        if not self.o.orthogonality:
            return None
        if self.o.norm == "l1" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self.o.orthogonality * cast(Tensor, _Gradients.apply(self._sums, self.A, self.B))
        return self.o.orthogonality * sum(self.penalties())

    def penalties(self) -> tuple[Tensor, Tensor]:
        """The sums for W and for pairs of modules, before they are weighed: differentiable scalars of A's dtype."""
        return self._sums(self.A, self.B)

    def _sums(self, all_a: Tensor, all_b: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(all_a.device.type, enabled=False):
            n, r = self.o.group, self.o.rank
            w = self.stored()
            a, b = all_a.unflatten(0, (n, r)), all_b.unflatten(1, (n, r)).transpose(0, 1)  # (n, r, in), (n, out, r)
            if self.o.side == "input":
                # W (B A)ᵀ = (W Aᵀ) Bᵀ, the products of all modules in one; a half-precision W is never kept in float32
                against = down(View(*w.shape), w, all_a).unflatten(1, (n, r)).transpose(0, 1)
                ends, inner = b, a
            else:
                against = down(View(*w.T.shape), w.T, all_b.T).unflatten(1, (n, r)).transpose(0, 1)
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


class _Gradients(torch.autograd.Function):
    """The sum of both terms, with its gradients for A and B made at once: nothing of the terms is kept but these."""

    @staticmethod
    def forward(ctx: Any, sums: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], *factors: Tensor) -> Tensor:
        own = [t.detach().requires_grad_(need) for t, need in zip(factors, ctx.needs_input_grad[1:], strict=True)]
        with torch.enable_grad():
            preserve, diversify = sums(*own)
            total = preserve + diversify
        wanted = [t for t in own if t.requires_grad]
        found = iter(torch.autograd.grad(total, wanted) if wanted else ())
        ctx.save_for_backward(*(next(found) if t.requires_grad else None for t in own))
        return total.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if one is None else grad * one for one in ctx.saved_tensors)


class _AbsoluteSum(torch.autograd.Function):
    """The sum of |L Rᵀ|; its gradients, S R and Sᵀ L of the signs S, are made along with it, tile by tile.

    |P| is S * P, so the sum is that of L * (S R). Thin matrices lie as (r, n), the layout in which their products with
    S run fastest on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        left, right = left.mT.contiguous(), right.mT.contiguous()
        grad_left, grad_right = torch.zeros_like(left), torch.zeros_like(right)
        rows, columns = CPU_TILE if left.device.type == "cpu" else TILE
        space = left.new_empty(min(rows, left.shape[2]) * min(columns, right.shape[2]))
        for left_, right_, of_left, of_right in zip(left, right, grad_left, grad_right, strict=True):
            for part, of_part in zip(left_.split(rows, 1), of_left.split(rows, 1), strict=True):
                for other, of_other in zip(right_.split(columns, 1), of_right.split(columns, 1), strict=True):
                    shape = part.shape[1], other.shape[1]
                    signs = torch.mm(part.T, other, out=space[: shape[0] * shape[1]].view(shape)).sign_()
                    of_part.addmm_(other, signs.T)
                    if ctx.needs_input_grad[1]:
                        of_other.addmm_(part, signs)
        ctx.save_for_backward(grad_left, grad_right)
        return (grad_left * left).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        grad_left, grad_right = ctx.saved_tensors
        return grad * grad_left.mT, grad * grad_right.mT
