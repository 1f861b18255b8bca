"""Riemannian preconditioning: the gradient of each factor is divided by the Gram matrix of the other.

"Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", arXiv 2402.02347. W' = W + s B A:

    g_A = (BᵀB + damping I)⁻¹ dA      g_B = dB (A Aᵀ + damping I)⁻¹

then AdamW's moments of these ("scaled AdamW"), or plain descent. A baseline of LoRA-Pro, whose directions without
balance are these, with the part of g_B left out that A moves already. s is not in the formula, as in the paper:
absorbed by `lr`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fallow.core.delta import number, one_of
from fallow.core.errors import TrainingError
from fallow.optim.paired import PairedOptimizer, descend, has_gradient, moving, unstacked

Rule = Literal["adamw", "sgd"]


def preconditioned(a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """g_A (k, r, in) and g_B (k, out, r) of the factors a, b and their gradients."""
    return _divided(b.mT @ b, grad_a, damping), _divided(a @ a.mT, grad_b.mT, damping).mT


def _divided(gram: Tensor, right: Tensor, damping: float) -> Tensor:
    """(gram + damping I)⁻¹ right; the inverse in float64 where the device has it."""
    wide = gram if gram.device.type == "mps" else gram.double()
    unit = torch.eye(gram.shape[-1], dtype=wide.dtype, device=gram.device)
    try:
        inverse = torch.linalg.inv(wide + damping * unit)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise TrainingError(
            "Riemannian: a factor's Gram matrix has no inverse: values are no numbers, or damping= is too small"
        ) from None
    return inverse.to(right.dtype) @ right


class Riemannian(PairedOptimizer):
    """Trains the LoRA factors of `model`, ours or PEFT's, by preconditioned gradients, the rest by the plain rule.

    `rule`: "adamw" or "sgd". `weight_decay`: decoupled. `damping`: the official code's 1e-6 unless given; absolute.
    `params`: tensors or groups, None for all in training. ConfigError where there is no LoRA or a value cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        *,
        rule: Rule = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
        params: Iterable[Any] | None = None,
    ) -> None:
        one_of("rule", rule, get_args(Rule))
        number("damping", damping, open_below=True)
        self.rule, self.damping = rule, damping
        super().__init__(model, params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self) -> None:
        for each in self.arranged:
            params, grads = moving(each.others)
            for stack in each.stacks:
                if any(map(has_gradient, stack.pairs)):
                    found = unstacked(stack, *preconditioned(*stack.factors(), *stack.gradients(), self.damping))
                    params, grads = params + found[0], grads + found[1]
            decay = each.group["weight_decay"]
            if self.rule == "adamw":
                self.adam(each.group, params, grads, decay)
            else:
                descend(params, grads, each.group["lr"], 1 - each.group["lr"] * decay)
