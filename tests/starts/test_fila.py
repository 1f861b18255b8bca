"""FILA against its paper's equations: the weighted approximation, its invariances, and both epsilons."""

from __future__ import annotations

import pytest
import torch
from begun import filled, linear, site_of, statistics
from torch import Tensor, nn

from fallow.core.errors import ConfigError, DataError
from fallow.starts.fila import FILA
from fallow.starts.pissa import PiSSA

RANK = 4
SHAPES = [(24, 40), (40, 24)]


def of(forget: Tensor, retain: Tensor, **options: object) -> FILA:
    return FILA(statistics(fisher={"layer": forget}), statistics(fisher={"layer": retain}), **options)


def product(start: FILA | PiSSA, weight: Tensor, scale: float = 2.0, rank: int = RANK) -> Tensor:
    """s B0 A0"""
    pair = start.pair(site_of(linear(weight)), rank, scale)
    assert not pair.kept
    return scale * pair.b @ pair.a


def squares(*shape: int) -> Tensor:
    """Of gradients whose rows differ in size."""
    return (
        torch.randn(*shape) * torch.logspace(-1, 1, shape[0])[torch.randperm(shape[0])].unsqueeze(1)
    ).square() * 1e-6


def row_weights(forget: Tensor, retain: Tensor, epsilon: float) -> Tensor:
    return (forget.double() / (epsilon + retain.double())).sum(1).sqrt()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("official", [False, True])
