"""SVFit against the paper's residual form, and what its specification promises."""

from __future__ import annotations

import warnings

import pytest
import torch
from one_layer import LAYERS, OneLayer, inputs, with_matrix
from torch import Tensor, nn

from fallow.core.errors import AdapterError, ConfigError
from fallow.core.views import view_of
from fallow.deltas.svfit import SVFit

ALL = sorted(LAYERS)
K = {"linear": 12, "wide": 12, "conv": 8, "conv1d": 8, "grouped": 12, "embedding": 12}


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    return OneLayer(layer, "svfit", **options), inputs(layer)


def matrix(model: OneLayer) -> Tensor:
    return view_of(model.layer).read(model.layer.weight.detach())


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("options", [{"rank": 1}, {"rank": 3, "relative": True}, {}, {"nonneg": True}], ids=str)
@pytest.mark.parametrize("form", ["added", "rewritten"])
def test_layer_is_the_papers_residual_form_in_values_and_gradients(kind: str, options: dict, form: str) -> None:
    model, x = adapted(kind, form=form, **options)
    model.delta.randomize()
    delta, w = model.delta, matrix(model)
    rank = options.get("rank", K[kind])
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    shift = delta.delta.detach().clone().requires_grad_()
    sigma = s[:rank] * (1 + shift) if options.get("relative") else s[:rank] + shift
    sigma = sigma.relu() if options.get("nonneg") else sigma
    residual = w - (u[:, :rank] * s[:rank]) @ vt[:rank]
    want = with_matrix(model.layer, residual + (u[:, :rank] * sigma) @ vt[:rank], x)
    got = model(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(delta.sigma(), sigma)
    torch.testing.assert_close(model.by_merged(x), got)
    weights = torch.randn_like(got)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(delta.delta.grad, shift.grad)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_unchanged_at_the_start_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    for options in ({"rank": 1}, {}, {"nonneg": True}, {"form": "rewritten"}):
        model, x = adapted(kind, dtype, **options)
        assert torch.equal(model(x), model.layer(x)), options


def test_gradient_and_step_are_the_projection_of_the_dense_ones() -> None:
    model, x = adapted("linear")
    dense = model.layer.weight.detach().clone().requires_grad_()
    weights = torch.randn(3, 5, 20, dtype=torch.float64)
    (torch.nn.functional.linear(x, dense) * weights).sum().backward()
    (model(x) * weights).sum().backward()
    u, _, vt = torch.linalg.svd(matrix(model), full_matrices=False)
    wanted = torch.stack([u[:, j] @ dense.grad @ vt[j] for j in range(12)])
    torch.testing.assert_close(model.delta.delta.grad, wanted)
    torch.optim.SGD(model.delta.parameters(), lr=0.1).step()
    torch.testing.assert_close(model.merged() - matrix(model), -0.1 * (u * wanted) @ vt)


def test_merged_weight_has_the_trained_singular_values_and_the_old_vectors() -> None:
    model, _ = adapted("linear")
    values = torch.rand(12, dtype=torch.float64) + 0.1
    with torch.no_grad():
        model.delta.delta.copy_(values - model.delta.s)
    merged = model.merged()
    torch.testing.assert_close(torch.linalg.svdvals(merged), values.sort(descending=True).values)
    u, _, vt = torch.linalg.svd(matrix(model), full_matrices=False)
    inner = u.T @ merged @ vt.T
    assert float((inner - inner.diagonal().diag()).abs().max()) < 1e-10


def test_zeroing_the_last_values_gives_the_best_approximation_of_that_rank() -> None:
    model, _ = adapted("linear")
    with torch.no_grad():
        model.delta.delta[5:] = -model.delta.s[5:]
    error = (model.merged() - matrix(model)).norm()
    torch.testing.assert_close(error, model.delta.s[5:].square().sum().sqrt())
    assert torch.linalg.matrix_rank(model.merged(), atol=1e-9) == 5


@pytest.mark.parametrize("kind", ALL)
def test_trained_are_as_many_numbers_as_the_rank(kind: str) -> None:
    for options, count in (({"rank": 3}, 3), ({}, K[kind])):
        model, _ = adapted(kind, **options)
        assert SVFit.parameter_count(model.view.shape, model.delta.o) == count
        assert [p.numel() for p in model.delta.parameters() if p.requires_grad] == [count]


def test_energy_takes_the_fewest_values_that_hold_the_share() -> None:
    model, _ = adapted("linear", energy=0.5)
    squares = torch.linalg.svdvals(matrix(model)).square()
    rank = model.delta.delta.numel()
    assert squares[:rank].sum() >= 0.5 * squares.sum() > squares[: rank - 1].sum()
    with pytest.raises(ConfigError, match=r"energy=0\.5 chooses a rank by the weights"):
        SVFit.parameter_count((20, 12), model.delta.o)
    assert adapted("linear", energy=1.0)[0].delta.delta.numel() == 12


def test_file_holds_the_trained_numbers_and_three_more_and_goes_on_exactly() -> None:
    model, x = adapted("linear", torch.float32)
    model.delta.randomize()
    state = model.delta.state_dict()
    assert {name: t.numel() for name, t in state.items()} == {"delta": 12, "mark": 3}
    again, _ = adapted("linear", torch.float32, fresh=False)
    again.delta.load_state_dict(state)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("rank", [3, "full"])
def test_saved_basis_is_not_made_again(rank: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted("linear", torch.float32, rank=rank, save_basis=True)
    model.delta.randomize()
    monkeypatch.setattr("fallow.deltas.svfit.leading", None)  # would fail if called
    again, _ = adapted("linear", torch.float32, rank=rank, save_basis=True, fresh=False)
    again.delta.load_state_dict(model.delta.state_dict())
    assert torch.equal(again(x), model(x))


def test_file_is_refused_on_another_base() -> None:
    state = adapted("linear", torch.float32)[0].delta.state_dict()
    torch.manual_seed(1)
    other = OneLayer(nn.Linear(12, 20), "svfit")
    with pytest.raises(AdapterError, match=r"'svfit' on 'layer'.*another one"):
        other.delta.load_state_dict(state)


def test_mark_cast_to_bf16_is_still_of_the_same_base() -> None:
    model, x = adapted("linear", torch.float32)
    model.delta.randomize()
    state = {name: t.bfloat16() for name, t in model.delta.state_dict().items()}
    again, _ = adapted("linear", torch.float32)
    again.delta.load_state_dict(state)
    torch.testing.assert_close(again(x), model(x), rtol=1e-2, atol=1e-2)


def test_close_singular_values_are_warned_of_unless_the_basis_is_saved() -> None:
    layer = nn.Linear(12, 20)
    q = torch.linalg.qr(torch.randn(20, 12))[0]
    layer.weight.data = q * torch.tensor([2.0, 1, 1, *torch.linspace(0.9, 0.1, 9)]) @ torch.eye(12)
    with pytest.warns(UserWarning, match="'layer' has singular values within 1e-6"):
        OneLayer(layer, "svfit", rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OneLayer(layer, "svfit", rank=1)
        OneLayer(layer, "svfit", save_basis=True)


@pytest.mark.parametrize("weight", ["zero", "rank 3"])
def test_missing_directions_can_still_grow(weight: str) -> None:
    layer = nn.Linear(12, 20)
    layer.weight.data = torch.zeros(20, 12) if weight == "zero" else torch.randn(20, 3) @ torch.randn(3, 12)
    model, x = OneLayer(layer, "svfit", save_basis=True), inputs(layer)
    model(x).square().sum().backward()
    assert bool((model.delta.delta.grad.abs() > 1e-8).all())
    model.delta.randomize()
    torch.testing.assert_close(torch.linalg.svdvals(model.merged()), model.delta.sigma().abs().sort().values.flip(0))


def test_range_finder_is_exact_at_the_start_and_within_a_tenth_of_the_exact_energy() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(300, 320)
    model, x = OneLayer(layer, "svfit", rank=20), inputs(layer)
    exact = OneLayer(layer, "svfit", rank=20, svd="full")
    assert torch.equal(model(x), layer(x))
    share = float(model.delta.s.square().sum() / exact.delta.s.square().sum())
    assert 0.9 < share < 1.0
    torch.testing.assert_close(exact.delta.s, torch.linalg.svdvals(layer.weight)[:20], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.delta.U.T @ model.delta.U, torch.eye(20), rtol=0, atol=1e-5)
    again = OneLayer(layer, "svfit", rank=20)
    assert torch.equal(again.delta.U, model.delta.U)


def test_importance_is_how_far_the_values_moved() -> None:
    model, _ = adapted("linear", rank=3, relative=True)
    model.delta.randomize()
    torch.testing.assert_close(model.delta.importance(), (model.delta.sigma() - model.delta.s).abs().detach())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 0}, r'rank \(or "full"\)=0'),
        ({"rank": 13}, "rank=13 is above"),
        ({"rank": "half"}, "'half'"),
        ({"energy": 0.0}, r"energy=0\.0"),
        ({"energy": 0.5, "rank": 3}, r"rank=3 and energy=0\.5 both choose"),
        ({"svd": "fast"}, "svd='fast' must be one of 'randomized', 'full'"),
        ({"form": "dense"}, "form='dense' must be one of 'added', 'rewritten'"),
        ({"nonneg": 2}, "nonneg=2"),
        ({"relative": "yes"}, "relative='yes'"),
        ({"save_basis": None}, "save_basis=None"),
    ],
)
def test_impossible_options_are_refused_by_name(options: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        adapted("linear", **options)
