"""CoDyRA: the rising threshold, and tasks that are merged one after another."""

from __future__ import annotations

import copy

import pytest
import torch
from one_layer import LAYERS, OneLayer, inputs, train, with_matrix
from torch import Tensor, nn

from fallow.core.errors import ConfigError
from fallow.core.views import view_of
from fallow.deltas.codyra import CoDyRA

ALL = sorted(LAYERS)


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    model, x = OneLayer(layer, "codyra", **{"rank": 4, **options}), inputs(layer)
    model.delta.randomize()
    return model, x


@pytest.mark.parametrize("kind", ALL)
def test_a_task_starts_at_the_last_ones_model_and_w_b_diag_w_a_has_no_scale(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]().double()
    model, x = OneLayer(layer, "codyra", rank=4), inputs(layer)
    assert torch.equal(model(x), layer(x))
    model.delta.randomize()
    delta = model.delta
    a, b, g = (p.detach().clone().requires_grad_() for p in (delta.A, delta.B, delta.gate))
    w = view_of(layer).read(layer.weight) + b @ torch.diag(g) @ a
    want = with_matrix(layer, w, x)
    got = model(x)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    for ours, reference in ((delta.A, a), (delta.B, b), (delta.gate, g)):
        torch.testing.assert_close(ours.grad, reference.grad)
    torch.testing.assert_close(model.by_merged(x), got)


def test_kappa_is_zero_in_the_dense_part_then_rises_to_its_highest_at_the_end() -> None:
    delta = OneLayer(nn.Linear(16, 16), "codyra").delta
    kappas = [delta.xi(step, 500) for step in range(1, 501)]
    assert kappas[:250] == [0.0] * 250
    assert kappas[250] == pytest.approx(5e-3 / 250)
    assert kappas == sorted(kappas)
    assert kappas[-1] == pytest.approx(5e-3)
    short = [delta.xi(step, 20) for step in range(1, 21)]  # the official levels would all be 0 here
    assert short[9] == 0.0
    assert short[10] > 0
    assert short[-1] == pytest.approx(5e-3)
    always = OneLayer(nn.Linear(16, 16), "codyra", dense=0.0).delta
    assert always.xi(1, 10) == pytest.approx(5e-4)
    never = OneLayer(nn.Linear(16, 16), "codyra", dense=1.0).delta
    assert never.xi(10, 10) == 0.0
    falling = OneLayer(nn.Linear(16, 16), "codyra", threshold_mode="lr").delta
    assert falling.xi(8, 10) == pytest.approx(5e-3 * 0.6 * 0.3)


def test_without_a_task_gradient_weights_lose_the_sum_of_kappas() -> None:
    model, _ = adapted("linear", rank=12, max_kappa=0.1)
    start = model.delta.gate.detach().clone()
    total = sum(model.delta.xi(step, 20) for step in range(1, 21))
    for step in range(1, 21):
        model.delta.on_step(step, 20)
    assert total == pytest.approx(0.1 * 5.5)
    want = start.sign() * (start.abs() - total).clamp(min=0)
    torch.testing.assert_close(model.delta.gate.detach(), want)
    assert 0 < int((want == 0).sum()) < 12


def test_the_official_setting_zeroes_about_half_of_the_gates_whatever_the_data() -> None:
    torch.manual_seed(0)
    delta = OneLayer(nn.Linear(2000, 2000), "codyra", rank=2000).delta
    for step in range(1, 501):
        delta.on_step(step, 500)
    assert float((delta.gate == 0).float().mean()) == pytest.approx(0.48, abs=0.03)


@pytest.mark.parametrize("kind", ALL)
def test_kept_weights_are_the_rank_of_the_change_and_the_rest_can_go(kind: str) -> None:
    model, x = adapted(kind)
    with torch.no_grad():
        model.delta.gate.copy_(torch.tensor([0.0, 1.1, 0.0, -0.6]))
    before, change = model(x), model.delta.delta_weight()
    kept = int((model.delta.importance() > 0).sum())
    assert kept == 2 == int(torch.linalg.matrix_rank(change))
    model.delta.resize(kept)
    assert model.delta.o.rank == 2
    assert model.delta.gate.shape == (2,)
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(model.delta.delta_weight(), change)


def test_three_tasks_add_up_and_one_can_be_taken_back() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 20)
    start, changes = layer.weight.detach().clone(), []
    for _ in range(3):
        task = OneLayer(layer, "codyra", rank=3)
        x = inputs(layer)
        assert torch.equal(task(x), layer(x))
        task.delta.randomize()
        with torch.no_grad():
            task.delta.gate[1] = 0.0
        trained = task(x)
        changes.append(task.delta.delta_weight().detach())
        layer.weight.data = task.merged()
        torch.testing.assert_close(layer(x), trained)
    torch.testing.assert_close(layer.weight - start, sum(changes), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight - changes[1], start + changes[0] + changes[2], rtol=1e-5, atol=1e-5)


def test_with_a_kappa_of_zero_it_is_plain_lora_whose_gates_never_shrink() -> None:
    model, _ = adapted("linear", max_kappa=0.0)
    start = model.delta.gate.detach().clone()
    for step in range(1, 11):
        model.delta.on_step(step, None)
    assert torch.equal(model.delta.gate, start)
    assert model.delta.loss() is None


def test_a_run_of_unknown_length_is_refused_by_name() -> None:
    model, _ = adapted("linear")
    with pytest.raises(ConfigError, match=r"'codyra' raises its threshold over the run.*resolve\(model, total\)"):
        model.delta.on_step(1, None)


def test_parameter_count_is_rank_times_out_plus_in_plus_one() -> None:
    model, _ = adapted("grouped")
    out, inner = model.view.shape
    assert CoDyRA.parameter_count((out, inner), model.delta.o) == 4 * (out + inner + 1)
    assert sum(p.numel() for p in model.delta.parameters()) == 4 * (out + inner + 1)


def test_weights_are_float32_on_a_bf16_base() -> None:
    model, x = adapted("linear", torch.bfloat16)
    assert model.delta.gate.dtype == torch.float32
    assert model(x).dtype == torch.bfloat16
    wide = OneLayer(nn.Linear(12, 20).double(), "codyra", rank=4)
    wide.layer.load_state_dict({k: v.double() for k, v in model.layer.state_dict().items()})
    wide.delta.load_state_dict(model.delta.state_dict())
    torch.testing.assert_close(model(x).double(), wide(x.double()), rtol=0.02, atol=0.02)


def test_a_loaded_state_continues_bit_for_bit() -> None:
    model, x = adapted("linear", torch.float32, max_kappa=0.1)
    optimizer = torch.optim.Adam(model.delta.parameters(), 1e-2)
    train(model, optimizer, x, range(1, 6))
    other = OneLayer(model.layer, "codyra", rank=4, max_kappa=0.1)
    other.delta.load_state_dict(model.delta.state_dict())
    second = torch.optim.Adam(other.delta.parameters(), 1e-2)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, x, range(6, 9))
    train(other, second, x, range(6, 9))
    assert torch.equal(model.delta.gate, other.delta.gate)
    assert torch.equal(model.delta.B, other.delta.B)


@pytest.mark.parametrize(
    "given", [{"max_kappa": -1.0}, {"dense": 1.5}, {"gate_init": "zeros"}, {"threshold_mode": "up"}, {"rank": 0},
              {"compat_2xi": None}],
)  # fmt: skip
def test_bad_options_are_refused_by_name(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        CoDyRA.Options(**given)
