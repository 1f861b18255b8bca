"""The momentum that an optimizer keeps for a parameter, whatever it calls it, and a step along it of a given length."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fallow.core.errors import ConfigError
from fallow.core.states8bit import AdamW8bit

KEYS = ("exp_avg", "momentum_buffer")


def momentum_of(optimizer: torch.optim.Optimizer, param: Tensor) -> Tensor | None:
    """In the shape of the parameter; None where it has no state yet. ConfigError where the state holds no momentum."""
    state = optimizer.state.get(param)
    if not state:
        return None
    if isinstance(optimizer, AdamW8bit):
        return optimizer._moments(param)[0]
    for key in KEYS:
        held = state.get(key)
        if isinstance(held, Tensor) and held.shape == param.shape:
            return held
    raise no_momentum(optimizer)


class Ahead:
    """Directions of the length sign rho / g, g the running mean of gradient norms, which starts at the first of them.

    1 / g is capped at `cap` times what it was at first, or the step would grow without end as gradients vanish.
    """

    def __init__(self, rho: float, sign: int, beta: float, cap: float) -> None:
        self.rho, self.sign, self.beta, self.cap = rho, sign, beta, cap
        self.norms: dict[str, Tensor] = {}  # g, by what it is the norm of
        self.first: dict[str, Tensor] = {}

    def follow(self, squares: Mapping[str, Tensor]) -> None:
        """Take up the squared norms of a step's gradients."""
        for name, square in squares.items():
            norm = square.sqrt()
            self.first.setdefault(name, norm)
            self.norms[name] = torch.lerp(norm, self.norms.get(name, norm), self.beta)

    def knows(self, name: str) -> bool:
        """Whether there is a step to make: from the second on."""
        return self.rho > 0 and name in self.norms

    def factor(self, name: str, length: Tensor) -> Tensor:
        """What to multiply a direction of this length with."""
        norm = torch.maximum(self.norms[name], self.first[name] / self.cap) * length
        return torch.where(norm > 0, self.sign * self.rho / norm, 0)


def no_momentum(optimizer: torch.optim.Optimizer) -> ConfigError:
    return ConfigError(
        f"mode='mgpo' needs the momentum of each factor, and {type(optimizer).__name__} keeps none; take AdamW, SGD "
        "with momentum or another that has one, or mode='ggpo'"
    )
