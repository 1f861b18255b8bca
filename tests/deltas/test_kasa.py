"""KaSA against its equations and against PEFT's own."""

from __future__ import annotations

import peft
import pytest
import torch
from one_layer import LAYERS, OneLayer, backward_both, inputs, with_matrix
from torch import Tensor, nn

from fallow.core.errors import ConfigError
from fallow.core.views import view_of
from fallow.deltas.kasa import KaSA

ALL = sorted(LAYERS)


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    return OneLayer(layer, "kasa", **{"rank": 3, **options}), inputs(layer)


def matrix(model: OneLayer) -> Tensor:
    return view_of(model.layer).read(model.layer.weight.detach())


def world(model: OneLayer, cut: int) -> Tensor:
    """The weight without its `cut` smallest singular triples."""
    u, s, vt = torch.linalg.svd(matrix(model), full_matrices=False)
    keep = s.numel() - cut
    return (u[:, :keep] * s[:keep]) @ vt[:keep]


@pytest.mark.parametrize("kind", ALL)
def test_start_is_the_truncated_model_on_layers_of_every_shape(kind: str) -> None:
    model, x = adapted(kind)
    torch.testing.assert_close(model(x), with_matrix(model.layer, world(model, 3), x))
    assert float((model(x) - model.layer(x)).detach().abs().max()) > 1e-3
    whole, _ = adapted(kind, torch.float32, trunc_rank=0)
    x = inputs(whole.layer)
    assert torch.equal(whole(x), whole.layer(x))
    other, x = adapted(kind, trunc_rank=5)
    torch.testing.assert_close(other(x), with_matrix(other.layer, world(other, 5), x))


@pytest.mark.parametrize("kind", ["linear", "wide"])
def test_what_is_taken_out_is_the_smallest_singular_values(kind: str) -> None:
    model, _ = adapted(kind)
    truncated = model.merged()
    assert torch.linalg.matrix_rank(truncated, atol=1e-9) == 12 - 3
    tail = torch.linalg.svdvals(matrix(model))[-3:].square().sum().sqrt()
    torch.testing.assert_close((truncated - matrix(model)).norm(), tail)
    float32, _ = adapted(kind, torch.float32)
    error = (float32.merged().double() - world(float32, 3).double()).norm() / matrix(float32).norm()
    assert float(error) < 1e-6


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_layer_is_its_equation_in_values_and_gradients(kind: str, alpha: float | None) -> None:
    model, x = adapted(kind, alpha=alpha)
    model.delta.randomize()
    delta = model.delta
    a, d, b = (p.detach().clone().requires_grad_() for p in (delta.A, delta.d, delta.B))
    want = with_matrix(model.layer, world(model, 3) + (2.0 if alpha is None else 5 / 3) * b @ torch.diag(d) @ a, x)
    got = model(x)
    torch.testing.assert_close(model.by_merged(x), got)
    backward_both(got, want)
    for mine, true in ((delta.A, a), (delta.d, d), (delta.B, b)):
        torch.testing.assert_close(mine.grad, true.grad)


def peft_layer(i: int, o: int, **options: object) -> tuple[peft.PeftModel, nn.Module, nn.Linear]:
    torch.manual_seed(0)
    layer = nn.Linear(i, o).double()
    copy = nn.Linear(i, o).double()
    copy.load_state_dict(layer.state_dict())
    kasa = peft.KasaConfig(beta=0.3, gamma=0.7)
    config = peft.LoraConfig(target_modules=["0"], r=3, lora_alpha=5, kasa_config=kasa, **options)
    model = peft.get_peft_model(nn.Sequential(layer), config, autocast_adapter_dtype=False).double()
    return model, model.base_model.model[0], copy


