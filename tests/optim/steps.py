"""What the tests of optimizers share: gradients by hand, steps, and the numbers that are kept."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def drawn(shape: tuple[int, ...], count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Gaussian gradients of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) * (1 + i % 3) for i in range(count)]


def take(optimizer: torch.optim.Optimizer, param: nn.Parameter, grads: Iterable[Tensor]) -> Tensor:
    """A step with each gradient; returns what the last one has changed."""
    before = param.detach().clone()
    for grad in grads:
        before.copy_(param.detach())
        param.grad = grad.clone()
        optimizer.step()
    return param.detach() - before


def kept(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> dict[str, Tensor]:
    """The tensors among the states of a parameter."""
    return {key: value for key, value in optimizer.state[param].items() if isinstance(value, Tensor)}


def elements(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> int:
    return sum(value.numel() for value in kept(optimizer, param).values())


def state_bytes(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> int:
    return sum(value.nbytes for value in kept(optimizer, param).values())
