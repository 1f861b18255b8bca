"""LoRA-Pro: A and B move so that W moves as close as possible to where full fine-tuning would have moved it.

"LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", arXiv 2407.18242. With W' = W + s B A, g (out, in) the gradient
of W', never formed, a = s Bᵀ g (r, in) and b = s g Aᵀ (out, r) those of A and B, the directions

    g_A = (BᵀB)⁻¹ a / s² + X A      g_B = (I - B (BᵀB)⁻¹ Bᵀ) b (A Aᵀ)⁻¹ / s² - B X

minimise |s (B g_A + g_B A) - g| whatever X (r, r): what W moves by is P_B g + (I - P_B) g P_A. `balance` chooses X:

    sylvester   BᵀB X + X A Aᵀ = -(BᵀB)⁻¹ a Aᵀ / s²: nearest to a and b
    symmetry    X = -(BᵀB)⁻¹ Bᵀ b (A Aᵀ)⁻¹ / 2 s²: both factors give equal parts of what both can reach
    zero        X = 0

`mode`: "full", AdamW's moments of W's own gradient P_B g + (I - P_B) g P_A, whose direction is then brought back to A
and B by the same theorem (2 out in numbers a layer); "efficient", AdamW's moments of g_A and g_B; "sgd".

Departures: s is read from each layer, where the official code has 16/8; bias correction starts at step 1, not 2;
inverses are damped relative to their matrix (`damping` times its mean eigenvalue), so that small rates and narrow
layers are treated like others; weight decay multiplies A and B by sqrt(1 - lr decay), so their product by 1 - lr decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fallow.core.delta import number, one_of
from fallow.core.errors import TrainingError
from fallow.optim.paired import Arranged, PairedOptimizer, descend, has_gradient, moving, unstacked
from fallow.optim.pairs import Stack
from fallow.optim.weight_moments import WeightMoments

Mode = Literal["full", "efficient", "sgd"]
Balance = Literal["sylvester", "symmetry", "zero"]


@dataclass(frozen=True)
class Grams:
    """Of stacked factors: eigenvalues (k, r) and vectors (k, r, r) of BᵀB and A Aᵀ, and the damped inverses (k, r, r);
    float64 where the device has it.
    """

    of_b: Tensor
    vectors_b: Tensor
    of_a: Tensor
    vectors_a: Tensor
    inverse_b: Tensor
    inverse_a: Tensor


def grams(a: Tensor, b: Tensor, damping: float) -> Grams:
    """One batched decomposition of all. Where a matrix is zero its inverse is zero: B = 0 leaves A where it is."""
    both = torch.cat([b.mT @ b, a @ a.mT])
    both = both if a.device.type == "mps" else both.double()
    try:
        values, vectors = torch.linalg.eigh(both)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise TrainingError("LoRA-Pro: a LoRA factor holds NaN or infinite values; lower the learning rate") from None
    values = values.clamp_min(0)
    damped = values + damping * values.mean(-1, keepdim=True)
    cut = torch.finfo(values.dtype).eps * values.shape[-1] * values[..., -1:]
    inverses = (vectors * torch.where(damped > cut, 1 / damped, 0).unsqueeze(-2)) @ vectors.mT
    (of_b, of_a), (vectors_b, vectors_a) = values.chunk(2), vectors.chunk(2)
    return Grams(of_b, vectors_b, of_a, vectors_a, *inverses.chunk(2))


def adjusted(
    a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, s: Tensor, known: Grams, balance: Balance
) -> tuple[Tensor, Tensor]:
    """g_A (k, r, in) and g_B (k, out, r) of the factors a, b and their gradients; s (k, 1, 1)."""
    inverse_a, inverse_b = known.inverse_a.to(a.dtype), known.inverse_b.to(a.dtype)
    for_a = inverse_b @ grad_a / s**2
    inner = b.mT @ grad_b
    for_b = (grad_b - b @ (inverse_b @ inner)) @ inverse_a / s**2
    if balance == "zero":
        return for_a, for_b
    if balance == "symmetry":
        x = -0.5 * (inverse_b @ inner @ inverse_a) / s**2
    else:
        right = known.vectors_b.mT @ -(for_a @ a.mT).to(known.of_a.dtype) @ known.vectors_a
        sums = known.of_b.unsqueeze(-1) + known.of_a.unsqueeze(-2)
        x = (known.vectors_b @ torch.where(sums > 0, right / sums, 0) @ known.vectors_a.mT).to(a.dtype)
    return for_a + x @ a, for_b - b @ x


@dataclass
class Found:
    """A stack in the middle of a step."""

    arranged: Arranged
    stack: Stack
    a: Tensor
    b: Tensor
    s: Tensor
    known: Grams
    directions: tuple[Tensor, Tensor]


class LoRAPro(PairedOptimizer):
    """Trains the LoRA factors of `model`, ours or PEFT's, by LoRA-Pro, and everything else that is trained by AdamW
    (with mode="sgd" by SGD).

    `lr`: that of full fine-tuning. `mode`, `balance`: see the module. `max_norm`: clip by the norm of what W would move
    by, over all pairs, with the gradients of everything else; clipping the gradients themselves beforehand is not the
    same. `damping`: of the inverses, relative. In mode "full": `factored=True` keeps the second moment as row and
    column means (out + in numbers in place of out in), `momentum_dtype` torch.bfloat16 halves the first. `params`:
    tensors or groups, None for all in training. ConfigError where there is no LoRA or a value cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 2e-5,
        *,
        mode: Mode = "full",
        balance: Balance = "sylvester",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
        max_norm: float | None = None,
        factored: bool = False,
        momentum_dtype: torch.dtype = torch.float32,
        params: Iterable[Any] | None = None,
    ) -> None:
        one_of("mode", mode, get_args(Mode))
        one_of("balance", balance, get_args(Balance))
        one_of("factored", factored, (False,) if mode != "full" else (False, True))
        one_of("momentum_dtype", momentum_dtype, (torch.float32,) + ((torch.bfloat16,) if mode == "full" else ()))
        number("damping", damping, most=1.0)
        if max_norm is not None:
            number("max_norm", max_norm, open_below=True)
        self.mode, self.balance, self.damping, self.max_norm = mode, balance, damping, max_norm
        self.moments = WeightMoments(self, factored, momentum_dtype)
        super().__init__(model, params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.moments.reload()

    def update(self) -> None:
        found = [self._look(each, stack) for each in self.arranged for stack in each.stacks]
        found = [one for one in found if any(map(has_gradient, one.stack.pairs))]
        factor = self._clip(found)
        for one in found:
            of_a, of_b = one.directions if factor is None else (g * factor for g in one.directions)
            group = one.arranged.group
            decay = math.sqrt(1 - group["lr"] * group["weight_decay"])
            if self.mode == "full":
                of_a, of_b = self.moments.direction(one.stack, one.a, one.b, one.s, of_a, of_b, group)
                of_a, of_b = adjusted(one.a, one.b, of_a, of_b, one.s, one.known, self.balance)
            params, grads = unstacked(one.stack, of_a, of_b)
            if self.mode == "efficient":
                torch._foreach_mul_(params, decay)
                self.adam(group, params, grads, 0.0)
            else:
                descend(params, grads, group["lr"], decay)
        for each in self.arranged:
            params, grads = moving(each.others)
            grads = grads if factor is None else [grad * factor.to(grad.dtype) for grad in grads]
            if self.mode == "sgd":
                descend(params, grads, each.group["lr"], 1 - each.group["lr"] * each.group["weight_decay"])
            else:
                self.adam(each.group, params, grads, each.group["weight_decay"])

    def _look(self, arranged: Arranged, stack: Stack) -> Found:
        (a, b), gradients, s = stack.factors(), stack.gradients(), stack.scales()
        known = grams(a, b, self.damping)
        balance: Balance = "zero" if self.mode == "full" else self.balance  # X cancels in what W moves by
        return Found(arranged, stack, a, b, s, known, adjusted(a, b, *gradients, s, known, balance))

    def _clip(self, found: list[Found]) -> Tensor | None:
        """What to multiply all directions by: |s (B g_A + g_B A)|² is <a, g_A> + <b, g_B>."""
        if self.max_norm is None:
            return None
        squares = []
        for one in found:
            raw_a, raw_b = one.stack.gradients()
            squares.append((raw_a * one.directions[0]).sum() + (raw_b * one.directions[1]).sum())
        _, rest = moving(param for each in self.arranged for param in each.others)
        squares += [grad.float().square().sum() for grad in rest]
        norm = torch.stack([square.float().to(squares[0].device) for square in squares]).sum().clamp_min(0).sqrt()
        return (self.max_norm / (norm + 1e-6)).clamp_max(1.0)
