"""Gaussian and orthogonal starts, against PEFT's."""

from __future__ import annotations

import copy

import pytest
import torch
from begun import filled, site_of
from peft import LoraConfig, get_peft_model
from torch import nn

from fallow.starts.gaussian import Gaussian
from fallow.starts.orthogonal import Orthogonal


@pytest.mark.parametrize(("name", "start"), [("gaussian", Gaussian()), ("orthogonal", Orthogonal())])
def test_peft_draws_the_same_factors_from_the_same_seed(name, start):
    base = nn.Sequential(nn.Linear(12, 20))
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=name, target_modules=["0"])
    torch.manual_seed(5)
    model = get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(5)
    _ = nn.Linear(12, 4, bias=False), nn.Linear(4, 20, bias=False)  # PEFT draws the default of both first
    theirs, pair = model.base_model.model[0], start.pair(site_of(base[0]), 4, 2.0)
    torch.testing.assert_close(pair.a, theirs.lora_A["default"].weight.detach(), atol=1e-6, rtol=0)
    b = torch.zeros(20, 4) if pair.b is None else pair.b
    torch.testing.assert_close(b, theirs.lora_B["default"].weight.detach(), atol=1e-6, rtol=0)


def test_gaussian_rows_have_a_deviation_of_one_over_the_rank():
    pair = Gaussian().pair(site_of(nn.Linear(500, 20)), 16, 1.0)
    assert pair.b is None
    assert float(pair.a.std()) == pytest.approx(1 / 16, rel=0.03)


@pytest.mark.parametrize("rank", [2, 8, 5, 3])
def test_orthogonal_factors_are_not_zero_but_their_product_is(rank):
    pair = Orthogonal().pair(site_of(nn.Linear(30, 40)), rank, 1.0)
    assert float((pair.b @ pair.a).abs().max()) < 1e-7
    assert float(pair.a.std()) == pytest.approx(0.1 * ((rank + 1) // 2 / rank) ** 0.5, rel=0.25)
    assert float(pair.b.std()) == pytest.approx(0.1 * (rank // 2 / rank) ** 0.5, rel=0.25)
    assert torch.linalg.matrix_rank(pair.a) == (rank + 1) // 2
    assert torch.linalg.matrix_rank(pair.b) == rank // 2


def test_orthogonal_of_rank_one_is_lora():
    pair = Orthogonal().pair(site_of(nn.Linear(30, 40)), 1, 1.0)
    assert float(pair.b.abs().max()) == 0.0
    assert float(pair.a.abs().max()) > 0


def test_nothing_is_subtracted_of_either():
    for start in (Gaussian(), Orthogonal()):
        delta = filled(nn.Linear(12, 20), "lora", start, rank=4, alpha=8)
        assert delta.o.offset == 0
        assert float(delta.delta_weight().detach().abs().max()) < 1e-7
        assert set(dict(delta.state_dict())) == {"A", "B"}


def test_both_orthogonal_factors_have_a_gradient_at_once():
    delta = filled(nn.Linear(12, 20), "lora", Orthogonal(), rank=4)
    layer, x = nn.Linear(12, 20), torch.randn(3, 12)
    delta.linear(x, layer.weight.detach(), None).square().sum().backward()
    assert float(delta.A.grad.norm()) > 1e-3
    assert float(delta.B.grad.norm()) > 1e-3
