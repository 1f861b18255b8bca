"""Penalties of the weights: against dense forms written from the equations, finite differences, and true gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fallow
from fallow.core.errors import ConfigError
from fallow.core.objective import OBJECTIVES, Objective, Together, objective_of, trained_deltas
from fallow.objectives import perturbation
from fallow.objectives.low_rank import LowRankChange, nuclear_norm_of_product
from fallow.objectives.orthogonality import Orthogonality
from fallow.objectives.orthonormal import Orthonormal, off_orthonormal
from fallow.objectives.perturbation import WeightPerturbation, largest_of_product


def adapted(method: str = "lora", dtype=torch.float64, random=True, **options):
    """A network with two layers of unlike shapes, its Deltas, and their weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 9)).to(dtype)
    fallow.attach(model, method, ["0", "2"], **(options or {"rank": 2}))
    deltas = dict(trained_deltas(model))
    for delta in deltas.values():
        if random:
            delta.randomize()
    return model, deltas


def changes(deltas):
    return [delta.delta_weight() for delta in deltas.values()]


def gradients(term, deltas):
    params = [param for delta in deltas.values() for param in delta.parameters()]
    return torch.autograd.grad(term, params, allow_unused=True, retain_graph=True)


def assert_same(one, other, deltas, rtol=1e-9):
    torch.testing.assert_close(one, other, rtol=rtol, atol=1e-12)
    for got, wanted in zip(gradients(one, deltas), gradients(other, deltas), strict=True):
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=1e-10)


def test_the_nuclear_norm_of_a_product_and_its_gradients_are_the_dense_ones():
    _, deltas = adapted()
    dense = sum(torch.linalg.svdvals(change).sum() for change in changes(deltas))
    assert_same(LowRankChange(0.3).penalty(deltas), 0.3 * dense, deltas, rtol=1e-7)
    assert_same(LowRankChange(0.3, "mean").penalty(deltas), 0.15 * dense, deltas, rtol=1e-7)
    b, a = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 2), (2, 8)))
    assert torch.autograd.gradcheck(nuclear_norm_of_product, (b, a))


def test_the_nuclear_norm_is_silent_at_the_start_and_lowers_the_rank_in_training():
    _, deltas = adapted(random=False)
    term = LowRankChange(1.0).penalty(deltas)
    assert term == 0
    assert all(grad.abs().max() == 0 for grad in gradients(term, deltas))
    b, a = nn.Parameter(torch.randn(12, 6)), nn.Parameter(torch.randn(6, 10))
    target = torch.randn(12, 2) @ torch.randn(2, 10)
    optimizer = torch.optim.Adam([b, a], 0.03)
    for _ in range(400):
        optimizer.zero_grad()
        ((b @ a - target).square().sum() + 3.0 * nuclear_norm_of_product(b, a)).backward()
        optimizer.step()
    spectrum = torch.linalg.svdvals(b @ a)
    assert spectrum[2] < 0.05 * spectrum[1]


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("norm", ["l1", "fro2"])
def test_orthogonality_equals_the_dense_sums_for_any_pair(side, norm):
    model, deltas = adapted("lora", rank=4, alpha=12.0)

    def size(matrix):
        return matrix.abs().sum() if norm == "l1" else matrix.square().sum()

    def meet(one, other):
        return one @ other.T if side == "input" else one.T @ other

    wanted = torch.zeros((), dtype=torch.float64)
    for layer, delta in zip((model[0], model[2]), deltas.values(), strict=True):
        first, second = (3 * delta.B[:, i : i + 2] @ delta.A[i : i + 2] for i in (0, 2))
        wanted = wanted + 2 * (size(meet(layer.weight, first)) + size(meet(layer.weight, second)))
        wanted = wanted + 5 * size(meet(first, second))
    term = Orthogonality(0.1, group=2, preserve=2.0, diversify=5.0, side=side, norm=norm).penalty(deltas)
    assert_same(term, 0.1 * wanted, deltas)


def test_orthogonality_is_of_what_was_learned_where_a_start_is_subtracted():
    _, plain = adapted("pego", rank=2, group=2)
    model, deltas = adapted("pego", rank=2, group=2, start="pissa", random=False)
    assert Orthogonality(group=2).penalty(deltas) < 1e-12
    assert sum(delta.loss() for delta in deltas.values()) < 1e-12
    for delta in deltas.values():
        delta.randomize()
    wanted = torch.zeros((), dtype=torch.float64)
    for layer, delta in zip((model[0], model[2]), deltas.values(), strict=True):
        r = delta.o.rank
        parts = [
            delta.B[:, i * r : (i + 1) * r] @ delta.A[i * r : (i + 1) * r]
            - delta.start_B[:, i * r : (i + 1) * r] @ delta.start_A[i * r : (i + 1) * r]
            for i in range(2)
        ]
        wanted = wanted + sum((layer.weight @ part.T).abs().sum() for part in parts)
        wanted = wanted + (parts[0] @ parts[1].T).abs().sum()
    assert_same(Orthogonality(1.0, group=2).penalty(deltas), wanted, deltas)
    whole = sum(delta.loss() for delta in plain.values())
    torch.testing.assert_close(Orthogonality(1e-3, group=2).penalty(plain), whole)


