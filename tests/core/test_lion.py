"""Lion against the update that its paper writes down."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fallow.core.errors import ConfigError
from fallow.core.lion import Lion


def test_steps_are_those_of_the_paper():
    w, lr, (b1, b2), decay = torch.randn(7, dtype=torch.float64), 0.01, (0.9, 0.99), 0.1
    param = nn.Parameter(w.clone())
    optimizer = Lion([param], lr=lr, betas=(b1, b2), weight_decay=decay)
    m = torch.zeros_like(w)
    for step in range(5):
        g = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        param.grad = g.clone()
        optimizer.step()
        w = w - lr * (torch.sign(b1 * m + (1 - b1) * g) + decay * w)
        m = b2 * m + (1 - b2) * g
        torch.testing.assert_close(param.detach(), w, rtol=1e-12, atol=1e-12)


def test_params_without_a_gradient_stay_and_groups_have_their_own_rates():
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = Lion([{"params": [a, c], "lr": 0.1}, {"params": [b]}], lr=0.01)
    a.grad, b.grad = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0])
    optimizer.step()
    assert a.tolist() == pytest.approx([0.9, 1.1])
    assert b.tolist() == pytest.approx([0.99, 1.0])
    assert c.tolist() == [1.0, 1.0]
    assert c not in optimizer.state


def test_it_keeps_one_buffer_for_each_value():
    param = nn.Parameter(torch.ones(3))
    optimizer = Lion([param])
    param.grad = torch.ones(3)
    optimizer.step()
    assert {key: tuple(value.shape) for key, value in optimizer.state[param].items()} == {"exp_avg": (3,)}


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"weight_decay": float("nan")}])
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=.* of Lion must be"):
        Lion([nn.Parameter(torch.ones(1))], **wrong)
