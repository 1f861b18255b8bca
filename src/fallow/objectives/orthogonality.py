"""PEGO's two penalties for every change B A: it stays out of the base's way, and its parts out of each other's.

"Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain Generalization"
(arXiv 2407.15085). W (out, in) of a layer, its change the sum of N modules D_i = B_i A_i of equal rank:

    penalty = weight * sum_layers (sum_i |W D_iᵀ|_1 + sum_(i<j) |D_i D_jᵀ|_1)        (out, out)

The norms are sums of absolute entries. `side="output"`: of Wᵀ D_i, (in, in). `norm="fro2"`: of squares. No such matrix
is made whole: of one L Rᵀ a tile at a time is made, summed and turned into gradients, which alone are kept for the
backward; squares need r x r ones only. Where a start's factors are subtracted, D_i is what the module has learned.

The sums over entries grow with out² (in² of the output side), and with the number of layers: the paper's weight of
1e-3 belongs to the 24 projections of 768 x 768 of a ViT-B; for others change it by the inverse of out² and of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from fallow.core.delta import Delta, number, one_of, whole
from fallow.core.errors import ConfigError
from fallow.core.factored import down
from fallow.core.objective import Objective, each, in_float32, total
from fallow.core.views import View

CPU_TILE, TILE = (1024, 256), (4096, 4096)  # rows and columns of L Rᵀ that exist at one time: in cache, or on a GPU
Side = Literal["input", "output"]
Norm = Literal["l1", "fro2"]


@dataclass
class Orthogonality(Objective):
    """`weight`: of both sums. `group`: N, into which the ranks are divided. `preserve`, `diversify`: what the sum for W
    and that for pairs of modules count besides. `side`, `norm`: see above.
    """

    name: ClassVar[str] = "orthogonality"
    weight: float = 1e-3
    group: int = 1
    preserve: float = 1.0
    diversify: float = 1.0
    side: Side = "input"
    norm: Norm = "l1"

    def __post_init__(self) -> None:
        for name in ("weight", "preserve", "diversify"):
            number(name, getattr(self, name))
        whole("group", self.group)
        one_of("side", self.side, ("input", "output"))
        one_of("norm", self.norm, ("l1", "fro2"))

    @in_float32
    def penalty(self, deltas: Mapping[str, Delta]) -> Tensor | None:
        """ConfigError for a Delta that is no product of two factors, and for ranks that the group does not divide."""
        if not self.weight:
            return None
        terms = []
        for name, delta in each(deltas):
            if not delta.exact:
                raise ConfigError(f"objective 'orthogonality' needs a change B A; '{delta.name}' of '{name}' has none")
            terms.append(self.weight * overlap(delta, self.group, self.side, self.norm, self.preserve, self.diversify))
        return total(terms)


def overlap(
    delta: Delta, group: int, side: Side = "input", norm: Norm = "l1", preserve: float = 1.0, diversify: float = 1.0
) -> Tensor:
    """`preserve` times the sum for W plus `diversify` times that for pairs of modules: a differentiable scalar."""

    def both(a: Tensor, b: Tensor) -> Tensor:
        first, second = overlaps(delta, a, b, group, side, norm)
        return preserve * first + diversify * second

    b, a = delta.factors()
    if norm == "l1" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return cast(Tensor, _Gradients.apply(both, a, b))
    return both(a, b)


def overlaps(delta: Delta, a: Tensor, b: Tensor, group: int, side: Side, norm: Norm) -> tuple[Tensor, Tensor]:
    """The sums for W and for pairs of modules, of a Delta whose factors are B (out, r) and A (r, in)."""
    with torch.autocast(a.device.type, enabled=False):
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
        a, b = _modules(delta, a.to(wide), b.to(wide), group)  # (n, r, in), (n, out, r)
        w, n = delta.stored(), group
        if side == "input":
            # W (B A)ᵀ = (W Aᵀ) Bᵀ, the products of all modules in one; a half-precision W is never kept in float32
            against, ends, inner = down(View(*w.shape), w, a.flatten(0, 1)), b, a
        else:
            against, ends, inner = down(View(*w.T.shape), w.T, b.mT.flatten(0, 1)), a.mT, b.mT
        preserve = _size(against.unflatten(1, (n, -1)).transpose(0, 1), ends, norm)
        first, second = torch.triu_indices(n, n, 1, device=w.device)
        between = inner[first] @ inner[second].mT  # A_i A_jᵀ, or B_iᵀ B_j
        return preserve, _size(ends[first] @ between, ends[second], norm)


def _modules(delta: Delta, a: Tensor, b: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The ranks of each of the `group` modules, with those that a start subtracts from them."""
    taken = int(getattr(delta.o, "offset", 0))
    rank = a.shape[0] - taken
    if rank % group or (taken and group > 1 and taken != rank):
        raise ConfigError(
            f"group={group} does not divide the rank of '{delta.site_name}', which is {rank}"
            + (f" with {taken} subtracted" if taken else "")
            + "; give a group that does, or 1"
        )
    parts = [(a[:rank], b[:, :rank]), (a[rank:], b[:, rank:])] if taken else [(a, b)]
    split = [(x.unflatten(0, (group, -1)), y.unflatten(1, (group, -1)).transpose(0, 1)) for x, y in parts]
    return torch.cat([x for x, _ in split], 1), torch.cat([y for _, y in split], 2)


def _size(left: Tensor, right: Tensor, norm: Norm) -> Tensor:
    """Of all L Rᵀ, L (n, a, r), R (n, b, r): the sum of absolute or of squared entries."""
    if norm == "l1":
        return cast(Tensor, _AbsoluteSum.apply(left, right))
    return ((left.mT @ left) * (right.mT @ right)).sum()


class _Gradients(torch.autograd.Function):
    """A sum of A and B, with its gradients for them made at once: nothing else of it is kept."""

    @staticmethod
    def forward(ctx: Any, sums: Callable[[Tensor, Tensor], Tensor], *factors: Tensor) -> Tensor:
        own = [t.detach().requires_grad_(need) for t, need in zip(factors, ctx.needs_input_grad[1:], strict=True)]
        with torch.enable_grad():
            total = sums(*own)
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