def test_a_group_that_does_not_divide_the_rank_is_refused():
    _, deltas = adapted(rank=3)
    with pytest.raises(ConfigError, match="group=2 does not divide the rank of '0', which is 3"):
        Orthogonality(group=2).penalty(deltas)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_orthonormal_equals_its_definition(reduction):
    _, deltas = adapted(rank=2, alpha=3.0)
    wanted = torch.zeros((), dtype=torch.float64)
    for delta in deltas.values():
        eye = torch.eye(2, dtype=torch.float64)
        gaps = (delta.B.T @ delta.B - eye).norm() + (delta.A @ delta.A.T - eye).norm()
        wanted = wanted + 0.2 * delta.delta_weight().square().sum() + 0.7 * gaps
    term = Orthonormal(0.2, 0.7, reduction).penalty(deltas)
    assert_same(term, wanted / 2 if reduction == "mean" else wanted, deltas)


def test_orthonormal_factors_have_no_gradient_and_training_on_the_penalty_makes_them():
    rows = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0].T.requires_grad_()
    torch.autograd.backward(off_orthonormal(rows))
    assert torch.isfinite(rows.grad).all()
    exact = torch.eye(3, 8, dtype=torch.float64, requires_grad=True)
    off_orthonormal(exact).backward()
    assert exact.grad.abs().max() == 0
    official = off_orthonormal(torch.randn(3, 8, dtype=torch.float64), "official")
    assert official > 5**0.5
    model, deltas = adapted(dtype=torch.float32)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    for _ in range(300):
        optimizer.zero_grad()
        Orthonormal(0.0, 1.0).penalty(deltas).backward()
        optimizer.step()
    for delta in deltas.values():
        assert off_orthonormal(delta.A.detach()) < 0.05
        assert off_orthonormal(delta.B.detach().T) < 0.05


def test_a_planted_change_costs_the_square_of_its_distance_from_the_ball(monkeypatch):
    monkeypatch.setattr(perturbation, "TILE", 14)  # several tiles
    _, deltas = adapted(random=False)
    sizes = []
    for delta, size in zip(deltas.values(), (0.5, -0.25), strict=True):
        with torch.no_grad():
            delta.A.normal_(std=1e-3)
            delta.A[0, 3], delta.B[4, 0] = 1.0, size
        sizes.append(float(delta.delta_weight().detach().abs().max()))
    assert sizes == pytest.approx([0.5, 0.25])
    term = WeightPerturbation(2.0, eps=0.1).penalty(deltas)
    assert float(term.detach()) == pytest.approx(2 * (0.4**2 + 0.15**2) / 2)
    assert WeightPerturbation(2.0, eps=0.3, form="hinge").penalty(deltas).item() == pytest.approx(0.2**2)
    assert WeightPerturbation(2.0, eps=0.3).penalty(deltas).item() == pytest.approx(0.2**2 + 0.05**2)
    by_factor = gradients(term, deltas)
    assert [int((grad.abs().sum(1) > 0).sum()) for grad in by_factor[1::2]] == [1, 1]  # one row of each B
    assert [int((grad.abs().sum(0) > 0).sum()) for grad in by_factor[::2]] == [1, 1]  # one column of each A
    dense = 2 * sum((change.abs().max() - 0.1) ** 2 for change in changes(deltas)) / 2
    assert_same(WeightPerturbation(2.0, eps=0.1).penalty(deltas), dense, deltas)


def test_the_largest_entry_is_found_across_tiles_and_of_changes_without_factors(monkeypatch):
    monkeypatch.setattr(perturbation, "TILE", 30)
    for _ in range(20):
        b, a = torch.randn(11, 3), torch.randn(3, 9)
        torch.testing.assert_close(largest_of_product(b, a), (b @ a).abs().max())
    for method, options in (("loca", {"components": 6}), ("dora", {"rank": 2})):
        model, deltas = adapted(method, dtype=torch.float32, **options)
        wanted = []
        for layer, delta in zip((model[0], model[2]), deltas.values(), strict=True):
            wanted.append((delta.new_weight(layer.weight) - layer.weight).abs().max() ** 2)
        got = WeightPerturbation(1.0, eps=0.0).penalty(deltas)
        torch.testing.assert_close(got, sum(wanted) / 2, rtol=1e-4, atol=1e-7)


def test_much_perturbation_weight_brings_the_largest_entry_down():
    model, deltas = adapted(dtype=torch.float32)
    before = max(float(change.abs().max()) for change in changes(deltas))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(200):
        optimizer.zero_grad()
        WeightPerturbation(10.0, eps=1e-3).penalty(deltas).backward()
        optimizer.step()
    assert max(float(change.abs().max()) for change in changes(deltas)) < 0.3 * before


