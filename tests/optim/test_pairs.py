"""Finding the factor pairs of a model."""

from __future__ import annotations

import pytest
import torch
from factor_models import HOSTS, TARGETS, Net, adapted, batch
from torch import nn

import fallow
from fallow.core.errors import ConfigError
from fallow.optim.pairs import find_pairs, row_norms_squared, stacked


@pytest.mark.parametrize("host", HOSTS)
def test_pairs_of_all_hosts_tell_what_they_add_to_the_weight(host):
    model = adapted(host)
    pairs = find_pairs(model, "Rule")
    assert sorted(pair.name.split(".")[-1].split("_")[0] for pair in pairs) == sorted(TARGETS)
    x, _ = batch()
    out = model(x)
    plain = Net()
    for pair in pairs:
        layer = getattr(plain, pair.name.split(".")[-1])
        change = pair.scale() * pair.b.flatten(1) @ pair.a.flatten(1)
        layer.weight.data = pair.view.write(pair.view.read(pair.read()) + change, layer.weight).detach()
    for name in ("conv", "first", "second", "head"):
        source = next(m for n, m in model.named_modules() if n.endswith(name))
        getattr(plain, name).bias.data = source.bias.data if hasattr(source, "bias") else source.base_layer.bias.data
    plain.head.weight.data = next(m for n, m in model.named_modules() if n.endswith("head")).weight.data
    torch.testing.assert_close(out, plain(x))


def test_a_scale_is_read_when_it_is_asked_for():
    model = adapted("fallow")
    pair = find_pairs(model, "Rule")[0]
    assert pair.scale() == 2.0
    fallow.set_scale(model, 0.5)
    assert pair.scale() == 1.0


def test_pairs_of_one_shape_are_one_stack():
    sizes = [len(stack.pairs) for stack in stacked(find_pairs(adapted("fallow"), "Rule"))]
    assert sorted(sizes) == [1, 1, 2]


@pytest.mark.parametrize("method", ["dora", "vera"])
def test_a_model_without_plain_factors_is_refused_by_name(method):
    model = fallow.attach(Net(), method, ["first"], rank=2)
    with pytest.raises(ConfigError, match=f"Rule found no LoRA in training in Net; it has {method}"):
        find_pairs(model, "Rule")


def test_no_adapter_and_frozen_adapters_are_told_apart():
    with pytest.raises(ConfigError, match="found no LoRA in training in Linear; add one first"):
        find_pairs(nn.Linear(2, 2), "Rule")
    with pytest.raises(ConfigError, match="the 4 that it has are frozen"):
        find_pairs(adapted("PEFT").requires_grad_(False), "Rule")


def test_dora_and_grouped_convolutions_of_peft_are_refused():
    from peft import LoraConfig, get_peft_model

    dora = get_peft_model(Net(), LoraConfig(target_modules=["first"], use_dora=True))
    with pytest.raises(ConfigError, match=r"cannot train '.*first'.*without use_dora"):
        find_pairs(dora, "Rule")
    grouped = get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), LoraConfig(target_modules=["0"], r=2))
    with pytest.raises(ConfigError, match="one product for each group"):
        find_pairs(grouped, "Rule")


def test_row_norms_of_a_product_are_those_of_the_dense_matrix():
    a, b = torch.randn(3, 4, 9, dtype=torch.float64), torch.randn(3, 7, 4, dtype=torch.float64)
    dense = (b @ a).square().sum(-1)
    torch.testing.assert_close(row_norms_squared(a, b), dense, rtol=1e-12, atol=1e-12)