def test_the_weighted_error_is_the_least_and_below_that_of_pissa(shape, official):
    weight, forget, retain = torch.randn(*shape), squares(*shape), squares(*shape)
    epsilon = 1e-9 if official else 0.1 * float(retain.double().mean())  # an absolute one that matters here
    start = of(forget, retain, official=True, epsilon=epsilon) if official else of(forget, retain)
    d = row_weights(forget, retain, epsilon).unsqueeze(1)
    sigma = torch.linalg.svdvals(d * weight.double())

    def weighted(change: Tensor) -> float:
        return float((d * (weight - change).double()).norm())

    assert weighted(product(start, weight)) == pytest.approx(float(sigma[RANK:].norm()), rel=1e-4)
    assert weighted(product(start, weight)) < 0.97 * weighted(product(PiSSA(), weight))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_factors_are_those_of_the_paper(shape):
    weight, forget, retain, s = torch.randn(*shape), squares(*shape), squares(*shape), 2.0
    d, epsilon = row_weights(forget, retain, 1e-5), 1e-5
    u, sigma, vt = torch.linalg.svd(d.unsqueeze(1) * weight.double(), full_matrices=False)
    root = (sigma[:RANK] / s).sqrt()
    a, b = root.unsqueeze(1) * vt[:RANK], u[:, :RANK] * root / (d + epsilon).unsqueeze(1)
    pair = of(forget, retain, official=True).pair(site_of(linear(weight)), RANK, s)
    torch.testing.assert_close((pair.b @ pair.a).double(), b @ a, atol=1e-4, rtol=0)
    torch.testing.assert_close((pair.a @ pair.a.T).double(), a @ a.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_equal_importance_make_it_pissa(shape):
    weight, same = torch.randn(*shape), torch.full(shape, 3e-7)
    fila, pissa = (start.pair(site_of(linear(weight)), RANK, 2.0) for start in (of(same, same), PiSSA()))
    torch.testing.assert_close(fila.b @ fila.a, pissa.b @ pissa.a, atol=1e-5, rtol=0)
    torch.testing.assert_close(fila.a @ fila.a.T, pissa.a @ pissa.a.T, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        product(of(same, same, official=True), weight), product(PiSSA(), weight), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_output_at_first_is_that_of_the_base(method):
    layer, x = nn.Linear(40, 24), torch.randn(6, 40)
    delta = filled(layer, method, of(squares(24, 40), squares(24, 40)), rank=RANK, alpha=8)
    torch.testing.assert_close(
        delta.linear(x, layer.weight.detach(), layer.bias.detach()), layer(x).detach(), atol=1e-4, rtol=1e-4
    )


def test_the_size_of_the_forget_gradients_does_not_count():
    weight, forget, retain = torch.randn(24, 40), squares(24, 40), squares(24, 40)
    usual, larger = (of(factor * forget, retain).pair(site_of(linear(weight)), RANK, 2.0) for factor in (1.0, 1e4))
    torch.testing.assert_close(larger.b @ larger.a, usual.b @ usual.a, atol=1e-4, rtol=0)
    torch.testing.assert_close(larger.a @ larger.a.T, usual.a @ usual.a.T, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(
        product(of(1e4 * forget, retain, official=True), weight), product(of(forget, retain, official=True), weight),
        atol=5e-2, rtol=0,
    )  # fmt: skip


@pytest.mark.parametrize("official", [False, True])
def test_rows_that_do_not_matter_stay_in_the_frozen_weight(official):
    weight, forget, retain = torch.randn(24, 40), squares(24, 40), squares(24, 40)
    forget[10:] = 0.0
    taken = product(of(forget, retain, official=official), weight)
    assert float(taken[10:].abs().max()) == 0.0
    assert float(taken[:10].abs().max()) > 0.1


def test_the_floor_leaves_rows_of_little_importance_in_part():
    weight, forget, retain = torch.randn(24, 40), torch.ones(24, 40), torch.ones(24, 40)
    forget[5] = 1e-6  # d of this row is a thousandth of the others'
    whole, part = (product(of(forget, retain, floor=floor), weight)[5] for floor in (0.0, 1e-2))
    torch.testing.assert_close(part, 0.1 * whole, atol=1e-5, rtol=1e-3)


def test_epsilon_is_relative_so_that_the_size_of_all_gradients_does_not_count():
    weight, forget, retain = torch.randn(24, 40), squares(24, 40), squares(24, 40)
    site = site_of(linear(weight))

    def turned(official: bool) -> float:
        """How far d / |d| moves where all gradients are a thousandth."""
        (one, other) = (of(scale * forget, scale * retain, official=official).importance(site) for scale in (1.0, 1e-6))
        return float((one / one.norm() - other / other.norm()).norm())

    assert turned(official=False) < 1e-6
    assert turned(official=True) > 0.01
    tiny = of(1e-10 * forget, 1e-10 * retain, official=True).importance(site)
    without = forget.double().sum(1).sqrt()
    torch.testing.assert_close(tiny / tiny.norm(), without / without.norm(), atol=1e-6, rtol=0)  # F_retain is lost


def test_layers_that_one_of_the_sets_does_not_reach_start_all_the_same():
    weight, some, none = torch.randn(24, 40), squares(24, 40), torch.zeros(24, 40)
    alone = product(of(some, none), weight)
    d = some.double().sum(1).sqrt().unsqueeze(1)
    sigma = torch.linalg.svdvals(d * weight.double())
    assert float((d * (weight - alone).double()).norm()) == pytest.approx(float(sigma[RANK:].norm()), rel=1e-4)
    with pytest.warns(UserWarning, match="nothing of 'layer' matters for what is to be forgotten"):
        pair = of(none, some).pair(site_of(linear(weight)), RANK, 2.0)
    assert pair.b is None


def test_a_large_layer_is_decomposed_at_random_or_exactly():
    weight, forget, retain = torch.randn(340, 300), squares(340, 300), squares(340, 300)
    d = row_weights(forget, retain, 0.1 * float(retain.double().mean())).unsqueeze(1)
    least = float(torch.linalg.svdvals(d * weight.double())[8:].norm())
    near, exact = (product(of(forget, retain, exact=exact), weight, rank=8) for exact in (False, True))
    assert float((d * (weight - exact)).norm()) == pytest.approx(least, rel=1e-4)
    assert least <= float((d * (weight - near)).norm()) <= 1.004 * least


def test_statistics_without_the_fisher_and_impossible_options_are_refused():
    site, ones = site_of(nn.Linear(4, 3)), torch.ones(3, 4)
    gradients = statistics(gradient={"layer": ones})
    with pytest.raises(DataError, match="there is no fisher of 'layer' in these statistics"):
        FILA(gradients, statistics(fisher={"layer": ones})).pair(site, 2, 1.0)
    with pytest.raises(ConfigError, match="retain=NoneType is no statistics of a model"):
        FILA(gradients, None)
    with pytest.raises(ConfigError, match=r"epsilon=-1\.0 must be a finite number above 0"):
        of(ones, ones, epsilon=-1.0)
    with pytest.raises(ConfigError, match=r"floor=2\.0 must be a finite number at least 0"):
        of(ones, ones, floor=2.0)
