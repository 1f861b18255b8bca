"""Lion (arXiv 2302.06675): the sign of a momentum as the step, with one buffer for each value instead of AdamW's two.

    u = sign(beta1 m + (1 - beta1) g)      w -= lr (u + weight_decay w)      m = beta2 m + (1 - beta2) g

Every value moves by lr in each step, so rates are 3 to 10 times smaller than AdamW's, and weight decay as much larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fallow.core.errors import ConfigError


class Lion(torch.optim.Optimizer):
    """A torch optimizer; `params`: tensors or groups. ConfigError for an lr, beta or decay that cannot be."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if not 0 <= lr < float("inf"):
            raise ConfigError(f"lr={lr} of Lion must be a number >= 0")
        if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise ConfigError(f"betas={betas} of Lion must be two numbers from 0 to below 1, like [0.9, 0.99]")
        if not 0 <= weight_decay < float("inf"):
            raise ConfigError(f"weight_decay={weight_decay} of Lion must be a number >= 0")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update, in a few kernels over all tensors of a group together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [(param, param.grad) for param in group["params"] if param.grad is not None and param.numel()]
            if not moving:
                continue
            params, grads = [param for param, _ in moving], [grad for _, grad in moving]
            for param in params:
                if "exp_avg" not in self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param)
            averages = [self.state[param]["exp_avg"] for param in params]
            (beta1, beta2), lr = group["betas"], group["lr"]
            updates = torch._foreach_lerp(averages, grads, 1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-lr)
            torch._foreach_lerp_(averages, grads, 1 - beta2)
        return loss
