"""DyLoRA: what a drawn rank computes and trains, and that one adapter works at every rank."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from one_layer import LAYERS, OneLayer, backward_both, inputs, train, with_matrix
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fallow.core.errors import ConfigError, ModelError
from fallow.core.views import view_of
from fallow.deltas.dylora import DyLoRA

ALL = sorted(LAYERS)


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    model, x = OneLayer(layer, "dylora", context={}, **{"rank": 4, **options}), inputs(layer)
    model.delta.randomize()
    return model, x


def whole_factors(delta: DyLoRA) -> tuple[Tensor, Tensor]:
    """B (out, R) and A (R, in)"""
    params = dict(delta.named_parameters())
    count = len(params) // 2
    return torch.cat([params[f"B{i}"] for i in range(count)], 1), torch.cat([params[f"A{i}"] for i in range(count)])


def grads(delta: DyLoRA, letter: str) -> list[bool]:
    """Which units have a gradient that is not zero."""
    params = dict(delta.named_parameters())
    found = [params[f"{letter}{i}"].grad for i in range(len(params) // 2)]
    return [grad is not None and bool((grad != 0).any()) for grad in found]


@pytest.mark.parametrize("kind", ALL)
def test_output_is_unchanged_at_the_start_at_every_rank(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    model, x = OneLayer(layer, "dylora", context={}, rank=4), inputs(layer)
    for rank in range(1, 5):
        model.delta.drawn = rank
        assert torch.equal(model.train()(x), layer(x))
        model.delta.context["rank"] = rank
        assert torch.equal(model.eval()(x), layer(x))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("update", ["frozen", "full"])
@pytest.mark.parametrize("strict", [True, False])
def test_at_a_drawn_rank_the_layer_is_that_of_the_leading_ranks(kind: str, update: str, strict: bool) -> None:
    model, x = adapted(kind, update=update, strict=strict, alpha=5.0)
    layer, delta, rank = model.layer, model.delta, 3
    delta.drawn = rank
    b, a = (t.detach().clone().requires_grad_() for t in whole_factors(delta))
    if update == "full":
        change = 5 / rank * b[:, :rank] @ a[:rank]
    else:
        change = 5 / rank * (b[:, : rank - 1].detach() @ a[: rank - 1].detach() + b[:, 2:3] @ a[2:3])
    w = view_of(layer).read(layer.weight) + change
    want = with_matrix(layer, w, x)
    got = model(x)
    backward_both(got, want)
    ours_b, ours_a = (
        torch.cat(
            [p.grad if p.grad is not None else torch.zeros_like(p) for n, p in delta.named_parameters() if n[0] == s], d
        )
        for s, d in (("B", 1), ("A", 0))
    )
    torch.testing.assert_close(ours_a, a.grad)
    torch.testing.assert_close(ours_b, b.grad)
    trained = [update == "full", update == "full", True, False]
    if strict:
        assert grads(delta, "A") == grads(delta, "B") == trained
        assert [getattr(delta, f"A{i}").grad is not None for i in range(4)] == trained


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_ranks_above_the_chosen_one_have_no_part_even_as_nan(kind: str) -> None:
    model, x = adapted(kind)
    model.eval()
    b, a = whole_factors(model.delta)
    model.delta.context["rank"] = 2
    want = view_of(model.layer).read(model.layer.weight) + 8 * b[:, :2] @ a[:2]
    with torch.no_grad():
        model.delta.A2.fill_(float("nan"))
        model.delta.B3.fill_(float("nan"))
    torch.testing.assert_close(model.merged(), want.detach())
    torch.testing.assert_close(model.by_merged(x), model(x))
    model.train().delta.drawn = 2
    assert bool(torch.isfinite(model(x)).all())


def test_in_training_a_merge_is_at_the_chosen_rank_not_at_the_drawn_one() -> None:
    model, _ = adapted("linear")
    model.train().delta.drawn = 1
    b, a = whole_factors(model.delta)
    torch.testing.assert_close(model.merged(), model.layer.weight + (4.0 * b @ a).detach())
    first = model.merged()
    model.delta.context["rank"] = 2
    assert not torch.allclose(model.merged(), first)


@pytest.mark.parametrize("unit", [1, 2])
def test_a_frozen_step_moves_the_drawn_unit_alone_after_warm_moments_and_weight_decay(unit: int) -> None:
    model, x = adapted("linear", unit=unit)
    delta = model.delta
    optimizer = torch.optim.AdamW(delta.parameters(), 1e-2, weight_decay=0.1)
    for rank in [*range(unit, 5, unit), unit]:  # every unit has moments, then the first is trained again
        before = [t.detach().clone() for t in whole_factors(delta)]
        delta.drawn = rank
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        after = whole_factors(delta)
        moved = [(after[0] != before[0]).any(0).tolist(), (after[1] != before[1]).any(1).tolist()]
        assert moved[0] == moved[1] == [rank - unit <= i < rank for i in range(4)]
    assert [int(optimizer.state[getattr(delta, f"A{i}")]["step"]) for i in range(4 // unit)] == [2] + [1] * (
        4 // unit - 1
    )


def test_a_full_step_moves_exactly_the_units_below_the_rank() -> None:
    model, x = adapted("linear", update="full")
    optimizer = torch.optim.AdamW(model.delta.parameters(), 1e-2, weight_decay=0.1)
    for rank in (4, 2):
        before = whole_factors(model.delta)[1].detach().clone()
        model.delta.drawn = rank
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        assert (whole_factors(model.delta)[1] != before).any(1).tolist() == [i < rank for i in range(4)]


def test_as_in_the_official_code_resting_units_move_where_strict_is_off() -> None:
    model, x = adapted("linear", strict=False)
    optimizer = torch.optim.AdamW(model.delta.parameters(), 1e-2, weight_decay=0.1)
    for rank in (2, 4):
        before = model.delta.A0.detach().clone()
        model.delta.drawn = rank
        optimizer.zero_grad()
        model(x).square().sum().backward()
        assert (model.delta.A0.grad != 0).any(1).tolist() == [i == rank - 1 for i in range(4)]
        optimizer.step()
    assert (before != model.delta.A0).any(1).tolist() == [True] * 4


def test_at_the_first_step_the_gradient_of_a_is_zero() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 20)
    model = OneLayer(layer, "dylora", rank=4)
    model.delta.drawn = 3
    model(inputs(layer)).square().sum().backward()
    assert grads(model.delta, "A") == [False] * 4
    assert grads(model.delta, "B") == [False, False, True, False]


@pytest.mark.parametrize("kind", ALL)
def test_a_cut_is_the_lora_of_that_rank_and_the_same_alpha(kind: str) -> None:
    model, x = adapted(kind, alpha=6.0)
    model.eval()
    model.delta.context["rank"] = 2
    before = model(x)
    model.delta.context.clear()
    model.delta.resize(2)
    torch.testing.assert_close(model(x), before)
    b, a = whole_factors(model.delta)
    plain = OneLayer(model.layer, "lora", rank=2, alpha=6.0)
    plain.delta.load_state_dict({"A": a, "B": b})
    torch.testing.assert_close(plain(x), before)
    assert model.delta.importance().shape == (2,)


def test_growth_leaves_the_leading_ranks_and_importance_falls() -> None:
    model, x = adapted("linear")
    model.eval().delta.context["rank"] = 3
    before = model(x)
    model.delta.resize(6)
    torch.testing.assert_close(model(x), before)
    worth = model.delta.importance()
    assert worth.tolist() == sorted(worth.tolist(), reverse=True)
    b, a = whole_factors(model.delta)
    torch.testing.assert_close(worth[0], 16 / 6 * (b.norm(dim=0) * a.norm(dim=1)).sum().detach())
    assert worth[4:].tolist() == [0.0, 0.0]


def test_all_layers_draw_the_same_rank_in_a_step_and_ranks_are_uniform() -> None:
    first, second = OneLayer(nn.Linear(9, 9), "dylora"), OneLayer(nn.Conv2d(9, 9, 1), "dylora", name="other")
    seen: Counter[int] = Counter()
    for step in range(2000):
        first.delta.on_step(step, 2000)
        second.delta.on_step(step, None)
        assert first.delta.drawn == second.delta.drawn
        seen[first.delta.drawn] += 1
    assert sorted(seen) == list(range(1, 9))
    chi_square = sum((seen[rank] - 250) ** 2 / 250 for rank in range(1, 9))
    assert chi_square < 24.3  # the 99.9th percentile at 7 degrees of freedom
    other = OneLayer(nn.Linear(9, 9), "dylora", seed=1).delta
    assert [other.draw(i) for i in range(50)] != [first.delta.draw(i) for i in range(50)]


def test_draws_stay_in_range_in_units_and_lean_low_where_asked() -> None:
    delta = OneLayer(nn.Linear(9, 9), "dylora", unit=2, rank_min=4).delta
    assert {delta.draw(i) for i in range(200)} == {4, 6, 8}
    delta = OneLayer(nn.Linear(9, 9), "dylora", unit=4).delta
    assert {delta.draw(i) for i in range(200)} == {4, 8}
    low = OneLayer(nn.Linear(9, 9), "dylora", geometric=0.5).delta
    share = Counter(low.draw(i) for i in range(2000))
    assert share[1] / 2000 == pytest.approx(0.5, abs=0.04)
    assert share[2] / 2000 == pytest.approx(0.25, abs=0.04)
    assert OneLayer(nn.Linear(9, 9), "dylora", rank_min=8).delta.drawn == 8


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_again_at_the_same_rank(reentrant: bool) -> None:
    model, x = adapted("linear")
    model.delta.on_step(5, None)
    x.requires_grad_()
    model(x).square().sum().backward()
    want = {n: p.grad.clone() for n, p in model.delta.named_parameters() if p.grad is not None}
    model.delta.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    got = {n: p.grad for n, p in model.delta.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_always_at_full_rank_it_is_loras_trajectory() -> None:
    ours, x = adapted("linear", update="full", rank_min=4, alpha=6.0)
    plain = OneLayer(ours.layer, "lora", rank=4, alpha=6.0)
    b, a = whole_factors(ours.delta)
    plain.delta.load_state_dict({"A": a, "B": b})
    for model in (ours, plain):
        optimizer = torch.optim.AdamW(model.delta.parameters(), 1e-2)
        for step in range(1, 11):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            model.delta.on_step(step, 10)
    torch.testing.assert_close(whole_factors(ours.delta)[1], plain.delta.A.data, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strict", [True, False])
def test_a_loaded_state_continues_bit_for_bit_at_the_same_draws(strict: bool) -> None:
    model, x = adapted("linear", torch.float32, strict=strict)
    optimizer = torch.optim.Adam(model.delta.parameters(), 1e-2)
    train(model, optimizer, x, range(1, 6))
    other = OneLayer(model.layer, "dylora", rank=4, strict=strict)
    other.delta.load_state_dict(model.delta.state_dict())
    assert other.delta.drawn == model.delta.drawn == model.delta.draw(5) != model.delta.draw(0)
    second = torch.optim.Adam(other.delta.parameters(), 1e-2)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, x, range(6, 9))
    train(other, second, x, range(6, 9))
    assert all(torch.equal(p, q) for p, q in zip(model.delta.parameters(), other.delta.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "embedding"])
def test_parameter_count_is_rank_times_out_plus_in(kind: str) -> None:
    model, _ = adapted(kind)
    out, inner = model.view.shape
    assert DyLoRA.parameter_count((out, inner), model.delta.o) == 4 * (out + inner)
    assert sum(p.numel() for p in model.delta.parameters()) == 4 * (out + inner)


def test_on_a_bf16_base_factors_are_float32_and_no_float32_copy_of_x_is_kept() -> None:
    model = OneLayer(nn.Linear(64, 64).bfloat16(), "dylora", rank=4)
    model.delta.randomize()
    x, kept = torch.randn(500, 64).bfloat16(), []

    def pack(t: Tensor) -> Tensor:
        kept.append((tuple(t.shape), t.dtype))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    assert out.dtype == torch.bfloat16
    assert ((500, 64), torch.float32) not in kept
    assert model.delta.A0.dtype == torch.float32
    wide = OneLayer(nn.Linear(64, 64).double(), "dylora", rank=4)
    wide.layer.load_state_dict({k: v.double() for k, v in model.layer.state_dict().items()})
    wide.delta.load_state_dict(model.delta.state_dict())
    torch.testing.assert_close(out.double(), wide(x.double()), rtol=0.02, atol=0.05)


def test_the_change_counts_scale_times() -> None:
    model, x = adapted("linear")
    full = model(x) - model.layer(x)
    model.scale = 0.25
    torch.testing.assert_close(model(x) - model.layer(x), 0.25 * full)


def test_it_compiles_into_one_graph_for_each_rank() -> None:
    model, x = adapted("linear", torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rank in (2, 3):
        model.delta.drawn = rank
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    "given", [{"rank": 0}, {"rank_min": 9}, {"unit": 3}, {"update": "half"}, {"geometric": 1.0}, {"strict": "no"},
              {"alpha": 0.0}, {"dropout": 1.0}, {"rank_min": 3, "unit": 2}],
)  # fmt: skip
def test_bad_options_are_refused_by_name(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        DyLoRA.Options(**given)


def test_a_rank_that_is_not_there_and_a_parameter_view_are_refused_by_name() -> None:
    model, x = adapted("linear", unit=2)
    for rank, said in ((3, "rank=3 must be a multiple of unit=2"), (5, "rank=5 must be a whole number.*at most 4")):
        model.delta.context["rank"] = rank
        with pytest.raises(ConfigError, match=said):
            model.eval()(x)
    with pytest.raises(ConfigError, match="unit=2 must divide rank=3"):
        model.delta.resize(3)
    assert model.delta.o.rank == 4
    holder = nn.MultiheadAttention(8, 2)
    holder.weight = holder.in_proj_weight
    with pytest.raises(ModelError, match=r"'dylora' cannot adapt 'layer'.*kind 'parameter'"):
        OneLayer(holder, "dylora", rank=2)
