"""The basis on both sides of a matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fallow.core.errors import ConfigError
from fallow.optim.lowrank import LowRank


def drawn(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_a_first_step_moves_by_what_both_bases_see(shape: tuple[int, int]) -> None:
    param = nn.Parameter(drawn(shape, 0))
    before, param.grad = param.detach().clone(), drawn(shape, 1)
    u, _, vh = torch.linalg.svd(param.grad)
    optimizer = LowRank([param], lr=0.1, rank=2, basis="two-sided", eps=1e-6)
    optimizer.step()
    p, q = optimizer.state[param]["basis"].split(sorted(shape))
    left, right = (q, p) if shape[0] >= shape[1] else (p, q)  # along the rows of W, and along its columns
    for own, exact in ((left, u[:, :2]), (right, vh[:2].mT)):
        torch.testing.assert_close(own @ own.mT, exact @ exact.mT, atol=1e-9, rtol=0)
    seen = left.mT @ param.grad @ right  # diagonal on the first step: off it eps keeps rounding from becoming a step
    expected = before - 0.1 * left @ (seen / (seen.abs() + 1e-6)) @ right.mT
    torch.testing.assert_close(param.detach(), expected, atol=1e-8, rtol=0)
    assert optimizer.state[param]["m"].shape == (2, 2)


def test_sgd_on_both_sides_and_its_residual_together_are_plain_sgd() -> None:
    param = nn.Parameter(drawn((5, 8), 0))
    plain = param.detach().clone()
    inner = {"name": "sgdm", "momentum": 0.0}
    optimizer = LowRank([param], lr=0.1, rank=2, basis="two-sided", inner=inner, residual="sgd", refresh_every=2)
    for seed in range(1, 6):
        param.grad = drawn((5, 8), seed)
        plain -= 0.1 * param.grad
        optimizer.step()
    torch.testing.assert_close(param.detach(), plain, atol=1e-12, rtol=0)


def test_moments_of_an_unchanged_space_survive_a_rotation() -> None:
    param = nn.Parameter(drawn((6, 9), 0))
    gradient = drawn((6, 2), 1) @ drawn((2, 9), 2)
    optimizer = LowRank([param], lr=0.0, rank=2, basis="two-sided", refresh_every=1, moments="rotate")
    seen = []
    for _ in range(3):
        param.grad = gradient.clone()
        optimizer.step()
        p, q = optimizer.state[param]["basis"].split((6, 9))
        seen.append(p @ optimizer.state[param]["m"] @ q.mT / (1 - 0.9 ** (len(seen) + 1)))
    for one in seen:
        torch.testing.assert_close(one, gradient, atol=1e-9, rtol=0)


def test_rules_that_scale_single_columns_are_refused_with_it() -> None:
    with pytest.raises(ConfigError, match="two-sided"):
        LowRank([nn.Parameter(drawn((5, 8), 0))], rank=2, basis="two-sided", residual="fira")
