"""GaLore and Q-GaLore: the checks of their specification that the core's tests do not make already."""

from __future__ import annotations

import pytest
import torch
from steps import drawn, elements, state_bytes, take
from torch import nn

from fallow.optim.galore import GaLore
from fallow.optim.lowrank import LowRank
from fallow.optim.q_galore import QGaLore


def test_the_defaults_are_the_papers():
    (group,) = GaLore([nn.Parameter(torch.randn(4, 5))]).param_groups
    assert (group["lr"], group["rank"], group["scale"], group["refresh_every"]) == (0.01, 128, 0.25, 200)
    assert group["residual"].name == "drop"
    assert group["moments"] == "keep"


def test_projected_weights_move_at_the_scale_and_plain_ones_at_the_rate():
    matrix, bias = nn.Parameter(torch.zeros(8, 12)), nn.Parameter(torch.zeros(8))
    own = GaLore([matrix, bias], rank=2, eps=0.0)
    matrix.grad, bias.grad = torch.randn(8, 12), torch.randn(8)
    own.step()
    torch.testing.assert_close(bias.detach().abs(), torch.full((8,), 0.01))
    p = own.state[matrix]["basis"]
    torch.testing.assert_close((p.mT @ matrix.detach()).abs(), torch.full((2, 12), 0.0025), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (8, 8)], ids=str)
def test_with_plain_sgd_a_gradient_of_the_basis_rank_is_applied_whole(shape):
    left, right = drawn((shape[0], 3), 1)[0], drawn((3, shape[1]), 1, seed=1)[0]
    param = nn.Parameter(torch.zeros(shape))
    own = GaLore([param], 1.0, 3, basis="svd", scale=1.0, inner={"name": "sgdm", "momentum": 0.0})
    moved = take(own, param, [left @ right])
    torch.testing.assert_close(moved, -(left @ right), rtol=1e-4, atol=1e-4)


def test_adam_in_a_turned_basis_is_not_adam():
    param, other = nn.Parameter(torch.zeros(6, 9)), nn.Parameter(torch.zeros(6, 9))
    grads = drawn((6, 9), 3)
    take(GaLore([param], 1e-2, 5, scale=1.0), param, grads)
    take(torch.optim.AdamW([other], 1e-2, weight_decay=0), other, grads)
    assert (param - other).abs().max() > 1e-3


def test_states_of_eight_bits_are_as_small_as_promised():
    param = nn.Parameter(torch.zeros(64, 160))
    full, small, quantized = (cls([param], 1e-3, 32, **options) for cls, options in (
        (GaLore, {}), (GaLore, {"state_dtype": "8bit"}), (QGaLore, {}),
    ))  # fmt: skip
    for optimizer in (full, small, quantized):
        take(optimizer, param, drawn((64, 160), 1))
    r, d, n = 32, 64, 160
    assert elements(full, param) == r * (d + 2 * n)
    assert state_bytes(small, param) == 2 * r * n * (1 + 4 / 256) + 2 * r * d
    assert state_bytes(small, param) <= 0.45 * state_bytes(full, param)
    assert state_bytes(quantized, param) <= 2 * r * n * (1 + 4 / 256) + 0.6 * r * d


@pytest.mark.parametrize("form", ["int8", "nf4", "bf16"])
def test_a_small_basis_stands_for_nearly_the_same_space(form):
    grads = drawn((48, 96), 3)
    exact, small = nn.Parameter(torch.zeros(48, 96)), nn.Parameter(torch.zeros(48, 96))
    own = LowRank([exact], 1e-2, 8, basis="svd")
    other = LowRank([small], 1e-2, 8, basis="svd", basis_dtype=form)
    take(own, exact, grads)
    take(other, small, grads)
    (site,) = other.sites()
    p, q = own.state[exact]["basis"], site.group["basis"].matrix(site)
    within = (p.mT @ torch.linalg.qr(q)[0]).square().sum() / 8
    assert within > {"int8": 0.9999, "bf16": 0.9999, "nf4": 0.98}[form]


def test_the_gap_of_a_space_that_stays_doubles_in_q_galore():
    param = nn.Parameter(torch.zeros(12, 20))
    own = QGaLore([param], 1e-2, 2, refresh_every=2)
    grad = drawn((12, 2), 1)[0] @ drawn((2, 20), 1, seed=1)[0]
    take(own, param, [grad + 0.01 * noise for noise in drawn((12, 20), 9)])
    assert own.state[param]["gap"] == 16


@pytest.mark.parametrize("shape", [(40, 2100), (2100, 40)], ids=str)
@pytest.mark.parametrize("residual", ["drop", "fira", "sgd"])
def test_products_in_bfloat16_move_the_weight_nearly_alike(shape, residual):
    grads = drawn(shape, 3)
    exact, fast = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
    take(LowRank([exact], 1e-2, 8, basis="svd", residual=residual), exact, grads)
    own = LowRank([fast], 1e-2, 8, basis="svd", residual=residual, products="bf16")
    take(own, fast, grads)
    assert own.state[fast]["m"].dtype == fast.dtype == torch.float32
    assert 0 < (fast - exact).norm() / exact.norm() < 0.05