WEIGHT = [LowRankChange(), Orthogonality(), Orthonormal(), WeightPerturbation()]


@pytest.mark.parametrize("objective", WEIGHT, ids=lambda o: o.name)
def test_finite_differences_agree_with_the_gradient(objective):
    _, deltas = adapted(rank=2, alpha=3.0)
    params = [param for delta in deltas.values() for param in delta.parameters()]
    analytic = torch.autograd.grad(objective.penalty(deltas), params)
    for param, grad in zip(params, analytic, strict=True):
        way, step = torch.randn_like(param), 1e-6
        with torch.no_grad():
            param.add_(way, alpha=step)
            up = objective.penalty(deltas)
            param.sub_(way, alpha=2 * step)
            down = objective.penalty(deltas)
            param.add_(way, alpha=step)
        torch.testing.assert_close((up - down) / (2 * step), (grad * way).sum(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective", WEIGHT, ids=lambda o: o.name)
def test_half_precision_factors_have_the_penalty_of_float32(objective, dtype):
    _, deltas = adapted(dtype=torch.float32)
    half = {name: delta.to(dtype) for name, delta in deltas.items()}
    with torch.autocast("cpu", torch.bfloat16):
        got = objective.penalty(half)
    assert got.dtype == torch.float32
    wide = {name: delta.to(dtype).float() for name, delta in half.items()}
    torch.testing.assert_close(got, objective.penalty(wide), rtol=1e-3, atol=1e-7)
    assert torch.isfinite(got)


@pytest.mark.parametrize("objective", [LowRankChange(), Orthogonality()], ids=lambda o: o.name)
def test_a_change_without_factors_is_refused_by_name(objective):
    _, deltas = adapted("dora")
    with pytest.raises(ConfigError, match=f"objective '{objective.name}' needs a change B A.*'dora'"):
        objective.penalty(deltas)


def test_blocks_of_a_fused_weight_count_by_themselves():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12)).double()
    fallow.attach(model, "lora", ["0"], rank=2, fused={"0": 3})
    deltas = dict(trained_deltas(model))
    for delta in deltas.values():
        delta.randomize()
    parts = [part.delta_weight() for delta in deltas.values() for part in delta.deltas]
    dense = sum(torch.linalg.svdvals(part).sum() for part in parts)
    torch.testing.assert_close(LowRankChange(1.0).penalty(deltas), dense)


def test_an_objective_can_be_told_by_name_by_mapping_and_by_list_and_tells_itself():
    assert objective_of(None) is None
    assert objective_of("orthogonality") == Orthogonality()
    both = objective_of([{"name": "low-rank-change", "weight": 0.5}, Orthonormal()])
    assert isinstance(both, Together)
    assert both.told() == {
        "name": "together",
        "parts": [
            {"name": "low-rank-change", "weight": 0.5, "reduction": "sum"},
            {"name": "orthonormal", "beta": 1e-4, "gamma": 1e-3, "reduction": "mean"},
        ],
    }
    again = objective_of(both.told())
    _, deltas = adapted()
    torch.testing.assert_close(
        again.penalty(deltas), LowRankChange(0.5).penalty(deltas) + Orthonormal().penalty(deltas)
    )
    assert both.of_weights
    assert not both.of_outputs


def test_a_call_gives_the_penalty_of_the_trained_deltas_to_loops_that_add_it_themselves():
    model, deltas = adapted()
    objective = LowRankChange(0.2)
    torch.testing.assert_close(objective(model, None, None), objective.penalty(deltas))
    for delta in deltas.values():
        delta.requires_grad_(False)
    assert objective(model, None, None) == 0


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("orthogonal", "objective='orthogonal' is none.*orthogonality"),
        ({"name": "orthonormal", "delta": 1}, "objective 'orthonormal' has no delta=1"),
        ([], r"objective=\[\] must be an objective"),
        (3, "objective=3 must be an objective"),
        ({"name": "low-rank-change", "weight": -1}, "weight=-1 must be a finite number at least 0"),
        ({"name": "low-rank-change", "reduction": "max"}, "reduction='max' must be one of"),
        ({"name": "orthogonality", "group": 0}, "group=0 must be a whole number"),
        ({"name": "weight-perturbation", "form": "cube"}, "form='cube' must be one of"),
    ],
)
def test_nonsense_is_refused_by_name(told, message):
    with pytest.raises(ConfigError, match=message):
        objective_of(told)


def test_every_objective_has_a_name_and_says_which_kind_it_is():
    assert {"ba-lora", "inverted-hinge", "gradient-ascent", "feature-distillation"} <= OBJECTIVES.keys()
    for name, kind in OBJECTIVES.items():
        if name == "together" or not kind.__module__.startswith("fallow."):
            continue
        made = kind()
        assert isinstance(made, Objective)
        assert made.of_weights != made.of_outputs, name
