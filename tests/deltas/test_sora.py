"""SoRA: exact thresholds, gates that fall and return, and what is left when they are cut."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from one_layer import LAYERS, OneLayer, backward_both, inputs, train, with_matrix
from torch import Tensor, nn

import fallow
from fallow.core import schedule
from fallow.core.errors import ConfigError
from fallow.core.views import view_of
from fallow.deltas.sora import SoRA, begin_stage, soft_threshold, stages

ALL = sorted(LAYERS)


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    model, x = OneLayer(layer, "sora", **{"rank": 4, **options}), inputs(layer)
    model.delta.randomize()
    return model, x


def set_gates(delta: SoRA, *gates: float) -> None:
    with torch.no_grad():
        delta.gate.copy_(torch.tensor(gates))


@pytest.mark.parametrize("kind", ALL)
def test_output_is_unchanged_at_the_start_though_the_gates_are_normal(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    model, x = OneLayer(layer, "sora", rank=2), inputs(layer)
    assert torch.equal(model(x), layer(x))
    gates = OneLayer(nn.Linear(500, 500), "sora", rank=500).delta.gate
    assert float(gates.detach().std()) == pytest.approx(1.0, rel=0.1)
    assert gates.dtype == torch.float32
    assert torch.equal(OneLayer(nn.Linear(9, 9), "sora", gate_init="ones").delta.gate, torch.ones(8))


@pytest.mark.parametrize("kind", ALL)
def test_layer_is_w_plus_s_b_diag_g_a_in_values_and_gradients(kind: str) -> None:
    model, x = adapted(kind, alpha=6.0)
    layer, delta = model.layer, model.delta
    a, b, g = (p.detach().clone().requires_grad_() for p in (delta.A, delta.B, delta.gate))
    w = view_of(layer).read(layer.weight) + 1.5 * (b @ torch.diag(g) @ a)
    want = with_matrix(layer, w, x)
    got = model(x)
    backward_both(got, want)
    for ours, reference in ((delta.A, a), (delta.B, b), (delta.gate, g)):
        torch.testing.assert_close(ours.grad, reference.grad)
    torch.testing.assert_close(model.by_merged(x), got)
    model.scale = 0.5
    torch.testing.assert_close(model(x) - layer(x), 0.5 * (got - layer(x)))


def test_with_all_gates_one_it_is_pefts_lora() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 20).double()
    theirs = peft.get_peft_model(
        nn.Sequential(layer), peft.LoraConfig(r=4, lora_alpha=16, target_modules=["0"]), autocast_adapter_dtype=False
    ).double()
    ours = OneLayer(layer, "sora", rank=4, gate_init="ones", threshold=0.0)
    with torch.no_grad():
        ours.delta.B.normal_()
        theirs.base_model.model[0].lora_A["default"].weight.copy_(ours.delta.A)
        theirs.base_model.model[0].lora_B["default"].weight.copy_(ours.delta.B)
    x = inputs(layer)
    torch.testing.assert_close(ours(x), theirs(x))
    ours.delta.on_step(1, 10)
    assert torch.equal(ours.delta.gate, torch.ones(4, dtype=torch.float64))


def test_soft_threshold_is_exact_and_the_official_one_loses_all_below_two_xi() -> None:
    x = torch.tensor([1.001, 1.5, 1.999, 2.0, 1.0, -1.0, 0.0, 0.3, -3.0], dtype=torch.float64)
    exact = torch.tensor([0.001, 0.5, 0.999, 1.0, 0.0, 0.0, 0.0, 0.0, -2.0], dtype=torch.float64)
    official = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, -1.0, 0.0, 0.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(soft_threshold(x, 1.0), exact)
    assert torch.equal(soft_threshold(x, 1.0, compat_2xi=True), official)
    x = torch.randn(1000, dtype=torch.float64)
    torch.testing.assert_close(soft_threshold(x, 0.7), x.sign() * (x.abs() - 0.7).clamp(min=0))


@pytest.mark.parametrize("mode", ["lr", "constant"])
def test_without_a_task_gradient_gates_lose_the_sum_of_the_thresholds(mode: str) -> None:
    model, _ = adapted("linear", rank=12, threshold=0.05, threshold_mode=mode)
    start = model.delta.gate.detach().clone()
    for step in range(1, 11):
        model.delta.on_step(step, 10)
    total = 0.5 if mode == "constant" else sum(0.05 * (1 - i / 10) for i in range(10))
    want = start.sign() * (start.abs() - total).clamp(min=0)
    torch.testing.assert_close(model.delta.gate.detach(), want)
    assert 0 < int((want == 0).sum()) < 12


def test_the_threshold_follows_the_learning_rate_where_it_is_told() -> None:
    context: dict[str, float] = {}
    model = OneLayer(nn.Linear(9, 9), "sora", context=context, rank=2, threshold=0.1, gate_init="ones")
    context["lr_share"] = 0.25
    model.delta.on_step(9, 10)
    torch.testing.assert_close(model.delta.gate.detach(), torch.full((2,), 0.975))
    context.clear()
    model.delta.on_step(9, None)  # of an unknown length: in full
    torch.testing.assert_close(model.delta.gate.detach(), torch.full((2,), 0.875))


@pytest.mark.parametrize("kind", ALL)
def test_a_gate_at_zero_may_return_while_its_row_and_column_rest(kind: str) -> None:
    model, x = adapted(kind)
    set_gates(model.delta, 0.7, 0.0, -0.4, 0.0)
    model(x).square().sum().backward()
    delta = model.delta
    assert bool((delta.gate.grad != 0).all())
    assert bool((delta.A.grad[[1, 3]] == 0).all())
    assert bool((delta.B.grad[:, [1, 3]] == 0).all())
    assert bool((delta.A.grad[[0, 2]] != 0).any())
    assert bool((delta.B.grad[:, [0, 2]] != 0).any())


def test_with_all_gates_zero_the_output_is_the_bases_and_gates_have_gradients() -> None:
    model, x = adapted("linear")
    set_gates(model.delta, 0.0, 0.0, 0.0, 0.0)
    got = model(x)
    assert torch.equal(got, model.layer(x))
    got.square().sum().backward()
    assert bool((model.delta.gate.grad != 0).all())


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_cutting_the_zeros_changes_no_output_and_leaves_a_lora_of_the_counted_size(kind: str, scaling: str) -> None:
    model, x = adapted(kind, scaling=scaling)
    set_gates(model.delta, 0.0, 0.9, 0.0, -0.4)
    before, s = model(x), model.delta.scaling
    survivors = int((model.delta.importance() > 0).sum())
    model.delta.resize(survivors)
    assert survivors == 2
    assert model.delta.gate.tolist() == pytest.approx([0.9, -0.4], rel=1e-6)
    torch.testing.assert_close(model(x), before)
    assert model.delta.scaling == pytest.approx(s)
    assert model.delta.o.alpha / model.delta.o.rank == pytest.approx(s)
    out, inner = model.view.shape
    b, a = model.delta.factors()
    assert a.numel() + b.numel() == 2 * (out + inner)
    torch.testing.assert_close(view_of(model.layer).read(model.layer.weight) + b @ a, model.merged())
    assert sum(p.numel() for p in model.delta.parameters()) == SoRA.parameter_count((out, inner), model.delta.o)


def test_growing_changes_no_output_and_adds_live_gates() -> None:
    model, x = adapted("conv")
    before = model(x)
    model.delta.resize(6)
    torch.testing.assert_close(model(x), before)
    assert model.delta.gate.shape == (6,)
    assert bool((model.delta.gate[4:] != 0).all())
    model(x).square().sum().backward()
    assert bool((model.delta.B.grad[:, 4:] != 0).any())


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "embedding"])
def test_parameter_count_is_rank_times_out_plus_in_plus_one(kind: str) -> None:
    model, _ = adapted(kind)
    out, inner = model.view.shape
    assert SoRA.parameter_count((out, inner), model.delta.o) == 4 * (out + inner + 1)
    assert sum(p.numel() for p in model.delta.parameters()) == 4 * (out + inner + 1)
    # the paper's 1.33M: the adapters of DeBERTaV3-base at rank 8, gates apart
    assert 12 * 8 * (4 * (768 + 768) + 2 * (768 + 3072)) == 1_327_104


def surviving(penalty: float, steps: int = 150) -> list[int]:
    """Surviving ranks of two layers after a task of rank 2 in the first and rank 1 in the second."""
    torch.manual_seed(1)
    first, second = (nn.Linear(10, 10, bias=False) for _ in range(2))
    layers = [OneLayer(layer, "sora", rank=6, alpha=6.0, threshold=penalty) for layer in (first, second)]
    x = torch.randn(256, 10)
    with torch.no_grad():
        u, v = torch.randn(10, 2), torch.randn(2, 10)
        mid = torch.tanh(x @ (first.weight + 0.3 * u @ v).T)
        want = mid @ (second.weight + 0.3 * torch.randn(10, 1) @ torch.randn(1, 10)).T
    optimizer = torch.optim.Adam([p for one in layers for p in one.parameters() if p.requires_grad], 1e-2)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        rows = torch.randint(256, (16,))
        (layers[1](torch.tanh(layers[0](x[rows]))) - want[rows]).square().mean().backward()
        optimizer.step()
        falling.step()
        for one in layers:
            one.delta.on_step(step, steps)
    return [int((one.delta.gate != 0).sum()) for one in layers]


def test_fewer_gates_survive_the_larger_the_threshold_and_layers_differ() -> None:
    left = [surviving(penalty) for penalty in (0.0, 5e-3, 8e-3, 2e-2, 5e-2)]
    assert left[0] == [6, 6]
    totals = [sum(pair) for pair in left]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] == 0
    assert 0 < totals[2] < 12
    assert any(a != b for a, b in left)


def test_stages_have_the_thresholds_of_the_papers_three_schedules() -> None:
    assert stages(0.0, 6e-4, 4) == pytest.approx([0.0, 2e-4, 4e-4, 6e-4])
    assert stages(1e-4, 8e-4, 4, "exp_linear") == pytest.approx([1e-4, 2e-4, 4e-4, 8e-4])
    log_linear = torch.linspace(math.e**0.5, math.e**2, 5, dtype=torch.float64).log().tolist()
    assert stages(0.5, 2.0, 5, "log_linear") == pytest.approx(log_linear)
    for given, told in (((0.0, 1e-3, 4, "exp_linear"), "first=0.0"), ((1e-3, 1e-4, 4), "last=0.0001"),
                        ((0.0, 1e-3, 1), "count=1"), ((0.0, 1e-3, 4, "cosine"), "shape='cosine'")):  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            stages(*given)


def test_a_stage_goes_on_from_the_weights_at_its_threshold_and_from_its_first_step() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    fallow.attach(model, "sora", rank=4, threshold=0.1)
    schedule.resolve(model, 2)
    gates = [param for name, param in model.named_parameters() if name.endswith("gate")]
    with torch.no_grad():
        for gate in gates:
            gate.fill_(1.0)
    for _ in range(2):  # without an optimizer: gates lose thresholds alone, which fall with the rate
        fallow.step(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(torch.allclose(gate, torch.tensor(0.85)) for gate in gates)
    begin_stage(model, 0.2, total=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for _ in range(4):
        fallow.step(model)
    assert all(torch.allclose(gate, torch.tensor(0.85 - 0.2 * (1 + 0.75 + 0.5 + 0.25))) for gate in gates)
    with pytest.raises(ConfigError, match="has no SoRA"):
        begin_stage(nn.Linear(2, 2), 0.1, total=4)


def test_the_l1_term_is_the_weighted_sum_of_gates_and_off_by_default() -> None:
    model, _ = adapted("linear", l1=0.5)
    torch.testing.assert_close(model.delta.loss(), 0.5 * model.delta.gate.abs().sum())
    assert adapted("linear")[0].delta.loss() is None


def test_gates_are_float32_on_a_bf16_base_and_half_gates_are_refused() -> None:
    model, x = adapted("linear", torch.bfloat16, threshold=1e-4)
    assert model.delta.gate.dtype == torch.float32
    assert model(x).dtype == torch.bfloat16
    start = model.delta.gate.detach().clone()
    model.delta.on_step(1, None)
    torch.testing.assert_close(start - model.delta.gate.detach(), 1e-4 * start.sign(), rtol=1e-2, atol=1e-6)
    with pytest.raises(ConfigError, match=r"gates of 'layer' are torch.bfloat16.*keep the adapter in float32"):
        model.delta.to(torch.bfloat16).on_step(1, None)


def test_a_loaded_state_continues_bit_for_bit() -> None:
    model, x = adapted("linear", torch.float32, threshold=0.02)
    optimizer = torch.optim.Adam(model.delta.parameters(), 1e-2)
    train(model, optimizer, x, range(1, 5))
    other = OneLayer(model.layer, "sora", rank=4, threshold=0.02)
    other.delta.load_state_dict(model.delta.state_dict())
    second = torch.optim.Adam(other.delta.parameters(), 1e-2)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, x, range(5, 9))
    train(other, second, x, range(5, 9))
    assert torch.equal(model.delta.gate, other.delta.gate)
    assert torch.equal(model.delta.A, other.delta.A)


def test_the_backward_keeps_no_second_hidden_result_for_the_gates() -> None:
    model = OneLayer(nn.Linear(64, 64), "sora", rank=8)
    x, sizes = torch.randn(500, 64), []

    def pack(t: Tensor) -> Tensor:
        sizes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    assert sizes.count((8, 500)) == 1  # h, as it is kept
    assert (500, 8) not in sizes


def test_it_compiles_into_one_graph() -> None:
    model, x = adapted("linear", torch.float32)
    want = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want)


@pytest.mark.parametrize(
    "given", [{"threshold": -1.0}, {"threshold_mode": "steps"}, {"gate_init": "zeros"}, {"l1": -1.0}, {"rank": 0},
              {"compat_2xi": 2}, {"dropout": 1.0}, {"alpha": 0.0}],
)  # fmt: skip
def test_bad_options_are_refused_by_name(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        SoRA.Options(**given)
