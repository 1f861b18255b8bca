"""The ranks that budgets give before training, as functions of what was found in the layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fallow.budgets.colora import CoLoRARanks
from fallow.budgets.eva import EVARanks
from fallow.budgets.lamda import LaMDARanks
from fallow.budgets.uniform import Uniform
from fallow.core.budgeting import budget_of
from fallow.core.errors import ConfigError, DataError
from fallow.core.statistics import Components, LayerStatistics, Statistics
from observed import observed

THREE = {"a": (20, 12), "b": (12, 12), "c": (12, 20)}


def explained(ratios, shapes=None):
    """Statistics with these ratios, by layer."""
    layers = {}
    for name, values in ratios.items():
        shape, q = (shapes or THREE)[name], len(values)
        parts = torch.eye(q, shape[1]), torch.ones(q), torch.tensor(values), torch.zeros(shape[1])
        layers[name] = LayerStatistics(shape, activation=Components(*parts, torch.ones(q).bool(), 100))
    return Statistics(layers, 1, ("activation",))


def scored(scores, shapes):
    return Statistics({n: LayerStatistics(shapes[n], contribution=c) for n, c in scores.items()}, 1, ("contribution",))


def curves(**spectra):
    layers = {n: LayerStatistics((len(s), len(s)), spectrum=torch.as_tensor(s)) for n, s in spectra.items()}
    return Statistics(layers, 0, ("spectrum",)), {name: one.shape for name, one in layers.items()}


# -- uniform and by patterns ------------------------------------------------------------------------------------------


def test_uniform_is_the_same_everywhere_and_known_by_name():
    assert budget_of("uniform").ranks(THREE, 4) == {"a": 4, "b": 4, "c": 4}
    assert budget_of({"name": "uniform", "total": True}).ranks(THREE, 4) == {"a": 4, "b": 4, "c": 4}


def test_patterns_give_layers_ranks_of_their_own():
    shapes = {"0.q": (8, 8), "0.k": (8, 8), "1.q": (8, 8), "1.k": (8, 8)}
    assert Uniform({r".*\.q": 6, r"1\..*": 0}).ranks(shapes, 3) == {"0.q": 6, "0.k": 3, "1.q": 6, "1.k": 0}
    kept = Uniform({r".*\.q": 5}, total=True).ranks(shapes, 4)
    assert kept == {"0.q": 5, "0.k": 3, "1.q": 5, "1.k": 3}
    uneven = Uniform({"0.q": 1}, total=True).ranks(shapes, 3)
    assert uneven == {"0.q": 1, "0.k": 4, "1.q": 4, "1.k": 3}
    with pytest.raises(ConfigError, match=r"patterns: 'q' matches none of 0\.q, 0\.k"):
        Uniform({"q": 3}).ranks(shapes, 4)
    with pytest.raises(ConfigError, match="patterns ask for 4 more ranks than the 16 there are"):
        Uniform({r".*\.q": 10}, total=True).ranks(shapes, 4)
    with pytest.raises(ConfigError, match="is no regular expression"):
        Uniform({"(": 3})
    with pytest.raises(ConfigError, match=r"patterns\['a'\]=-1"):
        Uniform({"a": -1})


# -- EVA --------------------------------------------------------------------------------------------------------------


def by_sorting(ratios, rank, rho):
    """What the paper says, by one sort of all ratios."""
    most = round(rho * rank)
    pooled = sorted(((value, name) for name, r in ratios.items() for value in r[:most]), reverse=True)
    chosen = [name for _, name in pooled[: rank * len(ratios)]]
    return {name: chosen.count(name) for name in ratios}


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 2.6])
def test_ranks_go_to_the_largest_ratios_and_their_sum_is_exact(rho):
    torch.manual_seed(1)
    for _ in range(10):
        ratios = {name: torch.rand(11).sort(descending=True).values.tolist() for name in THREE}
        ranks = EVARanks(explained(ratios), rho).ranks(THREE, 4)
        assert ranks == by_sorting(ratios, 4, rho)
        assert sum(ranks.values()) == 12
        assert all(0 <= r <= round(rho * 4) for r in ranks.values())
        if rho == 1:
            assert set(ranks.values()) == {4}


def test_a_layer_fed_with_noise_loses_rank_to_one_fed_with_two_directions():
    torch.manual_seed(0)
    net = nn.ModuleDict({"noise": nn.Linear(12, 20), "two": nn.Linear(12, 20)})
    found = {}
    for name, x in (("noise", torch.randn(500, 12)), ("two", torch.randn(500, 2) @ torch.randn(2, 12))):
        x = x + 1e-3 * torch.randn(500, 12)
        found[name] = observed(nn.Sequential(net[name]), [x])["0"]
    shapes = dict.fromkeys(net, (20, 12))
    assert EVARanks(Statistics(found, 1)).ranks(shapes, 4) == {"noise": 6, "two": 2}
    assert EVARanks(Statistics(found, 1)).ranks(shapes, 1) == {"noise": 0, "two": 2}


def test_ties_go_to_the_earlier_layer_and_inputs_that_do_not_vary_get_nothing():
    same = {"a": [0.3, 0.2, 0.1], "b": [0.3, 0.2, 0.1], "c": [0.3, 0.2, 0.1]}
    shapes = dict.fromkeys("abc", (12, 12))
    assert EVARanks(explained(same, shapes), 3.0).ranks(shapes, 1) == {"a": 1, "b": 1, "c": 1}
    two = {"a": same["a"], "b": same["b"]}
    assert EVARanks(explained(two, shapes), 1.5).ranks(dict.fromkeys("ab", (12, 12)), 2) == {"a": 2, "b": 2}
    nan = float("nan")
    flat = {"a": [nan] * 4, "b": [0.5, 0.3, 0.1, 0.05], "c": [0.0] * 4}
    assert EVARanks(explained(flat), 2.0).ranks(THREE, 2) == {"a": 2, "b": 4, "c": 0}  # two ranks nobody varies for
    assert EVARanks(explained(flat), 2.0, least=1).ranks(THREE, 2) == {"a": 1, "b": 4, "c": 1}
    odd = {"a": [0.5, 0.2], "b": [0.5, 0.2], "c": [0.1, 0.05]}
    assert EVARanks(explained(odd)).ranks(THREE, 1) == {"a": 2, "b": 1, "c": 0}  # the owner of a shared input is first


def test_small_layers_are_full_and_the_rest_of_the_budget_goes_elsewhere():
    shapes = {"small": (3, 20), "large": (20, 20)}
    found = explained({"small": [0.5, 0.4, 0.1], "large": [0.1] * 8}, shapes)
    assert EVARanks(found).ranks(shapes, 4) == {"small": 3, "large": 5}
    tiny = {"small": (3, 20)}
    assert EVARanks(found).ranks(tiny, 4) == {"small": 3}


def test_too_few_components_or_impossible_options_are_refused():
    found = explained({"a": [0.5] * 8, "b": [0.5] * 5, "c": [0.5] * 8})
    with pytest.raises(DataError, match=r"rho=2.0 and rank=4 ask for 8 directions of the inputs of 'b'.* have 5"):
        EVARanks(found).ranks(THREE, 4)
    with pytest.raises(ConfigError, match=r"rho=0.5"):
        EVARanks(found, 0.5)
    with pytest.raises(ConfigError, match="least=3 is above the mean rank=2"):
        EVARanks(found, least=3).ranks(THREE, 2)
    with pytest.raises(DataError, match="'d' is not among the 3 layers"):
        EVARanks(found).ranks({"d": (12, 12)}, 2)
    with pytest.raises(ConfigError, match="budget='eva' needs data"):
        budget_of("eva")


# -- LaMDA++ ----------------------------------------------------------------------------------------------------------

FLAT, STEEP, MILD = torch.ones(64), 1 / torch.arange(1, 65) ** 2, 1 / torch.arange(1, 65)


def test_flat_spectra_get_the_rank_that_steep_ones_do_not_need():
    statistics, shapes = curves(a=FLAT, b=STEEP, c=FLAT, d=MILD)
    assert LaMDARanks(statistics, 4, 32).ranks(shapes, 16) == {"a": 28, "b": 4, "c": 28, "d": 4}
    equal, shapes = curves(a=MILD, b=MILD, c=MILD)
    assert LaMDARanks(equal).ranks(shapes, 16) == {"a": 16, "b": 16, "c": 16}


def test_energy_is_of_the_whole_spectrum_and_both_bounds_are_kept():
    statistics, shapes = curves(a=FLAT, b=STEEP, c=torch.zeros(64), d=MILD)
    ranks = LaMDARanks(statistics).ranks(shapes, 8)
    assert sum(ranks.values()) <= 32
    assert ranks["c"] == 4  # the least, half the mean: nothing is left to explain
    assert ranks["a"] == 16
    cores = LaMDARanks(statistics, budget="params").ranks(shapes, 8)
    assert sum(r * r for r in cores.values()) <= 4 * 64 < sum(r * r for r in ranks.values())
    weight = torch.randn(30, 20)
    spectrum = {"a": LayerStatistics((30, 20), spectrum=torch.linalg.svdvals(weight))}
    assert LaMDARanks(Statistics(spectrum, 0)).ranks({"a": (30, 20)}, 4) == {"a": 4}


def test_what_lamda_cannot_have_is_refused():
    statistics, shapes = curves(a=FLAT)
    for given, message in (({"least": 0}, "least=0"), ({"most": 0}, "most=0"), ({"budget": "bytes"}, "budget='bytes'")):
        with pytest.raises(ConfigError, match=message):
            LaMDARanks(statistics, **given)
    with pytest.raises(ConfigError, match="least=20, mean=16"):
        LaMDARanks(statistics, least=20).ranks(shapes, 16)
    with pytest.raises(DataError, match=r"no spectrum of 'a'.*want=\{'spectrum'\}"):
        LaMDARanks(scored({"a": 1.0}, {"a": (12, 12)})).ranks({"a": (12, 12)}, 4)


# -- CoLoRA -----------------------------------------------------------------------------------------------------------

NET = {"first": (64, 27), "wide": (64, 576), "down": (128, 576), "middle": (128, 1152), "last": (3, 576)}


def counted(plan, shapes):
    return sum(min(r * sum(shapes[n]), math.prod(shapes[n])) for n, r in plan.ranks.items())


@pytest.mark.parametrize("share", [0.02, 0.07, 0.3])
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0])
def test_the_budget_is_kept_and_no_rank_is_left_over(share, sharpness):
    torch.manual_seed(2)
    for _ in range(8):
        scores = dict(zip(NET, torch.rand(5).tolist(), strict=True))
        plan = CoLoRARanks(scored(scores, NET), share, sharpness).plan(NET)
        whole = sum(math.prod(shape) for shape in NET.values())
        assert plan.budget == int(share * whole)
        assert plan.trained == counted(plan, NET) <= plan.budget
        for name, shape in NET.items():
            full = -(-math.prod(shape) // sum(shape))
            assert 0 <= plan.ranks[name] <= full
            assert (name in plan.dense) == (plan.ranks[name] == full)
            if name not in plan.dense:
                more = plan.ranks | {name: plan.ranks[name] + 1}
                assert counted(type(plan)(more, plan.dense, 0, 0), NET) > plan.budget
        ranks = CoLoRARanks(scored(scores, NET), share, sharpness).ranks(NET, 8)
        assert sum(r * sum(NET[name]) for name, r in ranks.items()) <= plan.budget
        assert all(r == plan.ranks[name] for name, r in ranks.items() if name not in plan.dense)


def test_shares_follow_the_scores_by_the_equation():
    shapes = dict.fromkeys("abcd", (200, 200))
    scores = {"a": 4.0, "b": 2.0, "c": 1.0, "d": 0.0}
    for sharpness in (0.5, 1.0, 2.0):
        plan = CoLoRARanks(scored(scores, shapes), 0.1, sharpness).plan(shapes)
        x = {name: (score / 4) ** sharpness for name, score in scores.items()}
        alpha = 0.1 * 4 / sum(x.values())
        wanted = {name: alpha * value * 100 for name, value in x.items()}  # delta d k / (d + k)
        assert all(abs(plan.ranks[name] - wanted[name]) <= 1 for name in shapes)
        assert sum(plan.ranks.values()) == 40
        assert list(plan.ranks.values()) == sorted(plan.ranks.values(), reverse=True)
        assert plan.ranks["d"] == 0
    clipped = CoLoRARanks(scored({"a": 1000.0, "b": 1.0, "c": 1.0, "d": 1.0}, shapes), 0.4).plan(shapes)
    assert clipped.ranks == {"a": 100, "b": 20, "c": 20, "d": 20}
    assert clipped.dense == {"a"}


def test_all_rank_goes_to_the_only_layer_that_changed_and_none_to_frozen_ones():
    plan = CoLoRARanks(scored({n: float(n == "down") for n in NET}, NET), 0.07).plan(NET)
    assert [name for name, r in plan.ranks.items() if r] == ["down"]
    assert plan.trained == 26 * (128 + 576)  # of 18,305
    ranks = CoLoRARanks(scored({n: float(n == "first") for n in NET}, NET), 0.9).plan(NET)
    assert ranks.trained == 64 * 27  # all of it, and no more, whatever the budget
    assert ranks.dense == {"first"}


def test_equal_scores_are_uniform_ranks_and_so_are_none():
    shapes = dict.fromkeys("abcd", (96, 48))
    for value in (0.3, 0.0):
        budget = CoLoRARanks(scored(dict.fromkeys("abcd", value), shapes))
        assert budget.ranks(shapes, 5) == dict.fromkeys("abcd", 5)
    share = CoLoRARanks(scored(dict.fromkeys("abcd", 1.0), shapes), 0.25).ranks(shapes, 8)
    assert share == dict.fromkeys("abcd", 8)  # 0.25 * 96 * 48 / 144


def test_the_whole_budget_makes_every_layer_dense():
    plan = CoLoRARanks(scored(dict(zip(NET, (1.0, 0.5, 0.1, 2.0, 1e-3), strict=True)), NET), 1.0).plan(NET)
    assert plan.dense == set(NET)
    assert plan.trained == plan.budget == sum(math.prod(shape) for shape in NET.values())
    ranks = CoLoRARanks(scored(dict.fromkeys(NET, 1.0), NET), 1.0).ranks(NET, 8)
    assert all(r * sum(NET[n]) <= math.prod(NET[n]) < (r + 1) * sum(NET[n]) for n, r in ranks.items())


def test_floors_hold_and_tasks_are_averaged():
    scores = {"first": 1.0, "wide": 0.0, "down": 0.0, "middle": 0.0, "last": 0.0}
    least = CoLoRARanks(scored(scores, NET), 0.07, least=1).plan(NET)
    assert min(least.ranks.values()) >= 1
    assert least.trained <= least.budget
    floor = CoLoRARanks(scored(scores, NET), 0.07, floor=0.03).plan(NET)
    assert floor.ranks["middle"] >= int(0.03 * 128 * 1152 / 1280) == 3
    with pytest.raises(ConfigError, match=r"floor=0.2 and least=0 alone train"):
        CoLoRARanks(scored(scores, NET), 0.07, floor=0.2).plan(NET)
    one, two = (
        scored({"a": 8.0, "b": 0.0}, {"a": (9, 9), "b": (9, 9)}),
        scored({"a": 0.1, "b": 0.4}, {"a": (9, 9), "b": (9, 9)}),
    )
    assert CoLoRARanks([one, two]).scores({"a": (9, 9), "b": (9, 9)}) == {"a": 0.625, "b": 0.5}


def test_what_colora_cannot_have_is_refused():
    found = scored(dict.fromkeys(NET, 1.0), NET)
    bad = [
        ({"share": 0.0}, "share=0.0"), ({"share": 1.5}, "share=1.5"), ({"sharpness": 0.0}, "sharpness=0.0"),
        ({"floor": -0.1}, "floor=-0.1"), ({"least": -1}, "least=-1"),
    ]  # fmt: skip
    for given, message in bad:
        with pytest.raises(ConfigError, match=message):
            CoLoRARanks(found, **given)
    with pytest.raises(ConfigError, match=r"statistics=\[\] names no task"):
        CoLoRARanks([])
    with pytest.raises(DataError, match="the contribution of 'last' is nan"):
        CoLoRARanks(scored({**dict.fromkeys(NET, 1.0), "last": float("nan")}, NET)).plan(NET)
    with pytest.raises(DataError, match=r"no contribution of 'a'.*want=\{'contribution'\}"):
        CoLoRARanks(explained({"a": [0.5]})).plan({"a": (20, 12)})
