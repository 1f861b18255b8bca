"""LoRA-GA against its paper's equations: the first step, the scales, what a poor gradient leaves, PEFT's directions."""

from __future__ import annotations

import copy

import pytest
import torch
from begun import filled, linear, probed, site_of, small, statistics, with_singular_values
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from fallow.core.errors import ConfigError, DataError
from fallow.core.starting import Pair
from fallow.core.statistics import LayerStatistics, Sketch, Statistics
from fallow.starts.lora_ga import DIRECTIONS, SCALES, LoRAGA

RANK = 4


def of(gradient: Tensor, **options: object) -> LoRAGA:
    return LoRAGA(statistics(gradient={"layer": gradient}), **options)


def pair_of(
    gradient: Tensor, rank: int = RANK, scale: float = 2.0, weight: Tensor | None = None, **options: object
) -> Pair:
    """`scale`: s; `scale_mode`: the start's own option `scale`."""
    weight = torch.randn_like(gradient) if weight is None else weight
    if "scale_mode" in options:
        options["scale"] = options.pop("scale_mode")
    return of(gradient, **options).pair(site_of(linear(weight)), rank, scale)


def first_step(b: Tensor, a: Tensor, gradient: Tensor, scale: float, lr: float) -> Tensor:
    """What one step of SGD moves s B A by, the gradient of W being constant."""
    b, a, g = b.double(), a.double(), gradient.double()
    return scale * ((b - lr * scale * g @ a.T) @ (a - lr * scale * b.T @ g) - b @ a)