@pytest.mark.parametrize(("i", "o"), [(12, 20), (20, 12), (12, 12)])
def test_values_gradients_and_penalty_are_pefts_with_the_same_tensors(i: int, o: int) -> None:
    model, theirs, layer = peft_layer(i, o)
    ours = OneLayer(layer, "kasa", rank=3, alpha=5.0, beta=0.3, gamma=0.7, reduction="sum")
    ours.delta.randomize()
    pairs = [
        (ours.delta.A, theirs.lora_A["default"].weight),
        (ours.delta.B, theirs.lora_B["default"].weight),
        (ours.delta.d, theirs.lora_diag["default"]),
    ]
    with torch.no_grad():
        for mine, true in pairs:
            true.copy_(mine)
    x = inputs(layer)
    got, want = ours(x), theirs(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # PEFT decomposes in float32
    torch.testing.assert_close(ours.delta.loss(), model._get_kasa_loss().double(), rtol=1e-5, atol=1e-6)
    (got.square().sum() + ours.delta.loss()).backward()
    (want.square().sum() + model._get_kasa_loss()).backward()
    for mine, true in pairs:
        torch.testing.assert_close(mine.grad, true.grad, rtol=1e-4, atol=1e-5)


def test_fresh_tensors_have_pefts_distributions() -> None:
    torch.manual_seed(0)
    delta = OneLayer(nn.Linear(400, 300), "kasa", rank=64).delta
    assert float(delta.A.detach().abs().max()) <= 1 / 20
    assert float(delta.A.detach().std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    assert float(delta.d.detach().std()) == pytest.approx(1.0, rel=0.3)
    assert not delta.B.any()


@pytest.mark.parametrize("kind", ALL)
def test_parameter_count_is_that_of_lora_and_one_for_each_rank(kind: str) -> None:
    model, _ = adapted(kind)
    out, inner = model.view.shape
    assert KaSA.parameter_count((out, inner), model.delta.o) == 3 * (out + inner) + 3
    assert sum(p.numel() for p in model.delta.parameters()) == 3 * (out + inner) + 3
    assert set(model.delta.state_dict()) == {"A", "d", "B"}


def test_penalties_equal_the_brute_force_ones() -> None:
    delta = adapted("linear", beta=0.3, gamma=0.7)[0].delta
    delta.randomize()
    a, b, d = delta.A, delta.B, delta.d
    small = (b.T @ b - torch.eye(3).double()).norm() + (a @ a.T - torch.eye(3).double()).norm()
    torch.testing.assert_close(delta.loss(), 0.3 * (d**2).sum() + 0.7 * small)
    official = adapted("linear", beta=0.0, gamma=1.0, gram="official")[0].delta
    official.load_state_dict(delta.state_dict())
    large = (a.T @ a - torch.eye(12).double()).norm() + (b @ b.T - torch.eye(20).double()).norm()
    torch.testing.assert_close(official.loss(), large)
    for rows in (a, b.T):
        torch.testing.assert_close(
            official.off_orthonormal(rows) ** 2, delta.off_orthonormal(rows) ** 2 + rows.shape[1] - 3
        )
    assert adapted("linear", beta=0.0, gamma=0.0)[0].delta.loss() is None


@pytest.mark.parametrize("gram", ["small", "official"])
def test_penalty_of_orthonormal_factors_has_finite_gradients(gram: str) -> None:
    delta = adapted("linear", beta=0.0, gamma=1.0, gram=gram)[0].delta
    with torch.no_grad():
        delta.A.copy_(torch.eye(3, 12))
        delta.B.copy_(torch.eye(20, 3))
    delta.loss().backward()
    assert float(delta.loss().detach()) == pytest.approx(0.0 if gram == "small" else 3 + 17**0.5)
    assert not delta.A.grad.any()
    assert not delta.B.grad.any()


def test_mean_divides_the_penalty_by_the_number_of_layers() -> None:
    common = nn.Module()
    layers = [OneLayer(nn.Linear(12, 20), "kasa", rank=3, common=common, name=f"l{n}").delta for n in range(4)]
    alone = OneLayer(nn.Linear(12, 20), "kasa", rank=3, reduction="sum").delta
    alone.load_state_dict(layers[0].state_dict())
    torch.testing.assert_close(layers[0].loss() * 4, alone.loss())


def test_penalties_alone_make_the_factors_orthonormal_and_the_values_nothing() -> None:
    delta = adapted("linear", torch.float32, beta=0.1, gamma=1.0)[0].delta
    with torch.no_grad():
        delta.B.normal_()
    optimizer = torch.optim.Adam(delta.parameters(), lr=0.02)
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 500)
        optimizer.zero_grad()
        delta.loss().backward()
        optimizer.step()
    assert float((delta.B.T @ delta.B - torch.eye(3)).norm().detach()) < 0.05
    assert float((delta.A @ delta.A.T - torch.eye(3)).norm().detach()) < 0.05
    assert float(delta.d.norm().detach()) < 0.05


def test_a_rank_of_value_zero_can_be_cut_out() -> None:
    model, x = adapted("linear")
    model.delta.randomize()
    with torch.no_grad():
        model.delta.d[1] = 0
    want = model(x)
    model.delta.resize(2)
    assert model.delta.A.shape[0] == model.delta.o.rank == 2
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_growth_changes_nothing_and_shrinking_keeps_the_most_important(alpha: float | None) -> None:
    model, x = adapted("linear", alpha=alpha)
    delta = model.delta
    delta.randomize()
    before, parts = model(x), delta.importance()
    for j in range(3):
        part = delta.eta * delta.d[j] * delta.B[:, [j]] @ delta.A[[j]]
        assert float(parts[j]) == pytest.approx(float(part.detach().norm()))
    delta.resize(6)
    torch.testing.assert_close(model(x), before)
    assert delta.cut_A.shape[0] == 3
    weakest = int(parts.argmin())
    want = delta.delta_weight() - delta.eta * delta.d[weakest] * delta.B[:, [weakest]] @ delta.A[[weakest]]
    delta.resize(2)
    torch.testing.assert_close(delta.delta_weight(), want)
    assert delta.d.requires_grad


def test_dropout_leaves_what_is_taken_out_alone() -> None:
    model, x = adapted("linear", dropout=0.5)
    truncated = model(x).detach()
    # B is zero: nothing else is dropped
    torch.testing.assert_close(truncated, with_matrix(model.layer, world(model, 3), x))
    model.delta.randomize()
    assert float((model(x) - model(x)).abs().max().detach()) > 1e-3
    mean = torch.stack([model(x).detach() for _ in range(2000)]).mean(0)
    whole = model.eval()(x).detach()
    assert float((mean - whole).norm() / (whole - truncated).norm()) < 0.1
    conv, x = adapted("conv", dropout=0.5)
    assert conv(x).isfinite().all()


def test_the_truncated_model_shows_on_request() -> None:
    torch.manual_seed(0)
    layer, context = nn.Linear(12, 20).double(), {}
    model, x = OneLayer(layer, "kasa", rank=3, context=context), inputs(layer)
    model.delta.randomize()
    context["truncated_only"] = True
    torch.testing.assert_close(model(x), with_matrix(model.layer, world(model, 3), x))
    context.clear()
    assert float((model(x) - with_matrix(model.layer, world(model, 3), x)).abs().max().detach()) > 1e-3


@pytest.mark.parametrize("weight", ["zero", "rank 5"])
def test_a_weight_of_lower_rank_loses_nothing(weight: str) -> None:
    layer = nn.Linear(12, 20)
    layer.weight.data = torch.zeros(20, 12) if weight == "zero" else torch.randn(20, 5) @ torch.randn(5, 12)
    model, x = OneLayer(layer, "kasa", rank=4), inputs(layer)
    torch.testing.assert_close(model(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_bf16_base_keeps_no_float32_copy_of_the_input(kind: str) -> None:
    model, x = adapted(kind, torch.bfloat16)
    model.delta.randomize()
    kept: list[Tensor] = []
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.delta.delta_forward(x)
    assert not any(t.numel() == x.numel() and t.dtype == torch.float32 for t in kept)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 12}, "rank=12 leaves nothing of 'layer'.*at most 11"),
        ({"trunc_rank": 12}, "trunc_rank=12 leaves nothing of 'layer'.*at most 11"),
        ({"trunc_rank": -1}, "trunc_rank=-1"),
        ({"alpha": 0.0}, r"alpha=0\.0"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"beta": -1.0}, r"beta=-1\.0"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"reduction": "max"}, "reduction='max' must be one of 'mean', 'sum'"),
        ({"gram": "large"}, "gram='large' must be one of 'small', 'official'"),
    ],
)
def test_impossible_options_are_refused_by_name(options: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        adapted("linear", **options)
