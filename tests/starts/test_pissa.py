"""PiSSA, MiLoRA and OLoRA: what they take out of the weight, against their equations and against PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from begun import filled, linear, site_of, with_singular_values
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fallow.core.errors import ConfigError
from fallow.core.starting import Start
from fallow.starts.milora import MiLoRA
from fallow.starts.olora import OLoRA
from fallow.starts.pissa import PiSSA

SHAPES = [(20, 12), (12, 20), (16, 16)]
STARTS = {"pissa": PiSSA, "milora": MiLoRA, "olora": OLoRA}


def product_of(start: Start, layer: nn.Module, rank: int, scale: float) -> Tensor:
    """s B0 A0, which is subtracted again."""
    pair = start.pair(site_of(layer), rank, scale)
    assert not pair.kept
    return scale * pair.b @ pair.a


def product(start: Start, weight: Tensor, rank: int, scale: float) -> Tensor:
    return product_of(start, linear(weight), rank, scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25])
def test_pissa_takes_the_leading_part_in_balanced_factors(shape, scale):
    weight = torch.randn(*shape)
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(
        product(PiSSA(), weight, 4, scale).double(), (u[:, :4] * s[:4]) @ vt[:4], atol=1e-5, rtol=0
    )
    pair = PiSSA().pair(site_of(linear(weight)), 4, scale)
    want = torch.diag(s[:4] / scale).float()
    torch.testing.assert_close(pair.a @ pair.a.T, want, atol=1e-4, rtol=0)
    torch.testing.assert_close(pair.b.T @ pair.b, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_milora_takes_the_least_part_in_balanced_factors(shape):
    weight = torch.randn(*shape)
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    want = (u[:, -4:] * s[-4:]) @ vt[-4:]
    torch.testing.assert_close(product(MiLoRA(), weight, 4, 2.0).double(), want, atol=1e-5, rtol=0)
    pair = MiLoRA().pair(site_of(linear(weight)), 4, 2.0)
    torch.testing.assert_close(torch.linalg.svdvals(pair.a), torch.linalg.svdvals(pair.b), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.svdvals(pair.a).double().square(), s[-4:] / 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_takes_the_first_part_of_the_qr_decomposition_without_making_it(shape):
    weight = torch.randn(*shape)
    q, r = torch.linalg.qr(weight)
    pair = OLoRA().pair(site_of(linear(weight)), 5, 2.0)
    torch.testing.assert_close(pair.b @ pair.a, q[:, :5] @ r[:5], atol=1e-5, rtol=0)
    torch.testing.assert_close(pair.b.T @ pair.b, torch.eye(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(pair.b, q[:, :5], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("fall", "most"), [(0.0, 0.004), (0.5, 0.001), (1.0, 1e-4)])
def test_the_randomised_decomposition_misses_little_and_the_exact_one_nothing(fall, most):
    values = torch.arange(1, 301, dtype=torch.float64) ** -fall
    weight = with_singular_values(340, 300, values) if fall else torch.randn(340, 300)
    values = torch.linalg.svdvals(weight.double())
    least = float(values[16:].square().sum().sqrt())
    missed = {exact: float((weight - product(PiSSA(exact=exact), weight, 16, 1.0)).norm()) for exact in (False, True)}
    assert missed[True] == pytest.approx(least, rel=1e-5)
    assert missed[True] <= missed[False] * (1 + 1e-6)
    assert missed[False] <= least * (1 + most)


@pytest.mark.parametrize("shape", [(340, 300), (300, 340), (300, 300)])
@pytest.mark.parametrize("fall", [0.0, 1.0])
def test_inverse_iterations_find_nearly_the_least_part_and_the_exact_way_all_of_it(shape, fall):
    values = torch.arange(1, 301, dtype=torch.float64) ** -fall
    weight = with_singular_values(*shape, values) if fall else torch.randn(*shape)
    least = float(torch.linalg.svdvals(weight.double())[-16:].norm())
    near, exact = (product(MiLoRA(exact=exact), weight, 16, 1.0) for exact in (False, True))
    assert float(exact.norm()) == pytest.approx(least, rel=1e-3)
    assert float(near.norm()) <= 1.02 * least
    taken, rest = near.double(), weight.double() - near.double()
    shared = taken.T @ rest if shape[0] <= shape[1] else taken @ rest.T  # a projection, though of nearly those vectors
    assert float(shared.abs().max()) < 1e-4
    assert float(torch.linalg.svdvals(taken)[16:].max()) < 1e-5


def test_the_least_directions_of_a_large_weight_of_low_rank_are_those_where_it_is_zero():
    weight = with_singular_values(340, 300, torch.linspace(2, 1, 200, dtype=torch.float64))
    pair = MiLoRA().pair(site_of(linear(weight)), 8, 1.0)
    assert float((pair.b @ pair.a).abs().max()) < 1e-5
    assert bool((pair.a.norm(dim=1) > 1e-2).all())


@pytest.mark.parametrize(
    ("name", "transposed"),
    [("pissa", False), ("pissa", True), ("olora", False)],  # PEFT's OLoRA takes a Conv1D's weight for its matrix
)
def test_peft_takes_out_the_same(name, transposed):
    base = nn.Sequential(Conv1D(20, 12) if transposed else nn.Linear(12, 20))
    weight = base[0].weight.detach().clone()
    matrix = weight.T if transposed else weight
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=name, target_modules=["0"], fan_in_fan_out=transposed)
    theirs = get_peft_model(copy.deepcopy(base), config).base_model.model[0]
    residual = theirs.base_layer.weight.detach()
    own = product(STARTS[name](), matrix, 4, 2.0)
    torch.testing.assert_close(matrix - (residual.T if transposed else residual), own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", STARTS)
def test_a_rank_where_the_weight_has_none_still_learns(name):
    weight = with_singular_values(20, 12, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    pair = STARTS[name]().pair(site_of(linear(weight)), 6, 1.0)
    assert bool(torch.isfinite(pair.a).all())
    assert bool(torch.isfinite(pair.b).all())
    assert bool(((pair.a.norm(dim=1) > 1e-2) | (pair.b.norm(dim=0) > 1e-2)).all())
    want = torch.zeros(20, 12) if name == "milora" else weight
    torch.testing.assert_close(pair.b @ pair.a, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", STARTS)
def test_a_zero_weight_gives_a_start_that_learns(name):
    pair = STARTS[name]().pair(site_of(linear(torch.zeros(8, 6))), 3, 1.0)
    assert float((pair.b @ pair.a).abs().max()) == 0.0
    assert bool(((pair.a.norm(dim=1) > 0) | (pair.b.norm(dim=0) > 0)).all())


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize(
    "make", [lambda: nn.Conv2d(4, 8, 3), lambda: nn.Conv2d(8, 12, 3, groups=2), lambda: nn.Embedding(30, 12)]
)
def test_all_kinds_of_layers_start_with_their_own_matrix(name, make):
    layer = make()
    delta = filled(layer, "lora", STARTS[name](), rank=3, alpha=6)
    b, a = delta.factors()
    assert (b.shape[1], a.shape[0]) == (6, 6)
    torch.testing.assert_close(b @ a, torch.zeros(delta.view.shape), atol=1e-5, rtol=0)
    half = product_of(STARTS[name](), layer, 3, 2.0)
    torch.testing.assert_close(b[:, :3] @ a[:3], half, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", STARTS)
def test_the_first_gradient_is_that_of_the_papers_residual_form(name):
    layer, x = nn.Linear(12, 20), torch.randn(7, 12)
    pair = STARTS[name]().pair(site_of(layer), 4, 2.0)
    a, b = pair.a.clone().requires_grad_(), pair.b.clone().requires_grad_()
    residual = layer.weight.detach() - 2.0 * pair.b @ pair.a
    (x @ (residual + 2.0 * b @ a).T).square().sum().backward()
    delta = filled(layer, "lora", STARTS[name](), rank=4, alpha=8)
    delta.linear(x, layer.weight.detach(), None).square().sum().backward()
    torch.testing.assert_close(delta.A.grad, a.grad, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(delta.B.grad, b.grad, atol=1e-3, rtol=1e-4)


def test_exact_is_yes_or_no():
    with pytest.raises(ConfigError, match="exact='sure' must be one of"):
        PiSSA(exact="sure")
