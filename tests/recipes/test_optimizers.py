"""Optimizers by name, over whole tensors and over chosen entries."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fallow.core.errors import ConfigError
from fallow.core.lion import Lion
from fallow.recipes.methods import make_method
from fallow.recipes.optimizers import LOW_RANK, OPTIMIZERS, Rule, averaged_values, averages, check_optimizer
from fallow.recipes.trained import Order

RATES = {"sgd": 0.1, "prodigy": None, "lion": 1e-3}
ON_ENTRIES = [name for name, row in OPTIMIZERS.items() if not row.projects]


def made(model: nn.Module, method: str, rule: Rule, lr: float | None, **options: Any) -> Any:
    order = Order(network=model, lr=lr, options=options, steps=9, seed=0, batches=[], loss=lambda *_: None, rule=rule)
    return make_method(method, order)


def steps(model: nn.Module, trained: Any, begin: int, end: int) -> None:
    for step in range(begin, end):
        x = torch.randn(4, 80, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        model.zero_grad()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("method", "name"), [("full", n) for n in OPTIMIZERS] + [(m, n) for m in ("sara", "shira") for n in ON_ENTRIES]
)
def test_every_optimizer_trains_every_kind_of_method_and_resumes_bit_for_bit(mlp, method, name):
    lr = RATES.get(name, 1e-3)
    options = {"mask": "rand"} if method == "shira" else {}
    start, one = mlp(), mlp()
    rule = Rule(name, own_rate=lr is None)
    trained = made(one, method, rule, lr, **options)
    steps(one, trained, 0, 3)
    state = copy.deepcopy(trained.state_dict())
    assert any(not torch.equal(now, before) for now, before in zip(weights(one), weights(start), strict=True))
    steps(one, trained, 3, 6)
    two = mlp()
    again = made(two, method, rule, lr, **options)
    again.load_state_dict(state)
    steps(two, again, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


def test_a_selective_step_of_lion_is_lion_on_the_chosen_entries_and_nothing_else(mlp):
    model, plain = mlp(), mlp()
    trained = made(model, "random", Rule("lion"), 1e-2, fraction=0.3)
    reference = Lion(plain.parameters(), lr=1e-2)
    chosen = {name: slot.index.long() for name, slot in trained.optimizer.slots.items()}
    for step in range(3):
        steps(model, trained, step, step + 1)
        before = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
        x = torch.randn(4, 80, generator=torch.Generator().manual_seed(step))
        plain(x).square().mean().backward()
        reference.step()
        reference.zero_grad()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                kept = before[name].flatten().index_copy(0, chosen[name], parameter.flatten()[chosen[name]])
                parameter.copy_(kept.view_as(parameter))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(plain), strict=True))


@pytest.mark.parametrize("method", ["largest", "full"])
def test_adamw_by_name_is_the_adamw_without_a_name(mlp, method):
    one, two = mlp(), mlp()
    steps(one, a := made(one, method, Rule(), 1e-3, weight_decay=0.1, betas=[0.8, 0.9]), 0, 3)
    blocks = Rule(lr_blocks={".": 1.0})
    steps(two, b := made(two, method, blocks, 1e-3, weight_decay=0.1, betas=[0.8, 0.9]), 0, 3)
    assert a.trained_parameters == b.trained_parameters
    assert all(torch.equal(x, y) for x, y in zip(weights(one), weights(two), strict=True))


@pytest.mark.parametrize("method", ["largest", "full", "lora"])
def test_blocks_have_their_own_rates(mlp, method):
    options = {"target_modules": ["0", "2", "4"]} if method == "lora" else {}
    model = mlp()
    trained = made(model, method, Rule(lr_blocks={r"^0\.": 0.0625, r"^4\.": 0.5}), 1e-3, **options)
    groups = trained.optimizer.param_groups
    assert [group["lr"] for group in groups] == [1e-3, 1e-3 * 0.0625, 1e-3 * 0.5]
    assert sum(len(group["params"]) for group in groups) == len(trained.trainable())
    if method != "full":
        return
    before = dict(mlp().named_parameters())
    steps(model, trained, 0, 1)
    moved = {name: (now - before[name]).abs().max().item() for name, now in model.named_parameters()}
    assert moved["2.weight"] == pytest.approx(1e-3, rel=0.02)  # the first step of AdamW is the rate
    assert moved["0.weight"] == pytest.approx(1e-3 * 0.0625, rel=0.1)
    assert moved["4.weight"] == pytest.approx(1e-3 * 0.5, rel=0.02)


def test_several_rates_of_a_selective_method_resume_bit_for_bit(mlp):
    rule = Rule(lr_blocks={r"^0\.": 0.1})
    one = mlp()
    trained = made(one, "sara", rule, 1e-3, reselect_at=4)
    steps(one, trained, 0, 3)
    state = copy.deepcopy(trained.state_dict())
    steps(one, trained, 3, 6)
    two = mlp()
    again = made(two, "sara", rule, 1e-3, reselect_at=4)
    again.load_state_dict(state)
    steps(two, again, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


def test_a_pattern_that_matches_nothing_is_refused_with_what_there_is(mlp):
    with pytest.raises(ConfigError, match=r"'down_blocks' matches no weight in training; there are 0\.weight, 0\.bias"):
        made(mlp(), "full", Rule(lr_blocks={"down_blocks": 0.1}), 1e-3)


def test_own_rates_are_made_from_adamws():
    group = {"params": [nn.Parameter(torch.ones(2))], "lr": 1e-3, "weight_decay": 0.0}
    rates = {
        name: Rule(name, own_rate=True)([dict(group)]).param_groups[0]["lr"]
        for name in OPTIMIZERS
        if name not in ("sgd", "trion")
    }
    assert rates.pop("lion") == pytest.approx(2e-4)
    assert rates.pop("prodigy") == 1.0
    assert set(rates.values()) == {1e-3}
    assert Rule("prodigy")([dict(group, lr=0.5)]).param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("method", ["sara", "shira", "full"])
def test_a_schedule_free_optimizer_shows_its_average_and_goes_on_as_if_nothing_was(mlp, method):
    options = {"mask": "rand"} if method == "shira" else {}
    model, undisturbed = mlp(), mlp()
    trained = made(model, method, Rule("schedule-free"), 1e-2, **options)
    other = made(undisturbed, method, Rule("schedule-free"), 1e-2, **options)
    assert averages(trained.optimizer)
    assert not averages(made(mlp(), method, Rule("lion"), 1e-2, **options).optimizer)
    with averaged_values(trained):  # before any step there is nothing to average
        assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(mlp()), strict=True))
    steps(model, trained, 0, 3)
    steps(undisturbed, other, 0, 3)
    inside = weights(model)
    with averaged_values(trained):
        shown = weights(model)
        name, param = next(iter(trained.masters())), trained.trainable()[0]
        z = trained.optimizer.state[param]["z"]
        y = other.masters()[name]  # = 0.1 z + 0.9 x, arXiv 2405.15682
        torch.testing.assert_close(trained.masters()[name].flatten(), ((y - 0.1 * z) / 0.9).flatten())
    assert any(not torch.equal(a, b) for a, b in zip(inside, shown, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inside, weights(model), strict=True))
    steps(model, trained, 3, 5)
    steps(undisturbed, other, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(undisturbed), strict=True))


@pytest.mark.parametrize(
    ("name", "options", "method_options", "lr", "blocks", "said"),
    [
        ("adamv", {}, {}, None, False, r"optimizer=adamv does not exist \(did you mean 'adamw'\?\)"),
        ("prodigy", {"d_koef": 2}, {}, None, False, r"prodigy has no option 'd_koef' \(did you mean 'd_coef'\?\)"),
        ("lion", {}, {"eps": 1e-6}, None, False, "the option eps is AdamW's; give lion its own in optimizer_options"),
        ("adamw", {"eps": 1e-6}, {}, None, False, "are options of the method"),
        ("sgd", {"momentum": 0.9}, {}, None, False, r"no learning rate of its own; give lr, like lr=0\.1"),
        ("prodigy", {}, {}, None, True, "finds one rate for everything; leave lr_blocks out"),
    ],
)
def test_what_cannot_be_is_refused(name, options, method_options, lr, blocks, said):
    with pytest.raises(ConfigError, match=said):
        check_optimizer(name, options, method_options, lr, blocks)


@pytest.mark.parametrize("name", LOW_RANK)
def test_a_low_rank_optimizer_projects_the_matrices_of_a_whole_network(mlp, name):
    model = mlp()
    options = {"rank": 4} if name == "gradnormlorp" else {}
    trained = made(model, "full", Rule(name, options), 1e-3)
    steps(model, trained, 0, 1)
    ranks = {site.name: site.rank for site in trained.optimizer.sites()}
    assert {name for name, rank in ranks.items() if rank is not None} == {"0.weight", "2.weight", "4.weight"}


def test_a_head_by_its_name_takes_the_plain_rule(mlp):
    model = nn.ModuleDict({"body": mlp(), "head": nn.Linear(8, 8)})
    trained = made(model, "full", Rule("galore", lr_blocks={"body.0": 0.5}), 1e-3)
    sites = {site.name: (site.rank, site.group["lr"]) for site in trained.optimizer.sites()}
    assert sites["head.weight"] == (None, 1e-3)
    assert sites["body.0.weight"][0] is not None
    assert sites["body.0.weight"][1] == sites["body.0.bias"][1] == 5e-4


def test_a_low_rank_optimizer_is_refused_over_single_entries(mlp):
    with pytest.raises(ConfigError, match="galore projects gradients of whole matrices, and SaRA trains single"):
        made(mlp(), "sara", Rule("galore"), 1e-3)


def test_an_option_that_a_named_optimizer_hands_on_is_known_and_another_is_not():
    check_optimizer("galore", {"stagger": True, "basis": "dct"}, {}, None, False)
    with pytest.raises(ConfigError, match=r"galore has no option 'stager' \(did you mean 'stagger'\?\)"):
        check_optimizer("galore", {"stager": True}, {}, None, False)


def test_values_that_an_optimizer_refuses_are_told():
    with pytest.raises(ConfigError, match=r"SGD refuses its options {'momentum': -1}"):
        Rule("sgd", {"momentum": -1})([{"params": [nn.Parameter(torch.ones(1))], "lr": 1.0, "weight_decay": 0.0}])
