"""Fira: the checks of its specification that the core's tests do not make already."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from steps import drawn, elements, take
from torch import nn

from fallow.optim.fira import Fira
from fallow.optim.galore import GaLore
from fallow.optim.residuals.limiter import limited


def made(shape, rank=3, **options):
    param = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    return param, Fira([param], 1e-2, rank, **{"scale": 1.0, "basis": "svd", **options})


def test_the_update_has_adams_part_within_the_basis_and_the_scaled_rest_outside():
    grads = drawn((6, 15), 4, dtype=torch.float64)
    param, own = made((6, 15))
    other = nn.Parameter(torch.zeros(6, 15, dtype=torch.float64))
    take(own, param, grads[:3])
    plain = GaLore([other], 1e-2, 3, scale=1.0, basis="svd")
    take(plain, other, grads[:3])
    moved, moved_plain = take(own, param, grads[3:]), take(plain, other, grads[3:])
    p = own.state[param]["basis"]
    torch.testing.assert_close(p @ (p.mT @ moved), moved_plain, rtol=0, atol=1e-10)
    outside = moved - moved_plain
    rest = grads[3] - p @ (p.mT @ grads[3])
    ratios = outside.norm(dim=0) / rest.norm(dim=0)
    torch.testing.assert_close(outside, -ratios * rest, rtol=0, atol=1e-10)
    assert torch.linalg.matrix_rank(moved) == 6


@pytest.mark.parametrize("shape", [(6, 15), (15, 6)], ids=str)
def test_in_the_first_step_the_rest_moves_as_far_as_adam_would(shape):
    (grad,) = drawn(shape, 1, dtype=torch.float64)
    param, own = made(shape, eps=1e-16)
    moved = take(own, param, [grad])
    g, moved = (grad, moved) if shape[0] < shape[1] else (grad.mT, moved.mT)
    p = own.state[param]["basis"]
    r = p.mT @ g
    rest, outside = g - p @ r, moved - p @ (p.mT @ moved)
    wanted = 1e-2 * 3**0.5 * rest.norm(dim=0) / r.norm(dim=0)
    torch.testing.assert_close(outside.norm(dim=0), wanted, rtol=1e-4, atol=0)


def test_the_rest_grows_by_at_most_the_limit_and_falls_freely():
    (grad,) = drawn((6, 15), 1, dtype=torch.float64)
    param, own = made((6, 15), inner={"name": "sgdm", "momentum": 0.0})  # phi is 1
    norms = []
    for scale in (1, 50, 50, 0.1, 50):
        take(own, param, [grad * scale])
        norms.append(float(own.state[param]["norm"]))
    growth = [b / a for a, b in pairwise(norms)]
    assert max(growth) <= 1.01 + 1e-6
    assert abs(growth[0] - 1.01) < 1e-6
    assert growth[2] < 0.5


def test_after_a_gradient_of_zero_the_rest_moves_at_once():
    param, own = made((6, 15), refresh_every=1)
    (grad,) = drawn((6, 15), 1, dtype=torch.float64)
    moved = take(own, param, [torch.zeros(6, 15, dtype=torch.float64), grad])
    p = own.state[param]["basis"]
    assert (moved - p @ (p.mT @ moved)).norm() > 1e-3
    last = torch.zeros(())
    assert float(limited(torch.tensor(3.0), last, 1.01)) == 1
    assert float(last) == 3


def test_the_update_of_a_column_does_not_depend_on_its_size():
    (grad,) = drawn((6, 15), 1, dtype=torch.float64)
    sizes = torch.logspace(-2, 2, 15, dtype=torch.float64)
    p = torch.linalg.svd(grad, full_matrices=False)[0][:, :3]
    found = []
    for scale in (torch.ones_like(sizes), sizes):
        param, own = made((6, 15), eps=1e-16, refresh_every=100, residual={"name": "fira", "limit": None})
        take(own, param, [grad])  # chooses the basis
        own.state[param]["basis"].copy_(p)
        for key in ("m", "v"):
            own.state[param][key].zero_()
        own.state[param]["age"] = 0
        found.append(take(own, param, [grad * scale]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-8)


def test_the_official_residual_keeps_three_quarters_of_what_the_basis_holds_at_a_quarter():
    (grad,) = drawn((6, 15), 1, dtype=torch.float64)
    # without a share of Adam's part, what moves within the basis is the residual's
    moved = {}
    for exact in (True, False):
        param, own = made((6, 15), scale=0.25, residual={"name": "fira", "exact": exact, "level": "matrix"})
        moved[exact] = take(own, param, [grad])
    p = own.state[param]["basis"]
    r = p.mT @ grad
    phi = 1e-2 * (3 * 15) ** 0.5 / r.norm()
    torch.testing.assert_close(p.mT @ (moved[True] - moved[False]), 0.75 * phi * r, rtol=1e-4, atol=1e-6)


def test_one_scale_for_the_matrix_is_the_ratio_of_the_norms():
    (grad,) = drawn((6, 15), 1, dtype=torch.float64)
    param, own = made((6, 15), residual={"name": "fira", "level": "matrix"}, eps=1e-16)
    moved = take(own, param, [grad])
    p = own.state[param]["basis"]
    r = p.mT @ grad
    rest = grad - p @ r
    outside = moved - p @ (p.mT @ moved)
    torch.testing.assert_close(outside, -1e-2 * (3 * 15) ** 0.5 / r.norm() * rest, rtol=1e-6, atol=1e-9)


def test_a_column_that_the_basis_hardly_holds_is_kept_below_the_ceiling():
    (grad,) = drawn((6, 15), 1, dtype=torch.float64)
    moved = {}
    for ceiling in (None, 2.0):
        residual = {"name": "fira", "limit": None, "ceiling": ceiling}
        param, own = made((6, 15), residual=residual, refresh_every=100)
        take(own, param, [grad])
        p = own.state[param]["basis"]
        thin = grad.clone()
        thin[:, 0] -= 0.999999 * (p @ (p.mT @ grad))[:, 0]
        moved[ceiling] = take(own, param, [thin])
    assert moved[None][:, 0].norm() > 100 * moved[2.0][:, 0].norm()


def test_the_states_are_galores_and_one_number():
    param, own = made((6, 15))
    take(own, param, drawn((6, 15), 1, dtype=torch.float64))
    assert elements(own, param) == 3 * (6 + 2 * 15) + 1
