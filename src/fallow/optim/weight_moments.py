"""AdamW's moments of the gradient of W' itself, where that gradient is s (B g_A + g_B A): LoRA-Pro's full mode.

    g = s (B g_A + g_B A)      m <- beta1 m + (1 - beta1) g      v <- beta2 v + (1 - beta2) g²
    u = m^ / (sqrt(v^) + eps)  ->  s Bᵀ u (r, in) and s u Aᵀ (out, r), what A and B see of it

Stacks of one shape are one tensor (k, out, in), of which each pair's state is a view. g and u exist for a few rows of a
few layers at a time (BLOCK numbers). Factored: v as Adafactor has it, v_ij = R_i C_j / mean(R), R and C the running
means of g² over rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fallow.optim.pairs import Stack

BLOCK = 1 << 20  # numbers of g and u that exist at a time


class WeightMoments:
    """The states lie in `optimizer.state` under each pair's B: step, exp_avg, and exp_avg_sq or row and column."""

    def __init__(self, optimizer: torch.optim.Optimizer, factored: bool, dtype: torch.dtype) -> None:
        self.optimizer, self.factored, self.dtype = optimizer, factored, dtype
        self.held: dict[int, dict[str, Tensor]] = {}

    def reload(self) -> None:
        """States were loaded: stack them anew. torch has made them of the parameters' dtype."""
        self.held.clear()

    def of(self, stack: Stack) -> dict[str, Tensor]:
        """The moments of a stack, zero at first; those of its pairs are views of them."""
        key = id(stack.pairs[0].b)
        if key not in self.held:
            k, device = len(stack.pairs), stack.pairs[0].b.device
            wide = torch.promote_types(self.dtype, stack.dtype) if self.dtype == torch.float32 else self.dtype
            shapes = {"exp_avg": ((stack.out, stack.inner), wide)}
            if self.factored:
                shapes |= {"row": ((stack.out, 1), stack.dtype), "column": ((1, stack.inner), stack.dtype)}
            else:
                shapes["exp_avg_sq"] = ((stack.out, stack.inner), stack.dtype)
            made = {name: torch.zeros(k, *shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
            made["step"] = torch.zeros(k)
            for i, pair in enumerate(stack.pairs):
                state: dict[str, Any] = self.optimizer.state[pair.b]
                for name, whole in made.items():
                    if name in state:
                        whole[i].copy_(state[name])
                    state[name] = whole[i]
            self.held[key] = made
        return self.held[key]

    def direction(
        self, stack: Stack, a: Tensor, b: Tensor, s: Tensor, for_a: Tensor, for_b: Tensor, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """s Bᵀ u (k, r, in) and s u Aᵀ (k, out, r), zero for pairs without a gradient; the moments take up g."""
        moments = self.of(stack)
        left, right = s * torch.cat([b, for_b], 2), torch.cat([for_a, a], 1)
        of_a, of_b = torch.zeros_like(a), torch.zeros_like(b)
        for layers in _runs(stack):
            moments["step"][layers] += 1
            corrections = self._corrections(moments["step"][layers], group, a)
            if self.factored:
                self._square_means(moments, left, right, layers, group["betas"][1])
            for part, rows in _blocks(layers, stack.out, stack.inner):
                inside = slice(part.start - layers.start, part.stop - layers.start)
                u = left[part, rows] @ right[part]
                first, second = (each[inside] for each in corrections)
                self._adam(u, {name: held[part] for name, held in moments.items()}, rows, first, second, group)
                of_a[part] += b[part, rows].mT @ u
                of_b[part, rows] = u @ a[part].mT
        return s * of_a, s * of_b

    def _corrections(self, steps: Tensor, group: dict[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
        """1 - beta1^t and sqrt(1 - beta2^t), (k, 1, 1)"""
        first, second = (1 - torch.pow(beta, steps.double()) for beta in group["betas"])
        return tuple(c.to(like.dtype).to(like.device, non_blocking=True).view(-1, 1, 1) for c in (first, second.sqrt()))  # type: ignore[return-value]

    def _square_means(
        self, moments: dict[str, Tensor], left: Tensor, right: Tensor, layers: slice, beta: float
    ) -> None:
        column = torch.zeros_like(moments["column"][layers])
        for part, rows in _blocks(layers, left.shape[1], right.shape[2]):
            squares = (left[part, rows] @ right[part]).square_()
            moments["row"][part, rows].lerp_(squares.mean(2, keepdim=True), 1 - beta)
            column[part.start - layers.start : part.stop - layers.start] += squares.sum(1, keepdim=True)
        moments["column"][layers].lerp_(column / left.shape[1], 1 - beta)

    def _adam(
        self, g: Tensor, held: dict[str, Tensor], rows: slice, first: Tensor, second: Tensor, group: dict[str, Any]
    ) -> None:
        """g (k, rows, in) becomes u."""
        (beta1, beta2), m = group["betas"], held["exp_avg"][:, rows]
        if self.factored:
            row, column = held["row"], held["column"]
            scale = row[:, rows] / row.mean(1, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny)
            size = (scale * column).sqrt_()
        else:
            v = held["exp_avg_sq"][:, rows].mul_(beta2).addcmul_(g, g, value=1 - beta2)
            size = v.sqrt()
        if m.dtype == g.dtype:
            m.lerp_(g, 1 - beta1)
            torch.div(m, size.div_(second).add_(group["eps"]).mul_(first), out=g)
        else:
            wide = m.to(g.dtype).lerp_(g, 1 - beta1)
            m.copy_(wide)
            torch.div(wide, size.div_(second).add_(group["eps"]).mul_(first), out=g)


def _runs(stack: Stack) -> Iterator[slice]:
    """Neighbours in the stack that have gradients."""
    start = None
    for i, pair in enumerate([*stack.pairs, None]):
        moves = pair is not None and (pair.a.grad is not None or pair.b.grad is not None)
        if moves and start is None:
            start = i
        elif not moves and start is not None:
            yield slice(start, i)
            start = None


def _blocks(layers: slice, out: int, inner: int) -> Iterator[tuple[slice, slice]]:
    """(layers, rows) of at most about BLOCK numbers: some whole layers, or some rows of one."""
    several = max(1, BLOCK // (out * inner))
    height = out if several > 1 else max(1, min(out, BLOCK // inner))
    for i in range(layers.start, layers.stop, several):
        for top in range(0, out, height):
            yield slice(i, min(i + several, layers.stop)), slice(top, min(top + height, out))
