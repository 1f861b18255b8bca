"""Ranks with paces of their own, and optimizers whose Parameters change their rank."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fallow
from fallow.core.errors import ConfigError
from fallow.core.fused import single
from fallow.core.pacing import adam_catches_up, keep_pace
from fallow.core.regrowth import kept_ranks, resized
from fallow.core.sensitivity import BLOCK, Observed, sensitivity, smoothed
from fallow.core.views import view_of

RULES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=1e-2, amsgrad=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


class Halves:
    """The first two rows stay, the third goes at half the pace."""

    def __init__(self, param: nn.Parameter) -> None:
        self.param, self.held = param, False
        keep_pace(self)

    def gathered(self, held: set[int]) -> None:
        self.held = id(self.param) in held or self.held

    def parameters(self) -> list[tuple[nn.Parameter, int]]:
        return [(self.param, 0)]

    def paces(self, param: nn.Parameter, group: Any, state: Any) -> list[tuple[int, int, float]]:
        return [(0, 2, 0.0), (2, 3, 0.5)]


@pytest.mark.parametrize("rule", RULES)
def test_a_pace_is_a_learning_rate_of_its_own(rule: str) -> None:
    param, free = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5, 3))
    with torch.no_grad():
        free.copy_(param)
    first, other = RULES[rule]([param]), RULES[rule]([free])
    owner = Halves(param)
    for step in range(4):
        before = param.detach().clone()
        grad = torch.randn(5, 3)
        with torch.no_grad():
            free.copy_(param)
        param.grad, free.grad = grad.clone(), grad.clone()
        first.step()
        other.step()
        assert owner.held
        assert torch.equal(param[:2], before[:2]), step
        torch.testing.assert_close(param[2], (before[2] + free[2]) / 2)
        assert torch.equal(param[3:], free[3:])


@pytest.mark.parametrize("age", [1, 2, 10, 200])
def test_late_moments_of_adam_catch_up(age: int) -> None:
    """A row whose gradients begin after 300 steps moves as under an Adam that begins with it."""
    old, fresh = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64)), nn.Parameter(torch.zeros(3, dtype=torch.float64))
    first, second = (torch.optim.Adam([p], lr=1e-2, eps=1e-12) for p in (old, fresh))
    for step in range(300 + age):
        grad = torch.ones(2, 3, dtype=torch.float64)
        if step < 300:
            grad[1] = 0
        old.grad = grad
        group, state = first.param_groups[0], first.state.get(old, {})
        factor = adam_catches_up(step - 299, group, state) if step >= 300 else 1.0
        before = old[1].detach().clone()
        first.step()
        moved = old[1].detach() - before
        if step >= 300:
            before = fresh.detach().clone()
            fresh.grad = torch.ones(3, dtype=torch.float64)
            second.step()
            torch.testing.assert_close(factor * moved, fresh.detach() - before, rtol=1e-6, atol=0)
    assert adam_catches_up(age, {"lr": 1.0}, {}) == 1.0
    plain = math.sqrt(1 - 0.999**age) / (1 - 0.9**age)
    assert adam_catches_up(age, {"betas": (0.9, 0.999)}, {"exp_avg_sq": old, "step": 10**7}) == pytest.approx(plain)


def trained(method: str, rule: str, **options: Any) -> tuple[nn.Sequential, torch.optim.Optimizer, Tensor]:
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6))
    fallow.attach(model, method, rank=3, **options)
    optimizer = RULES[rule]([p for p in model.parameters() if p.requires_grad])
    x = torch.randn(7, 6)
    for _ in range(3):
        step(model, optimizer, x)
    return model, optimizer, x


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    (model(x) - 1).square().sum().backward()
    optimizer.step()


def delta_of(model: nn.Sequential, index: int = 0) -> Any:
    return model[index].adapters["default"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["lora", "sora", "adalora"])
def test_moments_stay_with_their_ranks_and_are_zero_for_new_ones(method: str, rule: str) -> None:
    model, optimizer, x = trained(method, rule)
    delta = delta_of(model)
    before, output = {n: (p, copy.deepcopy(optimizer.state[p])) for n, p in delta.named_parameters()}, model(x).detach()
    loss = (model(x) - 1).square().sum()  # a graph that is still alive
    loss.backward()
    resized(delta, 5)
    torch.testing.assert_close(model(x), output, rtol=0, atol=1e-6)
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    assert held == {id(param) for param in model.parameters() if param.requires_grad}
    dims = {"A": 0, "B": 1, "gate": 0}
    for name, param in delta.named_parameters():
        old, state = before[name]
        assert param.shape[dims[name]] == 5
        assert optimizer.state[param].keys() == state.keys()
        for key, value in state.items():
            now = optimizer.state[param][key]
            if value.shape != old.shape:
                assert torch.equal(now, value)
                continue
            assert torch.equal(now.narrow(dims[name], 0, 3), value), key
            assert not now.narrow(dims[name], 3, 2).any()
    moved = {name: param.detach().clone() for name, param in delta.named_parameters()}
    step(model, optimizer, x)
    step(model, optimizer, x)
    assert all(not torch.equal(param, moved[name]) for name, param in delta.named_parameters())


@pytest.mark.parametrize("rule", RULES)
def test_a_cut_keeps_the_moments_of_what_stays(rule: str) -> None:
    model, optimizer, x = trained("sora", rule, threshold=0.0)
    delta = delta_of(model)
    with torch.no_grad():
        delta.gate.copy_(torch.tensor([0.5, 0.0, -0.7]))
    output, old = model(x).detach(), dict(delta.named_parameters())
    state = {n: copy.deepcopy(optimizer.state[p]) for n, p in old.items()}
    assert kept_ranks(delta, 2).tolist() == [0, 2]
    resized(delta, 2)
    torch.testing.assert_close(model(x), output, rtol=0, atol=1e-6)
    for name, dim in {"A": 0, "B": 1, "gate": 0}.items():
        for key, value in state[name].items():
            if value.shape == old[name].shape:
                now = optimizer.state[getattr(delta, name)][key]
                assert torch.equal(now, value.index_select(dim, torch.tensor([0, 2])))
    assert not any(param in optimizer.state for param in old.values())


def test_units_that_are_parameters_of_their_own_come_and_go() -> None:
    model, optimizer, x = trained("dylora", "adamw")
    delta = delta_of(model)
    kept = delta.A0.detach().clone()
    resized(delta, 2)
    names = {name for name, _ in delta.named_parameters()}
    assert names == {"A0", "A1", "B0", "B1"}
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    assert {id(param) for param in delta.parameters()} <= held
    assert len(held) == 4 + 6
    resized(delta, 4)
    assert len({id(p) for group in optimizer.param_groups for p in group["params"]}) == 8 + 6
    assert torch.equal(delta.A0, kept)
    step(model, optimizer, x)


def test_an_optimizer_whose_state_cannot_follow_is_refused_and_nothing_changes() -> None:
    model = nn.Sequential(nn.Linear(6, 10))
    fallow.attach(model, "lora", rank=3)
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad])
    x = torch.randn(4, 6)
    step(model, optimizer, x)
    before = list(model.parameters())
    with pytest.raises(ConfigError, match=r"Adafactor keeps 'row_var', a Tensor .* for '0.A' of \(3, 6\)"):
        resized(delta_of(model), 4)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert delta_of(model).o.rank == 3
    with pytest.raises(ConfigError, match="rank=0"):
        resized(delta_of(model), 0)


def test_rules_of_factor_pairs_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4))
    fallow.attach(model, "lora", rank=3)
    optimizer = fallow.LoRAPro(model, lr=1e-3)
    x = torch.randn(4, 6)
    step(model, optimizer, x)
    with pytest.raises(ConfigError, match="LoRAPro keeps to the Parameters"):
        resized(delta_of(model), 4)
    assert delta_of(model).o.rank == 3


def test_an_optimizer_that_has_made_no_step_can_be_given() -> None:
    model = nn.Sequential(nn.Linear(6, 10))
    fallow.attach(model, "lora", rank=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    resized(delta_of(model), 4, [optimizer])
    assert {tuple(p.shape) for p in optimizer.param_groups[0]["params"]} == {(4, 6), (10, 4)}


def test_alpha_follows_the_rank_so_that_the_scale_stays() -> None:
    for options in ({"alpha": 6.0}, {"alpha": None}, {"alpha": 6.0, "scaling": "rslora"}, {"scaling": "rslora"}):
        model = nn.Sequential(nn.Linear(6, 10))
        fallow.attach(model, "lora", rank=3, **options)
        delta = delta_of(model)
        s, b = delta.scaling, delta.B.detach().clone()
        delta.resize(5)
        assert delta.scaling == pytest.approx(s, rel=1e-12)
        assert torch.equal(delta.B[:, :3], b)


# -- scores -----------------------------------------------------------------------------------------------------------


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(12, 20), lambda: torch.randn(3, 5, 12)),
    "conv": (lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1), lambda: torch.randn(3, 4, 9, 9)),
    "circular": (lambda: nn.Conv1d(4, 8, 3, padding=1, padding_mode="circular"), lambda: torch.randn(3, 4, 9)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2, padding="same"), lambda: torch.randn(3, 8, 9, 9)),
    "embedding": (lambda: nn.Embedding(24, 12), lambda: torch.randint(24, (3, 5))),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("block", [BLOCK, 30])
def test_the_sensitivity_is_that_of_a_dense_change_by_autograd(kind: str, block: int) -> None:
    layer, inputs = LAYERS[kind]
    view, x = view_of(layer()), inputs()
    b, a = torch.randn(view.shape[0], 3), torch.randn(3, view.shape[1])
    d = (b @ a).requires_grad_()
    y = view.op(x, d)
    grad = torch.randn_like(y)
    (g,) = torch.autograd.grad(y, d, grad)
    torch.testing.assert_close(
        sensitivity(view, x, grad, b, a, block), (d * g).abs().sum().detach(), rtol=1e-4, atol=1e-4
    )


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("fused", [None, {".*in_proj_weight": 3}])
def test_what_is_observed_is_the_sum_over_passes_and_the_model_says_the_same(fused: Any) -> None:
    model, x = Reader(), torch.randn(2, 5, 8)
    fallow.attach(model, "lora", rank=2, fused=fused)
    parts = dict(p for n, m in model.named_modules() if n.endswith("default") for p in single(n, m))  # type: ignore[arg-type]
    parts = {name: delta for name, delta in parts.items() if isinstance(delta, fallow.Delta)}
    assert len(parts) == (5 if fused else 3)
    for delta in parts.values():
        delta.randomize()
    said = model(x).detach()
    observed = {name: Observed(delta) for name, delta in parts.items()}
    torch.testing.assert_close(model(x), said)
    wanted = dict.fromkeys(parts, 0.0)
    for scale in (1.0, 0.5):
        (scale * model(x)).square().sum().backward()
    taken = {name: each.taken() for name, each in observed.items()}
    # the same from the gradients of the factors of a change that is its own dense factor
    for name, delta in parts.items():
        factors = type(delta).factors
        for scale in (1.0, 0.5):
            b, a = (f.detach() for f in factors(delta))
            d = (b @ a).requires_grad_()
            delta.__dict__["factors"] = lambda d=d: (d, torch.eye(d.shape[1]))
            held = {key: delta.__dict__.pop(key) for key in ("delta_forward", "delta_weight") if key in delta.__dict__}
            (g,) = torch.autograd.grad((scale * model(x)).square().sum(), d)
            delta.__dict__.update(held)
            del delta.__dict__["factors"]
            wanted[name] += float((d * g).abs().sum())
    for name, each in observed.items():
        got = taken[name]
        assert got is not None
        assert float(got) == pytest.approx(wanted[name], rel=1e-4), name
        each.stop()
        assert not {"delta_forward", "delta_weight"} & parts[name].__dict__.keys()
    torch.testing.assert_close(model(x), said)


def test_means_are_smoothed_in_the_papers_order() -> None:
    score = torch.zeros(2)
    told = []
    for value in (1.0, 2.0, 4.0):
        score = smoothed(score, torch.tensor(value), (0.85, 0.85))
        told.append(score.tolist())
    assert told[0] == pytest.approx([0.15, 0.15 * 0.85])
    assert told[1] == pytest.approx([0.4275, 0.85 * 0.1275 + 0.15 * 1.5725])
    assert told[2] == pytest.approx([0.963375, 0.85 * 0.34425 + 0.15 * 3.036625])
