"""LaMDA against its equations: the spectral start, gradual freezing, what stays in which space, what is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from one_layer import LAYERS, OneLayer, inputs
from torch import nn

from fallow.core.errors import ConfigError
from fallow.deltas.lamda import LaMDA

each = pytest.mark.parametrize("kind", LAYERS)
splits = pytest.mark.parametrize("core", ["sigma", "identity", "sqrt"])


def on(layer, **given):
    return OneLayer(layer, LaMDA, **{"rank": 4, "dropout": 0.0, **given})


def train(model, steps, total=None, first=0, optimizer=None, accumulate=1, **settings):
    """AdamW on a random target; returns the optimizer."""
    optimizer = optimizer or torch.optim.AdamW(model.delta.parameters(), 1e-2, **settings)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            x = inputs(model.layer)
            (model(x) - 1).square().mean().backward()
        optimizer.step()
        model.delta.on_step(step + 1, total)
    return optimizer


@splits
@each
def test_the_start_is_the_base_and_its_factors_are_the_leading_singular_part(kind, core):
    layer = LAYERS[kind]()
    model, x = on(layer, core=core), inputs(layer)
    assert torch.equal(model(x), layer(x))
    weight = model.view.read(layer.weight)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    leading = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
    delta = model.delta
    assert torch.allclose(delta.B0 @ delta.S0 @ delta.A, leading, atol=1e-4)


@splits
@each
def test_values_and_gradients_equal_the_equation(kind, core):
    layer = LAYERS[kind]().double()
    model, x = on(layer, core=core), inputs(layer)
    delta = model.delta
    delta.randomize()
    if x.is_floating_point():
        x.requires_grad_()
    params = [*delta.parameters(), *([x] if x.is_floating_point() else [])]
    b, s = delta.B0 + delta.shift, delta.S0 + delta.core
    changed = model.view.read(layer.weight) + (b @ s - delta.B0 @ delta.S0) @ delta.A
    wanted = model.view.op(x, changed, getattr(layer, "bias", None))
    upstream = torch.randn_like(wanted)
    expected = torch.autograd.grad((wanted * upstream).sum(), params)
    got = model(x)
    assert torch.allclose(got, wanted, atol=1e-11)
    for ours, theirs in zip(torch.autograd.grad((got * upstream).sum(), params), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


@each
def test_merged_equals_unmerged_at_any_scale(kind):
    layer = LAYERS[kind]()
    model, x = on(layer), inputs(layer)
    model.delta.randomize()
    for scale in (1.0, 0.4):
        model.scale = scale
        assert torch.allclose(model(x), model.by_merged(x), atol=1e-4)
    b, a = model.delta.factors()
    assert torch.equal(model.delta.delta_weight(), b @ a)


def test_the_count_falls_from_r_squared_plus_r_out_to_r_squared():
    model = on(nn.Linear(12, 20), rank=5)
    assert model.delta.parameter_count((20, 12), model.delta.o) == 25 + 100
    assert sum(p.numel() for p in model.delta.parameters() if p.requires_grad) == 25 + 100
    train(model, 20, total=20)
    assert sum(p.numel() for p in model.delta.parameters() if p.requires_grad) == 25
    alone = on(nn.Linear(12, 20), rank=5, freeze=0)
    assert sum(p.numel() for p in alone.delta.parameters()) == 25
    assert alone.delta.parameter_count((20, 12), alone.delta.o) == 25


def test_columns_are_frozen_by_the_schedule_and_do_not_move_a_bit_afterwards():
    torch.manual_seed(1)
    model = on(nn.Linear(12, 20), rank=6)
    delta, optimizer, counts, seen = model.delta, None, [], {}
    for step in range(40):
        counts.append(int(delta.frozen))  # in force in step number `step`, from 0
        for column in range(counts[-1]):
            seen.setdefault(column, delta.shift[:, column].detach().clone())
        before = delta.shift.detach().clone()
        optimizer = train(model, 1, 100, step, optimizer, betas=(0.9, 0.999), weight_decay=0.1)
        moved = (delta.shift != before).any(0)
        assert moved.tolist() == [column >= counts[-1] for column in range(6)]
    assert counts == [min(6, 6 * step // 30) for step in range(40)]
    assert len(seen) == 6
    for column, value in seen.items():
        assert value.abs().max() > 0.01  # it was trained before
        assert torch.equal(value, delta.shift[:, column]), column
    assert delta.shift not in optimizer.state  # freed
    assert delta.core in optimizer.state


def test_steps_are_optimizer_steps_whatever_the_accumulation_and_a_whole_number_needs_no_total():
    model = on(nn.Linear(12, 20), freeze=8)
    train(model, 4, accumulate=3)
    assert int(model.delta.frozen) == 2
    train(model, 4, first=4, accumulate=3)
    assert not model.delta.shift.requires_grad


def test_on_several_processes_b_keeps_a_gradient_of_zero_and_its_place(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model = on(nn.Linear(12, 20), freeze=4)
    optimizer = train(model, 4, weight_decay=0.1)
    before = model.delta.shift.detach().clone()
    train(model, 3, first=4, optimizer=optimizer)
    assert model.delta.shift.requires_grad
    assert model.delta.shift.grad.abs().max() == 0
    assert torch.equal(model.delta.shift, before)


def test_a_copy_of_a_model_keeps_its_frozen_columns_too():
    model = on(nn.Linear(12, 20), freeze=8)
    train(model, 4)
    twin = copy.deepcopy(model)
    optimizer = train(twin, 1, first=4, weight_decay=0.1)
    before = twin.delta.shift.detach().clone()
    train(twin, 2, first=5, optimizer=optimizer)
    assert torch.equal(twin.delta.shift[:, :2], before[:, :2])
    assert not torch.equal(twin.delta.shift[:, 3], before[:, 3])


def test_a_frozen_column_has_no_gradient_that_clipping_would_count():
    model = on(nn.Linear(12, 20))
    model.delta.randomize()
    model.delta.on_step(50, 300)  # half of the 90 steps: 2 of 4 columns
    model(torch.randn(3, 12)).sum().backward()
    assert model.delta.shift.grad.abs().sum(0).gt(0).tolist() == [False, False, True, True]
    ascending = on(nn.Linear(12, 20), order="ascending")
    ascending.delta.on_step(50, 300)
    assert ascending.delta.frozen_columns()[1].tolist() == [False, False, True, True]


def test_the_change_stays_in_the_leading_input_directions_and_with_no_thaw_in_the_output_ones_too():
    layer = nn.Linear(12, 20).double()
    u, _, v = torch.linalg.svd(layer.weight, full_matrices=False)
    for freeze in (0.9, 0):
        model = on(layer, freeze=freeze)
        a = model.delta.A.clone()
        train(model, 30, total=40)
        change = model.merged() - layer.weight
        rows, columns = v[:4].T @ v[:4], u[:, :4] @ u[:, :4].T
        assert torch.linalg.matrix_rank(change) == 4
        assert torch.equal(model.delta.A, a)
        assert (change - change @ rows).norm() < 1e-6 * change.norm()
        outside = (change - columns @ change).norm() / change.norm()
        assert outside < 1e-6 if freeze == 0 else outside > 0.01


def test_the_gradient_of_the_core_is_the_dense_one_between_the_projections():
    layer, x = nn.Linear(12, 20).double(), torch.randn(7, 12).double()
    model = on(layer, freeze=0)
    upstream = torch.randn(7, 20).double()
    (model(x) * upstream).sum().backward()
    assert torch.allclose(model.delta.core.grad, model.delta.B0.T @ (upstream.T @ x) @ model.delta.A.T)


def test_weight_decay_draws_to_the_pretrained_weight():
    layer = nn.Linear(12, 20)
    model = on(layer, freeze=0)
    model.delta.randomize()
    optimizer = torch.optim.AdamW(model.delta.parameters(), 0.1, weight_decay=5.0)
    for _ in range(60):
        model.delta.core.grad = torch.zeros(4, 4)
        optimizer.step()
    assert torch.allclose(model.merged(), layer.weight, atol=1e-6)


def kept(run, x, known):
    """Bytes kept for the backward, and whether x is among them."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(x)
    assert out.requires_grad
    places = {tensor.untyped_storage().data_ptr() for tensor in known}
    return sum(size for place, size in seen.items() if place not in places), x.untyped_storage().data_ptr() in seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_keeps_r_numbers_for_each_token_and_not_the_input(dtype):
    model = on(nn.Linear(256, 64, dtype=dtype), rank=8)
    x = torch.randn(1000, 256, dtype=dtype)
    size, has_x = kept(model, x, [*model.delta.parameters(), *model.delta.buffers()])
    assert not has_x
    assert 1000 * 8 * 4 <= size <= 1000 * 8 * 4 + 5 * 64 * 8 * 4 + 2 * 8 * 8 * 4
    a, b = torch.randn(8, 256, requires_grad=True), torch.zeros(64, 8, requires_grad=True)
    x = x.float()
    assert kept(lambda x: x @ a.T @ b.T, x, [a, b])[1]  # LoRA keeps it


