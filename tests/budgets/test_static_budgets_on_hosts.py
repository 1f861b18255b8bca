"""Budgets of ranks in adapters of both hosts: ranks, scales, layers without any, files, starts beside them."""

from __future__ import annotations

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.eva import get_eva_state_dict
from torch import nn

import fallow
from fallow.budgets.colora import CoLoRARanks
from fallow.budgets.eva import EVARanks
from fallow.budgets.lamda import LaMDARanks
from fallow.budgets.uniform import Uniform
from fallow.core.errors import ConfigError
from fallow.core.statistics import LayerStatistics, Statistics
from fallow.starts.eva import EVA
from observed import observed

hosts = pytest.mark.parametrize("host", ["own", "peft"])
NAMES = ["0", "2", "4"]
X = torch.randn(300, 12, generator=torch.Generator().manual_seed(5)) * torch.arange(1, 13) ** -2.0


def network():
    """Saturated, so that later layers see variance in more directions."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 8))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.mul_(8)
    return net


def statistics():
    found = observed(network(), [X], count=8)
    score = dict(zip(NAMES, (0.0, 1.0, 3.0), strict=True))
    layers = {
        name: LayerStatistics(one.shape, activation=one.activation, spectrum=one.spectrum, contribution=score[name])
        for name, one in found.items()
    }
    return Statistics(layers, 1)


def attached(host, method="lora", **given):
    if host == "own":
        return fallow.attach(network(), method, NAMES, **given)
    return get_peft_model(
        network(), {"lora": fallow.LoRAConfig, "sora": fallow.SoRAConfig}[method](target_modules=NAMES, **given)
    )


def deltas(model):
    return {m.site_name.split(".")[-1]: m for m in model.modules() if isinstance(m, fallow.Delta)}


BUDGETS = {
    "eva": lambda: EVARanks(statistics()),
    "lamda": lambda: LaMDARanks(statistics()),
    "colora": lambda: CoLoRARanks(statistics()),
    "patterns": lambda: Uniform({"2": 5, "4": 0}),
    "uniform": lambda: "uniform",
}


@hosts
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("given", [{}, {"alpha": 8.0}, {"alpha": 6.0, "scaling": "rslora"}])
def test_layers_have_the_ranks_of_the_budget_and_one_scale(host, budget, given):
    told = BUDGETS[budget]()
    shapes = {name: tuple(network().get_submodule(name).weight.shape) for name in NAMES}
    wanted = {"0": 3, "2": 3, "4": 3} if told == "uniform" else told.ranks(shapes, 3)
    model = attached(host, rank=3, budget=told, **given)
    assert {name: delta.A.shape[0] for name, delta in deltas(model).items()} == {n: r for n, r in wanted.items() if r}
    plain = {round(delta.scaling, 6) for delta in deltas(attached(host, rank=3, **given)).values()}
    assert {round(delta.scaling, 6) for delta in deltas(model).values()} == plain
    assert len(plain) == 1
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(r * sum(shapes[name]) for name, r in wanted.items())


@hosts
def test_a_layer_without_rank_has_no_adapter_and_files_bring_the_same_model_back(host, tmp_path):
    model = attached(host, rank=2, budget=EVARanks(statistics()), start=EVA(statistics()), alpha=4.0)
    ranks = {name: delta.A.shape[0] for name, delta in deltas(model).items()}
    assert sum(ranks.values()) == 6
    bare = attached(host, rank=3, budget=Uniform({"2": 0}))
    assert set(deltas(bare)) == {"0", "4"}
    layer = bare.get_submodule("2") if host == "own" else bare.base_model.model.get_submodule("2")
    assert type(layer) is nn.Linear
    for one, kept in ((model, tmp_path / "one"), (bare, tmp_path / "two")):
        for delta in deltas(one).values():
            delta.randomize()
        said = one.eval()(X)
        assert (said - network()(X)).abs().max() > 1e-3
        if host == "own":
            fallow.save(one, kept)
            again = fallow.load(network(), kept)
        else:
            one.save_pretrained(kept)
            again = PeftModel.from_pretrained(network(), kept)
        assert torch.equal(again.eval()(X), said)
        assert {n: tuple(d.A.shape) for n, d in deltas(again).items()} == {
            n: tuple(d.A.shape) for n, d in deltas(one).items()
        }
        fallow.to_lora(one, kept / "plain")
        plain = PeftModel.from_pretrained(network(), kept / "plain").eval()
        torch.testing.assert_close(plain(X), said, atol=1e-5, rtol=1e-5)


@hosts
def test_a_start_follows_the_rank_of_its_layer(host):
    model = attached(host, rank=4, budget=EVARanks(statistics()), start=EVA(statistics(), whiten=False))
    torch.testing.assert_close(model(X), network()(X))
    for name, delta in deltas(model).items():
        directions = statistics()[name].activation.directions
        assert torch.equal(delta.A, directions[: delta.A.shape[0]])
    assert len({delta.A.shape[0] for delta in deltas(model).values()}) > 1


def test_ranks_are_those_of_peft():
    config = LoraConfig(
        r=3, target_modules=NAMES, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, tau=0.99)
    )  # fmt: skip
    batches = [X[torch.randperm(300)] for _ in range(3)]  # the same each time, so that all converges
    theirs = get_eva_state_dict(
        network(), batches, config, forward_fn=lambda model, x: model(x), prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip
    shapes = {name: tuple(network().get_submodule(name).weight.shape) for name in NAMES}
    ours = EVARanks(statistics()).ranks(shapes, 3)
    assert ours == {name: len(theirs[name]) for name in NAMES}
    assert len(set(ours.values())) > 1


@hosts
def test_other_methods_with_ranks_take_budgets_too(host):
    model = attached(host, "sora", rank=3, budget=CoLoRARanks(statistics()))
    assert set(deltas(model)) == {"2", "4"}
    assert deltas(model)["4"].A.shape[0] > deltas(model)["2"].A.shape[0]


@hosts
def test_a_budget_that_gives_nothing_or_needs_data_is_refused(host):
    with pytest.raises(ConfigError, match="gives no layer any rank"):
        attached(host, rank=3, budget=Uniform(dict.fromkeys(NAMES, 0)))
    with pytest.raises(ConfigError, match="budget='eva' needs data"):
        attached(host, rank=3, budget="eva")
    with pytest.raises(ConfigError, match="budget='evaa' does not exist"):
        attached(host, rank=3, budget="evaa")
