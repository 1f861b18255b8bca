"""LoRA-SB against its paper's equations, and the rate of the first step of real schedules."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from begun import filled, linear, site_of, statistics
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR
from transformers import get_cosine_schedule_with_warmup

from fallow.core.errors import ConfigError
from fallow.core.starting import Pair
from fallow.core.statistics import LayerStatistics, Sketch, Statistics
from fallow.starts.lora_sb import LoRASB, first_lr

RANK = 4
SHAPES = [(24, 40), (40, 24)]


def of(gradient: Tensor, lr: float = 0.01, **options: object) -> LoRASB:
    return LoRASB(statistics(gradient={"layer": gradient}), lr, **options)


def pair_of(gradient: Tensor, rank: int = RANK, scale: float = 1.0, **options: object) -> Pair:
    return of(gradient, **options).pair(site_of(linear(torch.randn_like(gradient))), rank, scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("surrogate", ["adam", "sgd"])
def test_the_start_is_the_best_approximation_of_the_first_step(shape, scale, surrogate):
    g, lr = torch.randn(*shape), 0.01
    step = -lr * (g.sign() if surrogate == "adam" else g)
    sigma = torch.linalg.svdvals(step.double())
    pair = pair_of(g, scale=scale, surrogate=surrogate)
    torch.testing.assert_close(pair.b.T @ pair.b, torch.eye(RANK), atol=1e-5, rtol=0)
    torch.testing.assert_close(pair.a @ pair.a.T, torch.eye(RANK), atol=1e-5, rtol=0)
    values = pair.core.diagonal()
    assert torch.equal(pair.core, torch.diag(values))
    assert bool((values > 0).all())
    assert bool((values[:-1] >= values[1:]).all())
    error = float((step - scale * pair.b @ pair.core @ pair.a).double().norm())
    assert error == pytest.approx(float(sigma[RANK:].norm()), rel=1e-4)


@pytest.mark.parametrize("head_start", [True, False])
def test_the_output_starts_as_the_base_or_with_the_step_taken(head_start):
    layer, x = nn.Linear(40, 24), torch.randn(5, 40)
    g = torch.randn(24, 40)
    delta = filled(layer, "lora-xs", of(g, head_start=head_start), rank=RANK)
    out = delta.linear(x, layer.weight.detach(), layer.bias.detach())
    ahead = x @ (delta.B @ delta.R @ delta.A).T
    want = layer(x) + ahead if head_start else layer(x)
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-6)
    assert (float(ahead.detach().abs().max()) > 1e-3) == head_start


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_on_the_core_is_the_gradient_projected_and_no_other_comes_nearer(shape):
    torch.manual_seed(1)
    layer, x, y = (
        nn.Linear(shape[1], shape[0], bias=False).double(),
        torch.randn(50, shape[1]).double(),
        torch.randn(50, shape[0]).double(),
    )
    delta = filled(layer, "lora-xs", of(torch.randn(*shape)), rank=RANK).double()
    effective = (layer.weight + delta.delta_weight()).detach().requires_grad_()
    (x @ effective.T - y).square().mean().backward()
    g, before, lr = effective.grad, delta.delta_weight().detach(), 0.1
    (delta.linear(x, layer.weight.detach(), None) - y).square().mean().backward()
    SGD([delta.R], lr).step()
    moved = delta.delta_weight().detach() - before
    b, a = delta.B, delta.A
    torch.testing.assert_close(moved, -lr * b @ b.T @ g @ a.T @ a, atol=1e-5 * float(moved.abs().max()), rtol=0)
    least = float((moved + lr * g).norm())
    for _ in range(20):
        other = moved + b @ (0.01 * torch.randn(RANK, RANK).double()) @ a
        assert float((other + lr * g).norm()) > least
    assert float((moved * g).sum()) < 0  # the loss falls to first order


def test_the_scale_counts_twice_with_the_raw_gradient_and_not_at_all_with_the_best_one():
    layer, x, g = nn.Linear(40, 24, bias=False), torch.randn(9, 40), torch.randn(24, 40)
    change, raw, best = {}, {}, {}
    for s in (1.0, 4.0):
        delta = filled(layer, "lora-xs", of(g), rank=RANK, alpha=RANK * s)
        change[s] = delta.delta_weight().detach()
        delta.linear(x, layer.weight.detach(), None).sum().backward()
        raw[s], best[s] = (s * delta.B @ h @ delta.A for h in (delta.R.grad, delta.R.grad / s**2))
    torch.testing.assert_close(change[4.0], change[1.0], atol=1e-6, rtol=0)
    torch.testing.assert_close(raw[4.0], 16 * raw[1.0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(best[4.0], best[1.0], atol=1e-4, rtol=1e-4)


def test_outer_factors_stay_as_they_are_to_the_bit_and_the_core_alone_is_trained():
    layer, x = nn.Linear(40, 24), torch.randn(5, 40)
    delta = filled(layer, "lora-xs", of(torch.randn(24, 40)), rank=RANK)
    a, b, core = delta.A.clone(), delta.B.clone(), delta.R.detach().clone()
    assert sum(p.numel() for p in delta.parameters()) == RANK**2
    optimizer = Adam(delta.parameters(), 1e-2)
    for _ in range(5):
        delta.linear(x, layer.weight.detach(), None).square().sum().backward()
        optimizer.step()
    assert torch.equal(delta.A, a)
    assert torch.equal(delta.B, b)
    assert delta.A.grad is None
    assert float((delta.R.detach() - core).abs().min()) > 1e-3


def test_a_zero_gradient_gives_lora_xs_with_a_warning():
    layer = nn.Linear(40, 24)
    with pytest.warns(UserWarning, match="the gradient of 'layer' is zero, so it starts as LoRA-XS does"):
        delta = filled(layer, "lora-xs", of(torch.zeros(24, 40)), rank=RANK)
    u, s, vt = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    assert not delta.R.detach().any()
    torch.testing.assert_close(delta.B @ delta.A, (u[:, :RANK] * s[:RANK]) @ vt[:RANK], atol=1e-5, rtol=0)


def test_neurons_without_a_gradient_have_no_part_in_the_first_step():
    g = torch.randn(24, 40)
    g[5:], g[:, 7] = 0.0, 0.0
    pair = pair_of(g)
    assert float((pair.b @ pair.core @ pair.a)[5:].abs().max()) < 1e-7
    assert float((pair.b @ pair.core @ pair.a)[:, 7].abs().max()) < 1e-7


def test_a_large_layers_randomised_start_is_near_the_best():
    g = torch.randn(340, 300)
    step = -0.01 * g.sign()
    least = float(torch.linalg.svdvals(step.double())[16:].norm())
    pair = pair_of(g, rank=16)
    assert float((step - pair.b @ pair.core @ pair.a).norm()) <= 1.004 * least
    exact = pair_of(g, rank=16, exact=True)
    assert float((step - exact.b @ exact.core @ exact.a).norm()) == pytest.approx(least, rel=1e-5)
    torch.testing.assert_close(pair.b.T @ pair.b, torch.eye(16), atol=1e-5, rtol=0)


def test_a_sketch_and_methods_without_a_core_are_refused():
    shape = (24, 40)
    omega, psi = Sketch.projections(shape, 8, 0)
    layers = {
        "layer": LayerStatistics(
            shape, gradient_sketch=Sketch(torch.zeros(24, 40) @ omega, psi @ torch.zeros(24, 40), 0)
        )
    }
    with pytest.raises(ConfigError, match="needs every entry of a gradient; gather it without a sketch"):
        LoRASB(Statistics(layers, 1), 0.01).pair(site_of(nn.Linear(40, 24)), 4, 1.0)
    with pytest.raises(ConfigError, match="'lora' has no core between its factors"):
        filled(nn.Linear(40, 24), "lora", of(torch.randn(24, 40)), rank=4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr": 0.0}, "lr=0.0 must be a finite number above 0"),
        ({"surrogate": "lion"}, "surrogate='lion' must be one of 'adam', 'sgd'"),
        ({"head_start": None}, "head_start=None must be one of"),
    ],
)
def test_impossible_options_are_refused_by_name(options, told):
    with pytest.raises(ConfigError, match=told):
        of(torch.randn(3, 4), **options)


# -- the rate of the first step ---------------------------------------------------------------------------------------

SCHEDULES = {
    "constant": (lambda o: ConstantLR(o, 1.0), 1e-3),
    "warm-up of 20": (lambda o: get_cosine_schedule_with_warmup(o, 20, 1000), 1e-3 / 20),
    "warm-up from a tenth": (lambda o: LinearLR(o, 0.1, 1.0, 10), 1e-4),
    "ten idle steps": (lambda o: LambdaLR(o, lambda step: float(step >= 10)), 1e-3),
    "cosine": (lambda o: CosineAnnealingLR(o, 100), 1e-3),
    "one cycle": (lambda o: OneCycleLR(o, 1e-2, total_steps=100), 1e-2 / 25),
    "two in a row": (
        lambda o: SequentialLR(o, [LambdaLR(o, lambda step: step / 4), ConstantLR(o, 1.0)], milestones=[4]),
        1e-3 / 4,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_the_first_rate_is_that_of_the_first_step_that_moves_whatever_is_accumulated(name):
    make, want = SCHEDULES[name]
    assert first_lr(make, 1e-3) == pytest.approx(want, rel=1e-6)
    weight = nn.Parameter(torch.ones(3))
    optimizer = Adam([weight], lr=1e-3)
    scheduler = make(optimizer)
    told = copy.deepcopy(scheduler.state_dict()), copy.deepcopy(optimizer.state_dict()), scheduler.get_last_lr()
    assert first_lr(scheduler) == pytest.approx(want, rel=1e-6)
    assert (scheduler.state_dict(), optimizer.state_dict(), scheduler.get_last_lr()) == told
    for _ in range(60):  # micro-batches, of which four make a step
        before = weight.detach().clone()
        for _ in range(4):
            (weight.sum() / 4).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if not torch.equal(weight, before):
            break
    assert float((before - weight).detach().abs().max()) == pytest.approx(
        want, rel=1e-3
    )  # Adam's step along a gradient


def test_the_largest_of_the_groups_rates_counts():
    optimizer = SGD([{"params": [torch.ones(1)], "lr": 1e-4}, {"params": [torch.ones(1)], "lr": 3e-2}], lr=1.0)
    assert first_lr(LambdaLR(optimizer, lambda step: step / 10)) == pytest.approx(3e-3)


def test_a_scheduler_that_accelerate_prepared_is_asked_itself():
    accelerator, optimizer = Accelerator(cpu=True), SGD([torch.ones(1)], lr=1e-3)
    prepared = accelerator.prepare(LambdaLR(optimizer, lambda step: step / 10))
    assert not isinstance(prepared, LambdaLR)
    assert first_lr(prepared) == pytest.approx(1e-4)


def test_a_rate_that_stays_zero_or_is_not_known_is_refused(monkeypatch):
    monkeypatch.setattr("fallow.starts.lora_sb.LONGEST", 50)
    with pytest.raises(ConfigError, match="still zero after 50 steps"):
        first_lr(lambda o: LambdaLR(o, lambda step: 0.0), 1e-3)
    with pytest.raises(ConfigError, match="give lr=1e-3"):
        first_lr(lambda o: LambdaLR(o, lambda step: 1.0))
    with pytest.raises(ConfigError, match="schedule='cosine' is no scheduler of torch's"):
        first_lr("cosine")