def truncated(gradient: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(gradient.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def gradient_of_a_batch(layer: nn.Linear, samples: int = 200) -> Tensor:
    x, y = torch.randn(samples, layer.in_features), torch.randn(samples, layer.out_features)
    (layer(x) - y.sin()).square().mean().backward()
    return layer.weight.grad.clone()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_first_step_is_the_best_approximation_of_rank_two_r(direction, shape):
    g, lr, gamma, scale = gradient_of_a_batch(nn.Linear(shape[1], shape[0])), 1e-3, 16.0, 4.0
    pair = pair_of(g, scale=scale, direction=direction)
    moved = first_step(pair.b, pair.a, g, scale, lr)
    c2 = shape[0] ** 0.5 / gamma
    want = -lr * scale**2 * c2 * truncated(g, 2 * RANK)
    assert float((moved - want).norm() / want.norm()) < 0.01
    sigma = torch.linalg.svdvals(g.double())
    reached = float(sigma[: 2 * RANK].norm() / sigma.norm())
    assert float(-(moved * g).sum() / moved.norm() / g.norm()) == pytest.approx(reached, abs=1e-4)


def test_shared_directions_and_random_factors_point_less_along_the_gradient():
    g = gradient_of_a_batch(nn.Linear(40, 24))
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    pair = pair_of(g)

    def cosine(b: Tensor, a: Tensor) -> float:
        moved = first_step(b, a, g, 2.0, 1e-3)
        return float(-(moved * g).sum() / moved.norm() / g.norm())

    ours, shared = cosine(pair.b, pair.a), cosine(u[:, :RANK], vt[:RANK])
    plain = cosine(torch.zeros(24, RANK), (torch.rand(RANK, 40) * 2 - 1) / 40**0.5)
    assert ours > shared + 0.1
    assert shared > plain + 0.1


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("bias", [True, False])
def test_one_step_of_sgd_through_the_layer_moves_as_the_theory_says(scaling, bias):
    layer = nn.Linear(40, 24, bias)
    x, y = torch.randn(200, 40), torch.randn(200, 24)
    (layer(x) - y).square().mean().backward()
    g = layer.weight.grad.clone()
    delta = filled(layer, "lora", of(g), rank=RANK, alpha=8, scaling=scaling)
    s, lr = delta.scaling, 1e-5
    assert s == {"standard": 2.0, "rslora": 4.0}[scaling]
    weight, bias_ = layer.weight.detach(), layer.bias.detach() if bias else None
    torch.testing.assert_close(delta.linear(x, weight, bias_), layer(x).detach(), atol=1e-5, rtol=1e-5)
    delta.double()
    out = delta.linear(x.double(), weight.double(), bias_.double() if bias else None)
    (out - y).square().mean().backward()
    before = delta.delta_weight().detach()
    torch.optim.SGD(delta.parameters(), lr).step()
    want = -lr * s**2 * 24**0.5 / 16 * truncated(g, 2 * RANK)
    moved = delta.delta_weight().detach() - before
    assert float((moved - want).norm() / want.norm()) < 0.01


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_factors_are_orthonormal_times_a_constant_of_the_number_of_outputs(shape, direction):
    g, gamma = torch.randn(*shape), 64.0
    pair = pair_of(g, gamma=gamma, direction=direction)
    want = shape[0] ** 0.5 / gamma * torch.eye(RANK)
    torch.testing.assert_close(pair.a @ pair.a.T, want, atol=1e-4, rtol=0)
    torch.testing.assert_close(pair.b.T @ pair.b, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("direction", "of_a", "of_b"),
    [
        ("ArB2r", [0, 1, 2, 3], [4, 5, 6, 7]),
        ("A2rBr", [4, 5, 6, 7], [0, 1, 2, 3]),
        ("ArBr", [1, 3, 5, 7], [0, 2, 4, 6]),
    ],
)
def test_each_direction_gives_the_factors_their_own_singular_vectors(direction, of_a, of_b):
    g = torch.randn(24, 40)
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    pair = pair_of(g, direction=direction, scale_mode="unit")
    torch.testing.assert_close((pair.a @ vt.T).abs().argmax(1), torch.tensor(of_a))
    torch.testing.assert_close((u.T @ pair.b).abs().argmax(0), torch.tensor(of_b))
    torch.testing.assert_close((pair.a @ vt[of_a].T).abs(), torch.eye(RANK), atol=1e-4, rtol=0)
    torch.testing.assert_close((u[:, of_b].T @ pair.b).abs(), torch.eye(RANK), atol=1e-4, rtol=0)


def test_the_scales_are_what_they_are_called():
    g, weight = torch.randn(24, 40), torch.randn(24, 40)
    size = {mode: float(pair_of(g, weight=weight, scale_mode=mode).a.norm(dim=1).mean()) for mode in SCALES}
    sigma = torch.linalg.svdvals(weight)[:RANK]
    want = {"stable": 24**0.25 / 4, "unit": 1.0, "gd": 0.5, "weightS": float((sigma / 2).sqrt().mean())}
    assert size == pytest.approx(want, rel=1e-4)


def test_clipping_keeps_the_change_below_the_largest_weight_and_the_directions():
    g, weight = torch.randn(24, 40), 0.01 * torch.randn(24, 40)
    free, clipped = (pair_of(g, weight=weight, norm_clip=clip) for clip in (False, True))
    rho = float(weight.abs().max() / (2.0 * free.b @ free.a).abs().max())
    assert rho < 0.5
    torch.testing.assert_close(clipped.a, free.a * rho**0.5)
    torch.testing.assert_close(clipped.b, free.b * rho**0.5)
    large = pair_of(g, weight=1e3 * weight, norm_clip=True)
    torch.testing.assert_close(large.a, free.a)
    assert float(pair_of(g, weight=0 * weight, norm_clip=True).a.norm()) > 0


def test_a_zero_gradient_gives_loras_start_with_a_warning():
    with pytest.warns(UserWarning, match="the gradient of 'layer' is zero"):
        pair = pair_of(torch.zeros(24, 40))
    assert pair.b is None
    assert float(pair.a.abs().max()) <= 40**-0.5
    assert float(pair.a.abs().min()) > 0


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("shape", "known", "rank"),
    [
        ((24, 40), 3, 4),  # fewer directions than r: all of them are the first step's
        ((24, 40), 6, 4),  # between r and 2 r
        ((10, 40), 10, 4),  # a classifier of few classes
        ((10, 10), 10, 8),  # 2 r above both sides, and no direction to spare
        ((10, 12), 10, 10),  # the rank of the layer itself
        ((10, 12), 1, 10),
        ((1, 12), 1, 1),
    ],
)
def test_a_poor_gradient_leaves_a_first_step_along_all_of_it(direction, shape, known, rank):
    g = with_singular_values(*shape, torch.linspace(2, 1, known, dtype=torch.float64)) / 100
    pair = pair_of(g, rank=rank, direction=direction)
    assert bool(torch.isfinite(pair.a).all())
    assert bool(torch.isfinite(pair.b).all())
    assert bool(((pair.a.norm(dim=1) > 1e-3) | (pair.b.norm(dim=0) > 1e-3)).all())
    scale, lr, c2 = 2.0, 1e-3, shape[0] ** 0.5 / 16
    moved = first_step(pair.b, pair.a, g, scale, lr)
    want = -lr * scale**2 * c2 * truncated(g, 2 * rank)
    assert float((moved - want).norm() / want.norm()) < 0.01


def test_a_gradient_of_tiny_numbers_gives_the_same_directions():
    g = torch.randn(24, 40)
    usual, tiny = pair_of(g), pair_of(g * 1e-36)
    torch.testing.assert_close(tiny.a.T @ tiny.a, usual.a.T @ usual.a, atol=1e-4, rtol=0)
    torch.testing.assert_close(tiny.b @ tiny.b.T, usual.b @ usual.b.T, atol=1e-4, rtol=0)


@pytest.mark.parametrize("exact", [False, True])
def test_a_large_gradient_keeps_nearly_all_of_its_leading_part(exact):
    g = with_singular_values(330, 300, torch.arange(1, 301, dtype=torch.float64) ** -0.5)
    pair = pair_of(g, scale_mode="unit", exact=exact)
    moved = first_step(pair.b, pair.a, g, 1.0, 1e-6)
    sigma = torch.linalg.svdvals(g.double())
    reached = float(-(moved * g).sum() / moved.norm() / g.norm()) / float(sigma[:8].norm() / sigma.norm())
    assert reached == pytest.approx(1.0, abs=1e-6 if exact else 1e-3)


def test_the_random_split_is_the_same_each_time_and_differs_between_layers():
    g = torch.randn(24, 40)
    start = LoRAGA(statistics(gradient={"one": g, "two": g}), direction="random")
    layer = linear(torch.randn(24, 40))
    first, again, other = (start.pair(site_of(layer, name), RANK, 1.0) for name in ("one", "one", "two"))
    assert torch.equal(first.a, again.a)
    assert not torch.allclose(first.a @ first.a.T, first.a @ other.a.T, atol=1e-3)


def test_a_sketch_gives_the_leading_directions_and_one_too_narrow_is_refused():
    shape = (40, 30)
    g = with_singular_values(*shape, 0.3 ** torch.arange(30, dtype=torch.float64))
    omega, psi = Sketch.projections(shape, 24, 7)
    layers = {"layer": LayerStatistics(shape, gradient_sketch=Sketch(g @ omega, psi @ g, 7))}
    start = LoRAGA(Statistics(layers, 1), scale="unit")
    pair, full = start.pair(site_of(linear(g)), RANK, 1.0), pair_of(g, scale_mode="unit")
    torch.testing.assert_close(pair.a.T @ pair.a, full.a.T @ full.a, atol=1e-3, rtol=0)
    with pytest.raises(DataError, match="was sketched with 24 columns, of which 26 directions do not follow"):
        start.pair(site_of(linear(g)), 13, 1.0)


def test_peft_starts_a_in_the_same_directions():
    torch.manual_seed(0)
    base, x, y = nn.Sequential(nn.Linear(40, 24)), torch.randn(200, 40), torch.randn(200, 24)
    (base(x) - y).square().mean().backward()
    g = base[0].weight.grad.clone()
    theirs = copy.deepcopy(base)
    config = LoraConfig(
        r=RANK, lora_alpha=8, target_modules=["0"], init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction="ArB2r", scale="stable"),
    )  # fmt: skip
    preprocess_loraga(theirs, config, lambda: (theirs(x) - y).square().mean().backward())
    a = get_peft_model(theirs, config).base_model.model[0].lora_A["default"].weight.detach()
    own = pair_of(g, scale_mode="unit").a
    torch.testing.assert_close(own.T @ own, a.T @ a, atol=1e-4, rtol=0)


