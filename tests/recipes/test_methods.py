"""Every method of the recipe: it trains, and its adapter on a fresh base is the trained network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from fallow.core.errors import ConfigError, SelectionError
from fallow.recipes.adapter_files import adapter_size, apply_adapter, bare_parameters
from fallow.recipes.methods import DELTAS, METHODS, check_options, make_method, own_rate
from fallow.recipes.trained import Order, Trained

WAYS: dict[str, tuple[str, dict[str, Any], float]] = {  # method, options, how near the adapter's network must come
    "sara": ("sara", {}, 1e-6),
    "sara, values": ("sara", {"store": "value", "fraction": 0.1}, 0),
    "largest": ("largest", {"budget": 1000}, 1e-6),
    "random": ("random", {"store": "value"}, 0),
    "lt-sft": ("lt-sft", {"dense_steps": 3}, 1e-6),
    "shira": ("shira", {}, 1e-6),
    "shira, wm": ("shira", {"mask": "wm", "density": 0.05}, 1e-6),
    "lora": ("lora", {"rank": 2}, 1e-6),
    "loha": ("peft", {"peft_type": "LOHA", "r": 2}, 1e-6),
    "oft": ("peft", {"peft_type": "oft", "oft_block_size": 4}, 1e-6),
    "full": ("full", {}, 0),
}


def network(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder / "unet")


def batch(seed: int) -> tuple[torch.Tensor, ...]:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 8, 8, generator=chance), torch.tensor([10, 700]), torch.randn(2, 16, 16, generator=chance)


def loss(unet: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return (unet(*inputs).sample - 1).square().mean()


def trained(unet: Any, method: str, options: dict[str, Any], lr: float | None = 1e-2, steps: int = 3) -> Trained:
    order = Order(unet, lr, options, steps, 0, [batch(100), batch(101)], loss)
    made = make_method(method, order)
    unet.train()
    for step in range(steps):
        loss(unet, batch(step)).backward()
        made.optimizer.step()
        made.optimizer.zero_grad()
    return made


def test_the_ways_cover_every_method():
    assert {method for method, _, _ in WAYS.values()} == set(METHODS) - set(DELTAS)


STARTED: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"rank": 2, "start": "pissa"}),
    ("lora", {"rank": 2, "start": "lora-ga"}),
    ("lora", {"rank": 2, "start": "corda", "budget": "lamda"}),
    ("lora", {"rank": 2, "objective": "low-rank-change"}),
    ("dora", {"rank": 2, "start": "eva", "budget": "eva"}),
    ("lora-xs", {"rank": 2, "start": "lora-sb"}),
]


@pytest.mark.parametrize(("method", "options"), STARTED, ids=str)
def test_starts_and_budgets_see_the_batches_and_the_adapter_on_a_fresh_base_is_the_trained_network(
    tiny_sd, tmp_path, method, options
):
    unet, base, fresh = network(tiny_sd), network(tiny_sd), network(tiny_sd)
    made = trained(unet, method, options)
    made.save_adapter(tmp_path / "adapter", {"data": "things"})
    apply_adapter(fresh, tmp_path / "adapter")
    with torch.no_grad():
        wanted, got, before = (n.eval()(*batch(7)).sample for n in (unet, fresh, base))
    assert (wanted - before).abs().max() > 1e-3
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)


def test_starts_that_this_recipe_cannot_make_are_refused_before_anything_is_changed(tiny_sd):
    unet = network(tiny_sd)
    for options, told in (
        ({"start": "fila"}, "fallow unlearn"),
        ({"budget": "colora"}, "fully trained"),
        ({"start": "pisa"}, "did you mean 'pissa'"),
    ):
        with pytest.raises(ConfigError, match=told):
            trained(unet, "lora", {"rank": 2, **options})
    assert not any("base_layer" in name for name, _ in unet.named_modules())


@pytest.mark.parametrize("way", WAYS)
def test_the_adapter_on_a_fresh_base_is_the_trained_network(tiny_sd, tmp_path, way):
    method, options, near = WAYS[way]
    unet, base, fresh = network(tiny_sd), network(tiny_sd), network(tiny_sd)
    made = trained(unet, method, options)
    made.save_adapter(tmp_path / "adapter", {"data": "things"})
    apply_adapter(fresh, tmp_path / "adapter")
    x = batch(7)
    with torch.no_grad():
        wanted, got, before = (n.eval()(*x).sample for n in (unet, fresh, base))
    assert (wanted - before).abs().max() > 1e-3
    assert (wanted - got).abs().max() <= 20 * near  # outputs: many weights, each within `near`
    if method not in ("lora", "peft"):
        for name, weight in bare_parameters(unet).items():
            assert (weight - fresh.get_parameter(name)).abs().max() <= near, name


SMALL: dict[str, dict[str, Any]] = {  # options for layers of 16 channels, where the defaults are for larger ones
    "codyra": {"rank": 2}, "dora": {"rank": 2}, "dylora": {"rank": 4}, "hydra": {"rank": 2}, "kasa": {"rank": 2},
    "lamda": {"rank": 2},
    "loca": {"components": 40}, "loldu": {"rank": 2}, "lora-xs": {"rank": 2}, "mosa": {"rank": 4}, "pego": {"rank": 1},
    "randlora": {"rank": 2}, "salt": {"rank": 2}, "sora": {"rank": 2}, "svfit": {"rank": 2}, "tlora": {"rank": 2},
    "vera": {"rank": 4}, "wara": {"rank": 2},
}  # fmt: skip


@pytest.mark.parametrize("method", DELTAS)
def test_every_weight_parameterization_trains_and_its_adapter_does_the_same_on_a_fresh_base(tiny_sd, tmp_path, method):
    unet, base, fresh = network(tiny_sd), network(tiny_sd), network(tiny_sd)
    made = trained(unet, method, SMALL.get(method, {}), lr=3e-2, steps=4)
    made.save_adapter(tmp_path / "adapter", {"data": "things"})
    apply_adapter(fresh, tmp_path / "adapter")
    x = batch(7)
    with torch.no_grad():
        wanted, got, before = (n.eval()(*x).sample for n in (unet, fresh, base))
    assert (wanted - before).abs().max() > 1e-4
    assert (wanted - got).abs().max() <= 1e-4


@pytest.mark.parametrize("method", ["dylora", "mosa", "loca"])
def test_a_weight_parameterization_goes_on_from_its_state_as_if_never_stopped(tiny_sd, method):
    def run(unet: Any, made: Trained, steps: Sequence[int]) -> None:
        unet.train()
        for step in steps:
            torch.manual_seed(step)
            loss(unet, batch(step)).backward()
            made.optimizer.step()
            made.optimizer.zero_grad()

    whole, first, second = (network(tiny_sd) for _ in range(3))
    made = [
        make_method(method, Order(unet, 1e-2, SMALL.get(method, {}), 6, 0, [], loss)) for unet in (whole, first, second)
    ]
    run(whole, made[0], range(6))
    run(first, made[1], range(3))
    made[2].load_state_dict(copy.deepcopy(made[1].state_dict()))
    run(second, made[2], range(3, 6))
    for name, value in made[0].masters().items():
        assert torch.equal(value, made[2].masters()[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_what_is_trained_is_counted_and_the_adapter_holds_no_more(tiny_sd, tmp_path, way):
    method, options, _ = WAYS[way]
    unet = network(tiny_sd)
    size = sum(p.numel() for p in unet.parameters())
    made = trained(unet, method, options, steps=1)
    made.save_adapter(tmp_path / "adapter", {})
    count, stored = adapter_size(tmp_path / "adapter")
    assert made.total_parameters == size
    assert made.trained_parameters == sum(trained for trained, _ in made.trained_where.values())
    assert count == made.trained_parameters
    if method != "full":
        assert made.trained_parameters < 0.2 * size
        assert stored < 4 * size / 2
    assert sum(value.numel() for value in made.masters().values()) == made.trained_parameters


def test_a_threshold_is_told_only_where_small_entries_are_trained(tiny_sd):
    for method in ("sara", "largest", "random"):
        made = make_method(method, Order(network(tiny_sd), 1e-3, {}, 10, 0, [], loss))
        assert (made.threshold is not None) == (method == "sara")


def test_what_the_selections_leave_alone_stays_bit_for_bit(tiny_sd):
    unet, base = network(tiny_sd), network(tiny_sd)
    made = trained(unet, "sara", {"budget": 500})
    changed = sum(int((p != base.get_parameter(name)).sum()) for name, p in unet.named_parameters())
    assert made.trained_parameters == 500
    assert 400 < changed <= 500


def test_masters_are_put_back_exactly_after_a_reselection(tiny_sd):
    unet = network(tiny_sd)
    made = trained(unet, "sara", {"reselect_at": 2}, lr=0.02)
    assert 0 < made.optimizer.live_parameters < made.trained_parameters
    own = {name: value.clone() for name, value in made.masters().items()}
    weights = {name: p.detach().clone() for name, p in unet.named_parameters()}
    made.put({name: torch.zeros_like(value) for name, value in own.items()})
    zeros = sum(int((p == 0).sum()) for p in unet.parameters())
    assert zeros >= made.trained_parameters
    made.put(own)
    for name, p in unet.named_parameters():
        assert torch.equal(p, weights[name])
    for name, value in made.masters().items():
        assert torch.equal(value, own[name])


def test_sara_takes_the_nuclear_norm_where_a_layer_can_and_does_without_where_none_can(tiny_sd):
    order = Order(network(tiny_sd), None, {}, 10, 0, [], loss)
    assert make_method("sara", order).optimizer.penalty is None  # its matrices have 32 rows at most
    order = Order(network(tiny_sd), None, {"rank_min_side": 15, "rank_min_selected": 10}, 10, 0, [], loss)
    made = make_method("sara", order).optimizer
    assert made.penalty.weight == 5e-3
    assert made.schedule.due == [5]
    with pytest.raises(SelectionError, match="no layer to act on"):
        make_method("sara", Order(network(tiny_sd), None, {"rank_weight": 1e-3}, 10, 0, [], loss))


def test_lora_is_put_on_attention_with_the_given_rank_and_any_further_field(tiny_sd):
    made = make_method("lora", Order(network(tiny_sd), None, {"rank": 3, "use_rslora": True}, 10, 0, [], loss))
    names = [name for name, (count, _) in made.trained_where.items() if count]
    assert names
    assert all(any(part in name for part in ("to_q", "to_k", "to_v", "to_out.0")) for name in names)
    assert made.optimizer.param_groups[0]["lr"] == 5e-4
    attention = make_method(
        "lora", Order(network(tiny_sd), None, {"rank": 3, "target_modules": ["to_q"]}, 10, 0, [], loss)
    )
    assert attention.trained_parameters < made.trained_parameters


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("saraa", {}, r"method=saraa does not exist \(did you mean 'sara'\?\)"),
        ("sara", {"fractoin": 0.1}, r"the method sara has no option 'fractoin' \(did you mean 'fraction'\?\)"),
        ("sara", {"rank": 4}, "no option 'rank'"),
        ("lora", {"rnak": 4}, "did you mean 'rank'"),
        ("lora", {"fraction": 0.1}, "the method lora has no option 'fraction'"),
        ("smora", {}, r"method=smora is not trained by this command: it acts on .*fallow.attach\(model, 'smora'\)"),
        ("petalface", {}, "method=petalface is not trained by this command: it wants to be told how good"),
        ("peft", {}, "needs peft_type, one of .*LOHA"),
        ("peft", {"peft_type": "LOHO"}, "did you mean 'LOHA'"),
        ("peft", {"peft_type": "LOHA", "rang": 3}, "no option 'rang'"),
        ("full", {"fraction": 1}, "the method full has no option 'fraction'"),
        ("bone", {"rank": "abc"}, "rank='abc' must be a whole number of at least 1"),
        ("bone", {"kind": "bat", "dropout": 0.1}, "dropout=0.1 has no place in kind='bat'"),
        ("loca", {"peft_version": "1"}, r"the method loca has no option 'peft_version' \(allowed: (?!.*task_type)"),
    ],
)
def test_what_does_not_exist_is_named_with_the_nearest_that_does(method, options, said):
    with pytest.raises(ConfigError, match=said):
        check_options(method, options)


def test_amounts_that_cannot_be_are_refused_before_a_model_is_loaded():
    with pytest.raises(SelectionError, match=r"fraction=2.* is outside"):
        check_options("sara", {"fraction": 2.0})
    with pytest.raises(SelectionError, match="exactly one"):
        check_options("sara", {"fraction": 0.1, "budget": 3})
    with pytest.raises(SelectionError, match=r"threshold=0.* selects no weight"):
        check_options("largest", {"threshold": 0.0})


def test_what_the_classes_refuse_is_told_as_a_configuration_error(tiny_sd):
    for method, options, said in (
        ("lora", {"rank": 0}, "PEFT refuses the options of lora"),
        ("lora", {"modules_to_save": ["conv_out"]}, "modules_to_save.*leave it out"),
        ("lora", {"target_modules": ["to_z"]}, "PEFT refuses the options of lora"),
        ("full", {"betas": [2, 0.9]}, "AdamW refuses"),
        ("sara", {"store": "both"}, "store='both'"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_method(method, Order(network(tiny_sd), None, options, 10, 0, [], loss))


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("sara", {"betas": 3}, r"betas=3 must be two numbers, like \[0\.9, 0\.999\]"),
        ("sara", {"rank_weight": "abc"}, "rank_weight='abc' must be a number"),
        ("sara", {"weight_decay": float("nan")}, "weight_decay=nan must be a number"),
        ("sara", {"rank_convs": 1}, "rank_convs=1 must be true or false"),
        ("random", {"fraction": 0.1, "seed": "abc"}, "seed='abc' must be a whole number"),
        ("random", {"fraction": 0.1, "seed": 2**63}, "must be from 0 to 2"),
        ("shira", {"mask": "wm", "task": 0.5}, "task=0.5 must be a whole number"),
        ("lora", {"betas": 3}, "betas=3 must be two numbers"),
        ("full", {"weight_decay": "abc"}, "weight_decay='abc' must be a number"),
        ("sara", {"reselect_at": None}, "the option reselect_at of the method sara has no value"),
        ("lora", {"target_modules": None}, "the option target_modules of the method lora has no value"),
    ],
)
def test_an_option_of_the_wrong_kind_is_refused_by_name(tiny_sd, method, options, said):
    with pytest.raises(ConfigError, match=said):
        trained(network(tiny_sd), method, options, steps=0)


def test_mini_sd_wants_larger_steps_and_other_models_get_the_methods_own_rate():
    assert own_rate("sara", "mini-sd") == 3e-3
    assert own_rate("sara", "some/model") is None  # the paper's rule, from the threshold
    assert own_rate("full", "some/model") == 5e-5
    for name, method in METHODS.items():
        assert method.small > max(method.lr or 0, method.rates[0]), name