def test_the_random_basis_starts_as_the_base_too_and_trains_through_b():
    layer, x = nn.Linear(12, 20).double(), torch.randn(3, 12).double()
    model = on(layer, basis="random", alpha=8.0)
    assert torch.equal(model(x), layer(x))
    again = on(layer, basis="random", alpha=8.0)
    assert torch.equal(model.delta.A, again.delta.A)
    assert torch.equal(model.delta.S0, again.delta.S0)
    model(x).sum().backward()
    assert model.delta.shift.grad.abs().max() > 0
    assert model.delta.core.grad.abs().max() == 0
    model.delta.randomize()
    b, s = model.delta.shift, model.delta.S0 + model.delta.core
    assert torch.allclose(model.delta.delta_weight(), 8 / 4 * b @ s @ model.delta.A)


@pytest.mark.parametrize("stop", [3, 15, 35])
def test_a_saved_state_goes_on_bit_for_bit_before_during_and_after_the_freezing(stop):
    layer = nn.Linear(12, 20)
    first, second = on(layer), on(layer, seed=9, fresh=False)
    torch.manual_seed(3)
    one = train(first, stop, 100)
    second.delta.load_state_dict(first.delta.state_dict())
    assert torch.equal(first(torch.eye(12)), second(torch.eye(12)))
    state = copy.deepcopy(one.state_dict())
    two = torch.optim.AdamW(second.delta.parameters(), 1e-2)
    two.load_state_dict(state)
    for model, optimizer in ((first, one), (second, two)):
        torch.manual_seed(4)
        train(model, 5, 100, stop, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(first.delta.parameters(), second.delta.parameters(), strict=True))
    assert first.delta.state_dict().keys() == {"A", "B0", "S0", "core", "shift", "frozen"}


