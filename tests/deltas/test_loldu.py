"""LoLDU against the paper's residual form, and what its specification promises."""

from __future__ import annotations

import pytest
import torch
from one_layer import LAYERS, OneLayer, backward_both, inputs, with_matrix
from torch import Tensor, nn

from fallow.core.bases import ldu
from fallow.core.errors import AdapterError, ConfigError
from fallow.core.views import view_of
from fallow.deltas.loldu import INITS, LoLDU, _Upper

ALL = sorted(LAYERS)
K = {"linear": 12, "wide": 12, "conv": 8, "conv1d": 8, "grouped": 12, "embedding": 12}


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    return OneLayer(layer, "loldu", **options), inputs(layer)


def matrix(model: OneLayer) -> Tensor:
    return view_of(model.layer).read(model.layer.weight.detach())


def triangles(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P L, D and U by the definition."""
    p, lower, upper = torch.linalg.lu(w)
    d = upper.diagonal()
    return p @ lower, d, torch.diag(1 / d) @ upper


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("options", [{"rank": 1}, {"rank": 3, "alpha": 6.0, "init": "lu"}, {"init": "normal"}], ids=str)
@pytest.mark.parametrize("form", ["added", "rewritten"])
@pytest.mark.parametrize("train_scale", [True, False])
def test_layer_is_the_papers_residual_form_in_values_and_gradients(
    kind: str, options: dict, form: str, train_scale: bool
) -> None:
    model, x = adapted(kind, form=form, train_scale=train_scale, **options)
    delta, w = model.delta, matrix(model)
    z_0, rank = delta.z.detach().clone(), options.get("rank", K[kind])
    scale_0 = 2.0 if "alpha" in options else 1.0
    delta.randomize()
    left, _, upper = triangles(w)
    z = delta.z.detach().clone().requires_grad_()
    scale = (delta.scale.detach().clone() if train_scale else torch.tensor([scale_0]).double()).requires_grad_()
    residual = w - scale_0 * left[:, :rank] @ torch.diag(z_0) @ upper[:rank]
    want = with_matrix(model.layer, residual + scale * (left[:, :rank] @ torch.diag(z) @ upper[:rank]), x)
    got = model(x)
    torch.testing.assert_close(model.by_merged(x), got)
    backward_both(got, want)
    torch.testing.assert_close(delta.z.grad, z.grad)
    if train_scale:
        torch.testing.assert_close(delta.scale.grad, scale.grad)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("init", INITS)
def test_output_is_unchanged_at_the_start_bit_for_bit_whatever_the_start(kind: str, init: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for options in ({"rank": 1}, {"rank": 3, "alpha": 5.0}, {}, {"normalize": True}, {"form": "rewritten"}):
            model, x = adapted(kind, dtype, init=init, **options)
            assert torch.equal(model(x), model.layer(x)), (dtype, options)


def test_starts_are_what_they_are_called() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(400, 400)
    d = ldu(layer.weight.detach())[1]
    mean, z = d.mean(), {init: OneLayer(layer, "loldu", init=init).delta.z.detach() for init in INITS}
    assert torch.equal(z["lu"], d)
    assert torch.equal(z["constant"], mean.expand(400))
    assert torch.equal(z["ones"], torch.ones(400))
    assert not z["zeros"].any()
    assert float(z["uniform"].abs().max()) == pytest.approx(float(mean.abs()) / 2, rel=0.02)
    assert float(z["uniform"].std()) == pytest.approx(float(mean.abs()) / 12**0.5, rel=0.1)
    assert float(z["normal"].mean() - mean) == pytest.approx(0, abs=4 * float(d.std()) / 20)
    assert float(z["normal"].std()) == pytest.approx(float(d.std()), rel=0.15)
    assert float(z["s_uniform"].abs().max()) == pytest.approx(1, rel=0.02)
    assert float(z["s_normal"].std()) == pytest.approx(1, rel=0.15)


def test_gradients_are_the_projections_of_the_dense_one() -> None:
    model, x = adapted("linear", alpha=6.0)
    dense = model.layer.weight.detach().clone().requires_grad_()
    weights = torch.randn(3, 5, 20, dtype=torch.float64)
    (torch.nn.functional.linear(x, dense) * weights).sum().backward()
    (model(x) * weights).sum().backward()
    left, _, upper = triangles(matrix(model))
    parts = torch.stack([left[:, j] @ dense.grad @ upper[j] for j in range(12)])
    torch.testing.assert_close(model.delta.z.grad, 0.5 * parts)
    torch.testing.assert_close(model.delta.scale.grad, (model.delta.z * parts).sum().detach().view(1))


@pytest.mark.parametrize("kind", ["linear", "wide", "conv"])
def test_taking_all_of_it_away_empties_the_first_columns_and_pivot_rows(kind: str) -> None:
    model, _ = adapted(kind, rank=3, init="lu")
    with torch.no_grad():
        model.delta.z.zero_()
    residual = model.merged()
    assert float(residual[:, :3].abs().max()) < 1e-12
    assert float(residual[model.delta.mark.long()].abs().max()) < 1e-12
    full, _ = adapted(kind, init="lu")
    with torch.no_grad():
        full.delta.z.zero_()
    assert float(full.merged().abs().max()) < 1e-12


@pytest.mark.parametrize("kind", ALL)
def test_trained_are_the_rank_and_one_number_or_the_rank(kind: str) -> None:
    for options, count in (({"rank": 3}, 4), ({}, K[kind] + 1), ({"train_scale": False}, K[kind])):
        model, _ = adapted(kind, **options)
        assert LoLDU.parameter_count(model.view.shape, model.delta.o) == count
        assert sum(p.numel() for p in model.delta.parameters()) == count


@pytest.mark.parametrize("weight", ["zero", "rank 3", "zero row", "zero column"])
@pytest.mark.parametrize("normalize", [True, False])
def test_singular_weights_have_no_nan_and_can_be_trained(weight: str, normalize: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 20)
    if weight == "zero":
        layer.weight.data.zero_()
    if weight == "rank 3":
        layer.weight.data = torch.randn(20, 3) @ torch.randn(3, 12)
    if weight == "zero row":
        layer.weight.data[2] = 0
    if weight == "zero column":
        layer.weight.data[:, 0] = 0
    for init in INITS:
        model, x = OneLayer(layer, "loldu", init=init, normalize=normalize), inputs(layer)
        assert torch.equal(model(x), layer(x))
        model(x).square().sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.delta.parameters())
        model.delta.randomize()
        assert bool(model(x).isfinite().all())


def test_normalized_rows_have_norm_one_and_their_norms_are_in_the_start() -> None:
    plain, x = adapted("linear", init="lu")
    model, _ = adapted("linear", init="lu", normalize=True)
    torch.testing.assert_close(model.delta.U.norm(dim=1), torch.ones(12).double())
    for delta in (plain.delta, model.delta):
        torch.testing.assert_close((delta.PL * delta.z) @ delta.U, matrix(plain))
        with torch.no_grad():
            delta.scale.mul_(0.5)
    torch.testing.assert_close(model(x), plain(x))


def test_file_of_a_random_start_works_on_a_fresh_base_and_is_small() -> None:
    model, x = adapted("linear", torch.float32, rank=5)
    model.delta.randomize()
    state = model.delta.state_dict()
    assert {name: (t.numel(), t.dtype) for name, t in state.items()} == {
        "z": (5, torch.float32), "scale": (1, torch.float32), "z_0": (5, torch.float32), "mark": (5, torch.int32),
    }  # fmt: skip
    again, _ = adapted("linear", torch.float32, rank=5, fresh=False)
    torch.manual_seed(7)
    again = OneLayer(model.layer, "loldu", rank=5, fresh=False)
    again.delta.load_state_dict(state)
    assert torch.equal(again(x), model(x))


def test_file_is_refused_where_the_pivots_come_out_otherwise() -> None:
    model, _ = adapted("linear", torch.float32)
    torch.manual_seed(1)
    other = OneLayer(nn.Linear(12, 20), "loldu")
    with pytest.raises(AdapterError, match=r"'loldu' on 'layer'.*another one"):
        other.delta.load_state_dict(model.delta.state_dict())


def test_saved_basis_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted("linear", torch.float32, save_basis=True)
    model.delta.randomize()
    monkeypatch.setattr("fallow.deltas.loldu.ldu", None)  # would fail if called
    again, _ = adapted("linear", torch.float32, save_basis=True, fresh=False)
    again.delta.load_state_dict(model.delta.state_dict())
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 0}, r'rank \(or "full"\)=0'),
        ({"rank": 13}, "rank=13 is above"),
        ({"alpha": 0.0}, r"alpha=0\.0"),
        ({"init": "pissa"}, "init='pissa' must be one of 'uniform'"),
        ({"train_scale": 2}, "train_scale=2"),
        ({"normalize": "rows"}, "normalize='rows'"),
        ({"form": "dense"}, "form='dense'"),
    ],
)
def test_impossible_options_are_refused_by_name(options: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        adapted("linear", **options)


@pytest.mark.parametrize("shape", [(30, 30), (34, 23), (23, 34)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_that_leave_out_the_zeros_of_the_triangle_give_what_the_whole_ones_give(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(*shape).to(dtype)
    model = OneLayer(layer, "loldu", init="normal", normalize=True)
    model.delta.randomize()
    seen, split = [], _Upper.down
    monkeypatch.setattr(_Upper, "down", lambda self, *rest: (seen.append(len(self.blocks)), split(self, *rest))[1])
    found = []
    for worth in (1000, 1):
        monkeypatch.setattr("fallow.deltas.loldu.WORTH_SPLITTING", worth)
        x = torch.linspace(-1, 1, 7 * shape[0]).sin().view(7, -1).to(dtype).requires_grad_()
        y = model(x)
        found.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *model.delta.parameters()])])
        assert seen == ([] if worth == 1000 else [4])
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for whole, parts in zip(*found, strict=True):
        assert float((whole - parts).norm() / whole.norm()) < near
