from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fallow.core.errors import ModelError, SelectionError
from fallow.core.select import Amount, Selection, Target, choose, eligible, largest_in_stream, magnitude, seeded


def of(*weights: Tensor) -> list[Target]:
    """Targets named w0, w1, ... with these values."""
    return [Target((f"w{i}",), (nn.Parameter(weight),), ()) for i, weight in enumerate(weights)]


def flat(selection: Selection, targets: list[Target]) -> list[int]:
    """The chosen entries as positions in the concatenation of all targets."""
    chosen, start = [], 0
    for target in targets:
        chosen += [start + int(i) for i in selection.index[target.name]]
        start += target.numel
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("fraction", [0.003, 0.31, 0.9])
def test_a_fraction_is_the_stable_argsort_of_all_magnitudes_ties_included(dtype, largest, fraction):
    targets = of(torch.randn(40, 25).to(dtype), torch.randn(7).to(dtype), torch.zeros(3, 2, 5).to(dtype))
    everything = torch.cat([magnitude(target).reshape(-1) for target in targets])
    order = torch.argsort(-everything if largest else everything, stable=True)
    expected = sorted(order[: round(fraction * 1037)].tolist())
    assert flat(choose(targets, magnitude, Amount(fraction=fraction), largest=largest), targets) == expected


def test_ties_are_broken_by_model_order_and_then_by_the_lowest_index():
    targets = of(torch.full((2, 3), 0.5), torch.full((6,), -0.5))
    selection = choose(targets, magnitude, Amount(budget=8))
    assert selection.index["w0"].tolist() == [0, 1, 2, 3, 4, 5]
    assert selection.index["w1"].tolist() == [0, 1]


def test_a_threshold_is_strict_and_takes_small_negative_weights_but_not_large_ones():
    targets = of(torch.tensor([0.5, -0.5, 0.499, -0.499, -3.0, 0.0, -0.0]))
    selection = choose(targets, magnitude, Amount(threshold=0.5))
    assert selection.index["w0"].tolist() == [2, 3, 5, 6]
    assert selection.threshold == 0.5


def test_bfloat16_weights_are_compared_in_float32():
    # 0.0010004 would round to the bfloat16 neighbour 0.00099945 if the bound were cast to the weight's dtype
    weight = torch.tensor([0.00099945068359375, 0.5], dtype=torch.bfloat16)
    assert choose(of(weight), magnitude, Amount(threshold=0.0009995)).index["w0"].tolist() == [0]
    with pytest.raises(SelectionError, match="selects no weight"):
        choose(of(weight), magnitude, Amount(threshold=0.0009994))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_stored_threshold_of_a_budget_reproduces_the_choice(dtype):
    targets = of(torch.randn(50, 9, dtype=dtype), torch.randn(31, dtype=dtype))
    by_budget = choose(targets, magnitude, Amount(budget=77))
    again = choose(targets, magnitude, Amount(threshold=by_budget.threshold))
    assert flat(by_budget, targets) == flat(again, targets)


def test_a_choice_per_layer_takes_the_same_share_of_each():
    targets = of(torch.randn(20, 30), torch.randn(10, 10) * 100)
    selection = choose(targets, magnitude, Amount(density=0.1), largest=True)
    assert [selection.index[t.name].numel() for t in targets] == [60, 10]
    for target in targets:
        chosen = torch.zeros(target.numel, dtype=torch.bool)
        chosen[selection.index[target.name].long()] = True
        value = magnitude(target).reshape(-1)
        assert value[chosen].min() >= value[~chosen].max()


def test_r_counts_like_a_lora_of_that_rank_and_sees_a_conv_as_a_matrix():
    targets = of(torch.randn(40, 25), torch.randn(16, 8, 3, 3))
    selection = choose(targets, magnitude, Amount(r=3))
    assert [selection.index[t.name].numel() for t in targets] == [3 * 65, 3 * (16 + 72)]
    with pytest.raises(SelectionError, match=r"r=4 asks for 52 entries of 'w0', which has 40; give r <= 3"):
        choose(of(torch.randn(8, 5)), magnitude, Amount(r=4))


def test_a_series_of_tasks_takes_disjoint_ranks_that_exhaust_the_layer():
    targets = of(torch.randn(10, 10).bfloat16())
    sets = [
        set(choose(targets, magnitude, Amount(density=0.25), largest=True, skip=t).index["w0"].tolist())
        for t in range(4)
    ]
    assert [len(s) for s in sets] == [25] * 4
    assert len(set.union(*sets)) == 100
    with pytest.raises(SelectionError, match="at most 4 tasks"):
        choose(targets, magnitude, Amount(density=0.25), largest=True, skip=4)


def test_indices_are_sorted_int32():
    selection = choose(of(torch.randn(100)), magnitude, Amount(fraction=0.5))
    index = selection.index["w0"]
    assert index.dtype == torch.int32
    assert bool((index[1:] > index[:-1]).all())


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        ({"threshold": 0.0}, "threshold=0.0 selects no weight; give threshold > 0"),
        ({"threshold": -1.0}, "selects no weight"),
        ({"threshold": math.nan}, "selects no weight"),
        ({"threshold": "2e-3"}, "must be a number"),
        ({"fraction": 0.0}, r"outside \(0, 1\]"),
        ({"fraction": 5}, r"outside \(0, 1\]"),
        ({"fraction": math.nan}, r"outside \(0, 1\]"),
        ({"fraction": True}, "must be a number"),
        ({"budget": 0}, "at least 1"),
        ({"budget": 2.5}, "must be a whole number"),
        ({"density": 1.5}, r"outside \(0, 1\]"),
        ({}, "exactly one of threshold, fraction"),
        ({"threshold": 1e-3, "fraction": 0.1}, "given: threshold=0.001 and fraction=0.1"),
    ],
)
def test_impossible_amounts_are_refused_with_what_is_allowed(amount, message):
    with pytest.raises(SelectionError, match=message):
        Amount(**amount)