def test_loaded_tensors_need_no_decomposition(monkeypatch):
    def decompose(*_, **__):
        raise AssertionError("a decomposition was made")

    monkeypatch.setattr("fallow.deltas.lamda.low_rank", decompose)
    model = on(nn.Linear(12, 20), fresh=False)
    assert {name: tuple(t.shape) for name, t in model.delta.state_dict().items()} == {
        "A": (4, 12), "B0": (20, 4), "S0": (4, 4), "core": (4, 4), "shift": (20, 4), "frozen": ()
    }  # fmt: skip


def test_a_bf16_base_starts_bit_for_bit_and_gives_its_own_dtype():
    layer = nn.Linear(64, 48).bfloat16()
    model, x = on(layer, rank=8), torch.randn(5, 64).bfloat16()
    assert torch.equal(model(x), layer(x))
    model.delta.randomize()
    wanted = torch.nn.functional.linear(x.float(), model.merged().float(), layer.bias.float())
    assert model.delta.core.dtype == torch.float32
    assert torch.allclose(model(x).float(), wanted, rtol=0.02, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(on(layer)(x), layer(x))


def test_a_compiled_layer_has_no_graph_break_while_columns_freeze():
    model = on(nn.Linear(12, 20))
    model.delta.randomize()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 12)
    for step in (1, 50):
        model.delta.on_step(step, 300)
        assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_bad_options_are_refused_by_name():
    bad = [
        ({"rank": 0}, "rank=0"),
        ({"rank": 13}, "rank=13 is above what 'layer'"),
        ({"freeze": 1.5}, "freeze=1.5"),
        ({"freeze": -1}, "freeze=-1"),
        ({"core": "cholesky"}, "core='cholesky'"),
        ({"order": "random"}, "order='random'"),
        ({"basis": "zero"}, "basis='zero'"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"basis": "random", "freeze": 0}, "freeze=0 with basis='random'"),
    ]
    for given, message in bad:
        with pytest.raises(ConfigError, match=message):
            on(nn.Linear(12, 20), **given)
    with pytest.raises(ConfigError, match=r"freeze=0\.3 is a share of the run"):
        on(nn.Linear(12, 20)).delta.on_step(1, None)