def test_a_layer_without_a_gradient_is_named():
    model, x = small()
    start = LoRAGA(probed(model, x, ("conv",)))
    with pytest.raises(DataError, match="'up' is not among the 1 layers"):
        start.pair(site_of(model.up, "up"), RANK, 1.0)
    none = LoRAGA(statistics(fisher={"layer": torch.ones(24, 40)}))
    with pytest.raises(DataError, match="there is no gradient of 'layer'"):
        none.pair(site_of(nn.Linear(40, 24)), RANK, 1.0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"direction": "ArB3r"}, "direction='ArB3r' must be one of 'ArB2r'"),
        ({"scale": "large"}, "scale='large' must be one of 'stable'"),
        ({"gamma": 0.0}, "gamma=0.0 must be a finite number above 0"),
        ({"norm_clip": "yes"}, "norm_clip='yes' must be one of"),
        ({"exact": 2}, "exact=2 must be one of"),
    ],
)
def test_impossible_options_are_refused_by_name(options, told):
    with pytest.raises(ConfigError, match=told):
        of(torch.randn(3, 4), **options)


def test_what_is_no_statistics_is_refused():
    with pytest.raises(ConfigError, match="statistics=dict is no statistics of a model; give"):
        LoRAGA({"layer": torch.randn(3, 4)})