def test_amounts_that_select_nothing_or_by_threshold_everything_are_refused():
    targets = of(torch.linspace(0.1, 1.0, 50))
    with pytest.raises(SelectionError, match=r"threshold=0.01 selects no weight of 50"):
        choose(targets, magnitude, Amount(threshold=0.01))
    with pytest.raises(SelectionError, match="selects every one of the 50 eligible entries"):
        choose(targets, magnitude, Amount(threshold=100.0))
    with pytest.raises(SelectionError, match="of 50 eligible entries selects no weight"):
        choose(targets, magnitude, Amount(fraction=0.001))
    with pytest.raises(SelectionError, match="budget=51 exceeds the 50"):
        choose(targets, magnitude, Amount(budget=51))
    assert choose(targets, magnitude, Amount(fraction=1.0)).count == 50


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    with pytest.raises(SelectionError, match="'w1' has NaN or infinite"):
        choose(of(torch.ones(3), torch.tensor([0.0, bad])), magnitude, Amount(fraction=0.5))


def test_a_generator_per_name_gives_the_same_numbers_every_time_and_others_for_other_names():
    one, again, other = (torch.rand(5, generator=seeded(3, name)) for name in ("a.weight", "a.weight", "b.weight"))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


class TestEligible:
    def test_every_layer_type_is_found_in_model_order(self, zoo):
        model = zoo(tied=False)
        assert [t.name for t in eligible(model)] == [name for name, _ in model.named_parameters()]

    def test_a_tied_weight_is_counted_once_and_answers_to_each_of_its_names(self, zoo):
        model = zoo()
        assert sum(t.numel for t in eligible(model)) == sum(p.numel() for p in model.parameters())
        (target,) = eligible(model, include=r"^readout")
        assert target.names == ("tokens.weight", "readout.weight")
        assert all("tokens" not in t.name for t in eligible(model, exclude="readout"))

    def test_parameters_tied_by_storage_are_one_target_too(self):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[1].weight.data = model[0].weight.data
        (target,) = eligible(model)
        assert target.names == ("0.weight", "1.weight")
        assert len(target.params) == 2

    def test_weights_that_share_memory_under_different_shapes_are_refused(self):
        model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False))
        model[1].weight.data = model[0].weight.data.t()
        with pytest.raises(ModelError, match="share memory under different shapes"):
            eligible(model)

    def test_include_and_exclude_are_regular_expressions(self, zoo):
        names = [t.name for t in eligible(zoo(), include=[r"attention\.", "conv"], exclude="bias$")]
        assert names == ["attention.in_proj_weight", "attention.out_proj.weight", "conv.weight"]

    def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(self, zoo):
        with pytest.raises(
            SelectionError, match=r"include='atention.in_proj_weight' matches no parameter \(did you mean"
        ):
            eligible(zoo(), include="atention.in_proj_weight")
        with pytest.raises(SelectionError, match="exclude='nowhere' matches no parameter"):
            eligible(zoo(), exclude="nowhere")
        with pytest.raises(SelectionError, match="not a regular expression"):
            eligible(zoo(), include="(")
        with pytest.raises(SelectionError, match="leave no trainable weight"):
            eligible(zoo(), include="conv", exclude="conv")

    def test_keep_decides_by_type_or_dimension_but_not_on_what_include_names(self, zoo):
        def is_matrix(target: Target) -> bool:
            return target.weight.ndim == 2

        names = [t.name for t in eligible(zoo(), keep=is_matrix)]
        assert "conv.weight" not in names
        assert "tokens.weight" in names
        assert [t.name for t in eligible(zoo(), include="conv.weight", keep=is_matrix)] == ["conv.weight"]

    def test_frozen_parameters_stay_out_and_wholly_frozen_models_are_refused(self, mlp):
        model = mlp()
        model[0].requires_grad_(False)
        assert "0.weight" not in [t.name for t in eligible(model)]
        model.requires_grad_(False)
        with pytest.raises(ModelError, match="frozen or quantised; call requires_grad_"):
            eligible(model)

    def test_models_without_parameters_or_without_values_are_refused(self):
        with pytest.raises(ModelError, match="ReLU has no parameters"):
            eligible(nn.ReLU())
        with pytest.raises(ModelError, match="meta device"):
            eligible(nn.Linear(3, 3, device="meta"))


def test_the_largest_of_a_stream_are_those_of_the_whole_with_ties_to_the_first():
    parts = [torch.rand(40), torch.zeros(3), torch.rand(7, 5), torch.full((4,), 0.5)]
    parts[0][::7] = 0.5
    flat = torch.cat([part.flatten() for part in parts])
    for count in (0, 1, 17, 30, flat.numel()):
        found = torch.cat(list(largest_in_stream(lambda: iter(parts), count)))
        order = flat.sort(descending=True, stable=True).indices[:count]
        assert found.nonzero().flatten().tolist() == sorted(order.tolist())
