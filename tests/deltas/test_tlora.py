"""TLoRA against its equations by definition, the paper's counts, and what its published start cannot do."""

from __future__ import annotations

import copy

import pytest
import torch
from one_layer import LAYERS, OneLayer, inputs, with_matrix
from torch import Tensor, nn

from fallow.core.errors import ConfigError, ModelError
from fallow.core.tensor_ring import ring_apply, ring_matrix
from fallow.core.views import view_of
from fallow.deltas.tlora import TLoRA

KINDS = [kind for kind in sorted(LAYERS) if kind != "embedding"]
FORMS = [
    {"transform_rank": 1},
    {"transform_rank": 2},
    {"transform_rank": 2, "residual": "tr", "rank": 3},
    {"transform_rank": 1, "residual": "ttm", "rank": 2},
    {"transform_rank": 3, "residual": "none", "rings": "paper"},
    {"transform_rank": 0, "residual": "tr"},
]


def adapted(layer: nn.Module | str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = (LAYERS[layer]() if isinstance(layer, str) else layer).to(dtype)
    model = OneLayer(layer, "tlora", **options)
    model.delta.randomize()
    return model, inputs(layer)


def residual(model: OneLayer) -> Tensor:
    """Delta, from its definition."""
    delta = model.delta
    (out, width), kind = model.view.shape, delta.o.residual
    if kind == "none":
        return torch.zeros(out, width, dtype=torch.float64)
    if kind == "lora":
        return delta.B @ delta.A
    if kind == "ttm":
        return ring_matrix([getattr(delta, f"B{d}") for d in range(max(len(delta.outs), len(delta.ins)))])
    rows = [[torch.eye(delta.o.rank, dtype=torch.float64)] for _ in range(2)]
    for side, letter, sizes in ((0, "B", delta.outs), (1, "C", delta.ins)):
        for d, n in enumerate(sizes):
            rows[side] = [m @ getattr(delta, f"{letter}{d}")[i] for m in rows[side] for i in range(n)]
    return torch.stack([torch.stack([(b @ c).trace() for c in rows[1]]) for b in rows[0]])


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_unchanged_at_the_start(kind: str, options: dict) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    model, x = OneLayer(layer, "tlora", **options), inputs(layer)
    torch.testing.assert_close(model(x), layer(x), atol=2e-6, rtol=2e-6)
    if options["transform_rank"] < 2:
        assert torch.equal(model.merged(), model.view.read(layer.weight))


@pytest.mark.parametrize("start", ["paper", "bonds"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("width", [24, 7, 1])
@pytest.mark.filterwarnings("ignore:.*its transform is dense")
def test_the_transform_is_the_identity_at_the_start(start: str, rank: int, width: int) -> None:
    if start == "bonds" and rank == 1:
        return
    delta = OneLayer(nn.Linear(width, 6), "tlora", transform_rank=rank, rank=1, rings=start).delta
    torch.testing.assert_close(ring_matrix(delta.cores()), torch.eye(width), atol=1e-6, rtol=0)


def test_noise_leaves_the_identity_by_a_few_hundredths_and_says_so() -> None:
    delta = OneLayer(nn.Linear(64, 6), "tlora", transform_rank=2, rings="noise").delta
    far = (ring_matrix(delta.cores()) - torch.eye(64)).detach().abs().max()
    assert 5e-3 < float(far) < 0.15
    assert delta.starts
    assert not OneLayer(nn.Linear(64, 6), "tlora").delta.starts


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_w_t_plus_s_delta_in_values_gradients_and_merged(kind: str, options: dict) -> None:
    model, x = adapted(kind, alpha=3.0, **options)
    layer, delta = model.layer, model.delta
    w = view_of(layer).read(layer.weight)
    if options["transform_rank"]:
        w = w @ ring_matrix(delta.cores())
    w = w + 3.0 / delta.o.rank**0.5 * residual(model)
    want = with_matrix(layer, w, x)
    got = model(x)
    torch.testing.assert_close(got, want)
    weights, params = torch.randn_like(got), list(delta.parameters())
    mine, theirs = (torch.autograd.grad((t * weights).sum(), params) for t in (got, want))
    torch.testing.assert_close(mine, theirs)
    assert all(float(g.abs().max()) > 1e-8 for g in mine)
    torch.testing.assert_close(model.by_merged(x), got)


@pytest.mark.parametrize("rank", [1, 2])
def test_transforming_the_weight_the_input_or_by_the_dense_matrix_is_the_same(rank: int) -> None:
    model, x = adapted("linear", transform_rank=rank, residual="none")
    cores, layer = model.delta.cores(), model.layer
    by_input = layer(ring_apply(x, [core.transpose(0, 1) for core in cores]))
    torch.testing.assert_close(model(x), by_input)
    torch.testing.assert_close(model(x), layer(x @ ring_matrix(cores).T))


def test_the_ring_residual_has_a_rank_above_its_own_and_standard_scaling_divides_by_it() -> None:
    model, _ = adapted("linear", transform_rank=0, residual="tr", rank=2, scaling="standard", alpha=3.0)
    d = model.merged() - model.layer.weight
    assert int(torch.linalg.matrix_rank(d)) == 4
    torch.testing.assert_close(d, 1.5 * residual(model))


def layers(blocks: dict[int, int], text: int) -> list[tuple[int, int]]:
    """(out, in) of q, k, v and out of the self- and the cross-attention of these many blocks of a width."""
    return [shape for width, count in blocks.items() for shape in ([(width, width)] * 6 + [(width, text)] * 2) * count]


SD15 = layers({320: 5, 640: 5, 1280: 6}, 768)
SDXL = layers({640: 10, 1280: 60}, 2048)


@pytest.mark.parametrize(
    ("shapes", "options", "total"),
    [
        (SD15, {"transform_rank": 0, "rank": 4}, 797_184),
        (SD15, {"transform_rank": 2, "rank": 4}, 941_440),
        (SD15, {"transform_rank": 2, "rank": 6, "residual": "tr"}, 400_288),
        (SDXL, {"transform_rank": 0, "rank": 1}, 1_451_520),
        (SDXL, {"transform_rank": 1, "rank": 2, "residual": "tr"}, 396_720),
        (SDXL, {"transform_rank": 1, "rank": 1}, 1_697_040),
    ],
)
def test_trained_numbers_are_those_of_the_paper(shapes: list, options: dict, total: int) -> None:
    assert (len(SD15), len(SDXL)) == (128, 560)
    assert sum(TLoRA.parameter_count(shape, TLoRA.Options(**options)) for shape in shapes) == total


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(20, 12), (7, 24)])
def test_trained_numbers_are_the_formula(options: dict, shape: tuple[int, int]) -> None:
    delta = OneLayer(nn.Linear(shape[1], shape[0]), "tlora", **options).delta
    assert sum(p.numel() for p in delta.parameters()) == TLoRA.parameter_count(shape, TLoRA.Options(**options))


def trained(start: str, steps: int = 50) -> OneLayer:
    torch.manual_seed(0)
    layer = nn.Linear(24, 16, bias=False, dtype=torch.float64)  # float32 parts them by its rounding, 1e-5
    model = OneLayer(layer, "tlora", transform_rank=2, residual="none", rings=start)
    target = layer.weight @ (torch.eye(24) + 0.2 * torch.randn(24, 24)).double()
    optimizer = torch.optim.Adam(model.delta.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (model.delta.transform(layer.weight) - target).square().mean().backward()
        optimizer.step()
    return model


def spread(model: OneLayer) -> float:
    """How far the slices of a core are from each other, in what was trained."""
    moved = [getattr(model.delta, f"T{d}").detach().flatten(2) for d in range(3)]
    assert all(float(t.abs().max()) > 0.01 for t in moved)
    return max(float((t - t[..., :1]).abs().max()) for t in moved)


def test_slices_stay_equal_with_the_published_start_and_part_with_the_repaired_one() -> None:
    assert spread(trained("paper")) < 1e-9
    assert spread(trained("bonds")) > 0.05


def test_the_trained_transform_is_dense_and_of_full_rank() -> None:
    t = ring_matrix(trained("bonds", 200).delta.cores()).detach()
    assert int(torch.linalg.matrix_rank(t)) == 24
    assert float((t.abs() > 1e-7).float().mean()) > 0.9


def test_weight_decay_pulls_the_transform_to_the_identity() -> None:
    model = trained("bonds")
    far = float((ring_matrix(model.delta.cores()) - torch.eye(24)).detach().norm())
    optimizer = torch.optim.SGD(model.delta.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(400):
        for p in model.delta.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert float((ring_matrix(model.delta.cores()) - torch.eye(24)).detach().norm()) < 0.05 * far
    assert far > 0.1


def test_the_penalty_is_the_norms_of_the_distances_of_all_slices_from_the_start() -> None:
    model, _ = adapted("linear", penalty=0.3)
    fresh = OneLayer(model.layer, "tlora").delta
    want = sum(
        (got - start)[:, :, r, s].norm()
        for got, start in zip(model.delta.cores(), fresh.cores(), strict=True)
        for r in range(2)
        for s in range(2)
    )
    torch.testing.assert_close(model.delta.loss(), 0.3 * want)
    model.delta.loss().backward()
    untouched = OneLayer(nn.Linear(12, 20), "tlora", penalty=0.3).delta
    assert float(untouched.loss().detach()) == 0
    untouched.loss().backward()
    assert all(torch.isfinite(p.grad).all() for n, p in untouched.named_parameters() if n[0] == "T")
    assert adapted("linear")[0].delta.loss() is None


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_training_goes_on_from_a_state_dict_bit_for_bit(options: dict) -> None:
    model, x = adapted("linear", torch.float32, **options)
    again = OneLayer(copy.deepcopy(model.layer), "tlora", fresh=False, seed=9, **options)
    again.delta.load_state_dict(model.delta.state_dict())
    for one in (model, again):
        optimizer = torch.optim.AdamW(one.delta.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            (one(x) - 1).square().mean().backward()
            optimizer.step()
    assert torch.equal(model(x), again(x))


def test_scale_moves_along_the_line_from_w() -> None:
    model, x = adapted("conv")
    base, once = model.layer(x), model(x)
    model.scale = 0.5
    torch.testing.assert_close(model(x), base + 0.5 * (once - base))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_bf16_layers_start_unchanged_and_train_float32_cores(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]().bfloat16()
    model, x = OneLayer(layer, "tlora"), inputs(layer)
    assert torch.equal(model(x), layer(x))  # the cast takes the rounding of the bonds away
    model.delta.randomize()
    got = model(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), copy.deepcopy(model).double().by_merged(x.double()), atol=0.1, rtol=0.05)
    got.float().sum().backward()
    assert model.delta.T0.grad.dtype == torch.float32


def test_nothing_as_large_as_the_weight_is_kept_for_the_backward() -> None:
    model = OneLayer(nn.Linear(64, 96), "tlora", transform_rank=2)
    own, kept = {p.data_ptr() for p in model.parameters()}, []

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept.append(t.numel())
        return t

    x = torch.randn(5, 64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x)
    assert max(kept) <= x.numel()


@pytest.mark.parametrize("options", [*FORMS[:3], {**FORMS[3], "rank": 1}], ids=str)
def test_few_tokens_go_through_the_cores_and_many_through_the_weight_to_the_same(options: dict) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(512, 64, dtype=torch.float64)
    model = OneLayer(layer, "tlora", **options, alpha=3.0)
    with torch.no_grad():
        for p in model.delta.parameters():
            p.add_(0.05 * torch.randn_like(p))
    x = torch.randn(200, 512, dtype=torch.float64)
    ways = [x[:6].requires_grad_(), x.requires_grad_()]
    assert [model.delta.joins(one) for one in ways] == [True, False]
    w = layer.weight @ ring_matrix(model.delta.cores()) + 3.0 / model.delta.o.rank**0.5 * residual(model)
    for one in ways:
        got, want = model(one), nn.functional.linear(one, w, layer.bias)
        torch.testing.assert_close(got, want)
        inputs = [one, *model.delta.parameters()]
        weights = torch.randn_like(got)
        mine, theirs = (torch.autograd.grad((y * weights).sum(), inputs, retain_graph=True) for y in (got, want))
        torch.testing.assert_close(mine, theirs)


def test_the_compiled_layer_is_the_layer() -> None:
    model, x = adapted("linear", torch.float32, residual="tr", rank=2)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_a_width_without_factors_is_told_and_its_transform_is_dense() -> None:
    with pytest.warns(UserWarning, match="'layer' has 97 inputs, a prime"):
        delta = OneLayer(nn.Linear(97, 12), "tlora", transform_rank=1).delta
    assert delta.T0.shape == (97, 97, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform_rank": -1}, "transform_rank=-1"),
        ({"rank": 0}, "rank=0"),
        ({"residual": "svd"}, "residual='svd'"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"scaling": "none"}, "scaling='none'"),
        ({"order": 0}, "order=0"),
        ({"order": 1_000_000}, "order=1000000"),
        ({"rings": "uv"}, "rings='uv'"),
        ({"penalty": -1.0}, "penalty=-1.0"),
        ({"transform_rank": 0, "residual": "none"}, "changes nothing"),
        ({"transform_rank": 1, "rings": "bonds"}, "rings='bonds' needs"),
    ],
)
def test_impossible_options_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TLoRA.Options(**options)


def test_a_rank_above_the_layers_and_an_embedding_are_refused() -> None:
    with pytest.raises(ConfigError, match="rank=13"):
        OneLayer(nn.Linear(20, 12), "tlora", rank=13)
    with pytest.raises(ModelError, match="a layer of the kind 'embedding'"):
        OneLayer(nn.Embedding(8, 12), "tlora")
