"""APOLLO and APOLLO-Mini against their equations."""

from __future__ import annotations

import pytest
import torch
from steps import drawn, elements, take
from torch import nn

from fallow.optim.apollo import APOLLO, APOLLOMini


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (8, 8)], ids=str)
def test_in_the_first_step_every_column_of_the_long_side_moves_along_its_gradient_by_adams_length(shape):
    (grad,) = drawn(shape, 1, dtype=torch.float64)
    param = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    own = APOLLO([param], 1e-2, 3, eps=1e-16)
    moved = take(own, param, [grad])
    (site,) = own.sites()
    g, moved = (grad, moved) if shape[0] < shape[1] else (grad.mT, moved.mT)
    r = site.group["basis"].matrix(site).mT @ g
    torch.testing.assert_close(moved, -1e-2 * 3**0.5 / r.norm(dim=0) * g, rtol=1e-5, atol=1e-9)


def test_only_the_seed_of_the_projection_is_kept_and_it_changes_with_the_refresh():
    param = nn.Parameter(torch.zeros(8, 20))
    own = APOLLO([param], 1e-2, 3, refresh_every=2)
    seeds = []
    for grad in drawn((8, 20), 5):
        take(own, param, [grad])
        seeds.append(own.state[param]["seed"])
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3] != seeds[4]
    assert elements(own, param) == 2 * 3 * 20 + 1
    (site,) = own.sites()
    basis = site.group["basis"]
    assert torch.equal(basis.matrix(site), basis.matrix(site))


def test_the_projection_keeps_the_norm_of_a_column_on_average():
    sizes = []
    for seed in range(200):
        param = nn.Parameter(torch.zeros(16, 40))
        own = APOLLO([param], 1e-2, 4, seed=seed)
        take(own, param, [torch.ones(16, 40)])
        (site,) = own.sites()
        sizes.append(float((site.group["basis"].matrix(site).mT @ torch.ones(16)).square().sum()) / 16)
    assert abs(sum(sizes) / 200 - 1) < 0.15


def test_the_update_grows_by_at_most_the_limit():
    param = nn.Parameter(torch.zeros(8, 20))
    own = APOLLO([param], 1.0, 3, inner={"name": "sgdm", "momentum": 0.0})  # scales of 1
    (grad,) = drawn((8, 20), 1)
    first, second = take(own, param, [grad]).norm(), take(own, param, [50 * grad]).norm()
    assert abs(float(second / first) - 1.01) < 1e-4


@pytest.mark.parametrize("front", [False, True])
def test_mini_scales_the_whole_matrix_by_one_number(front):
    (grad,) = drawn((8, 20), 1, dtype=torch.float64)
    param = nn.Parameter(torch.zeros(8, 20, dtype=torch.float64))
    own = APOLLOMini([param], 1e-2, eps=1e-16, front=front)
    moved = take(own, param, [grad])
    (site,) = own.sites()
    r = site.group["basis"].matrix(site).mT @ grad
    torch.testing.assert_close(moved, -1e-2 * 128**0.5 * 20**0.5 / r.norm() * grad, rtol=1e-6, atol=1e-10)
    assert elements(own, param) == 2 * 20 + 1
    size = float(own.state[param]["norm"]) / float(moved.norm()) * 1e-2
    correction = (1 - 0.999) ** 0.5 / (1 - 0.9)
    assert abs(size * correction * (1 if front else 128**0.5) - 1) < 1e-6
