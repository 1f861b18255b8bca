"""What optimizers that know factor pairs share: which pairs a group holds, and plain rules for everything else.

    g = dL/dA, dL/dB of a stack of pairs  ->  the rule's own directions  ->  A, B
    g of a parameter that is in no pair   ->  AdamW, or SGD

Each is a `torch.optim.Optimizer`: param groups with their own rates, closures, schedulers, GradScaler, `state_dict` of
plain tensors. Under accumulation, clipping and DDP the gradients are those that `step()` finds, at the very A and B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fallow.core.delta import number
from fallow.core.errors import ConfigError
from fallow.optim.pairs import Pair, Stack, find_pairs, stacked


@dataclass
class Arranged:
    """A param group as a rule sees it."""

    group: dict[str, Any]
    stacks: list[Stack]
    others: list[nn.Parameter]


class PairedOptimizer(torch.optim.Optimizer):
    """Finds the pairs of `model` in the groups; a subclass writes `update`. `params`: None for all that require a
    gradient; tensors or groups otherwise, where a group holds both factors of a pair or neither.
    """

    def __init__(self, model: nn.Module, params: Iterable[Any] | None, defaults: dict[str, Any]) -> None:
        check_rates(type(self).__name__, defaults)
        self.pairs = find_pairs(model, type(self).__name__)
        self._arranged: list[Arranged] | None = None
        super().__init__(model_parameters(model) if params is None else params, defaults)
        if not any(each.stacks for each in self.arranged):
            raise ConfigError(f"params= of {type(self).__name__} holds no LoRA factor; give both A and B of a pair")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. ConfigError for a group with one factor of a pair only."""
        super().add_param_group(param_group)
        self._arranged = None
        held = {id(param) for param in self.param_groups[-1]["params"]}
        for pair in self.pairs:
            if (id(pair.a) in held) != (id(pair.b) in held):
                self.param_groups.pop()
                raise ConfigError(
                    f"{type(self).__name__} needs A and B of '{pair.name}' in the same param group, for it moves them "
                    "together"
                )
        check_rates(type(self).__name__, self.param_groups[-1])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._arranged = None

    @property
    def arranged(self) -> list[Arranged]:
        """The groups, sorted once."""
        if self._arranged is None:
            self._arranged = []
            for group in self.param_groups:
                held = {id(param) for param in group["params"]}
                own = [pair for pair in self.pairs if id(pair.a) in held]
                paired = {id(param) for pair in own for param in (pair.a, pair.b)}
                others = [param for param in group["params"] if id(param) not in paired]
                self._arranged.append(Arranged(group, stacked(own), others))
        return self._arranged

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of what has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    def update(self) -> None:
        """Move the parameters of `self.arranged`."""
        raise ConfigError(f"{type(self).__name__} does not write update()")

    def adam(self, group: dict[str, Any], params: Sequence[Tensor], grads: Sequence[Tensor], decay: float) -> None:
        """AdamW on these gradients, with moments of each parameter's own; decoupled `decay`."""
        states = [self._moments(param) for param in params]
        if not params:
            return
        beta1, beta2 = group["betas"]
        adamw(
            list(params), [grad.to(param.dtype) for grad, param in zip(grads, params, strict=True)],
            [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [],
            [state["step"] for state in states], foreach=True, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=group["lr"], eps=group["eps"], weight_decay=decay, maximize=False,
        )  # fmt: skip

    def _moments(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        return state


def descend(params: list[Tensor], grads: Sequence[Tensor], lr: float, decay: float = 1.0) -> None:
    """p <- decay p - lr g"""
    if not params:
        return
    if decay != 1.0:
        torch._foreach_mul_(params, decay)
    steps = [grad.to(param.dtype) for grad, param in zip(grads, params, strict=True)]
    torch._foreach_add_(params, steps, alpha=-lr)


def unstacked(stack: Stack, grad_a: Tensor, grad_b: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of a stack with gradients (k, r, in) and (k, out, r), in their own shapes; those alone whose pair
    has a gradient.
    """
    params: list[Tensor] = []
    grads: list[Tensor] = []
    for pair, of_a, of_b in zip(stack.pairs, grad_a, grad_b, strict=True):
        if has_gradient(pair):
            params += [pair.a, pair.b]
            grads += [of_a.view(pair.a.shape), of_b.view(pair.b.shape)]
    return params, grads


def has_gradient(pair: Pair) -> bool:
    return pair.a.grad is not None or pair.b.grad is not None


def moving(params: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those that have a gradient, with it."""
    found = [(param, param.grad) for param in params if param.grad is not None]
    return [param for param, _ in found], [grad for _, grad in found]


def model_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def check_rates(rule: str, given: dict[str, Any]) -> None:
    """ConfigError, by name, for what AdamW cannot take."""
    for name in ("lr", "eps", "weight_decay"):
        if name in given and not isinstance(given[name], Tensor):  # a rate may be a tensor
            number(f"{name} of {rule}", given[name])
    betas = given.get("betas", (0.0, 0.0))
    if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        raise ConfigError(f"betas={betas!r} of {rule} must be two numbers from 0 to below 1, like (0.9, 0.999)")
