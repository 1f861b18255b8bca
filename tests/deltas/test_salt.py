"""SALT against its equation, and what its specification promises."""

from __future__ import annotations

import pytest
import torch
from one_layer import LAYERS, OneLayer, backward_both, inputs, with_matrix
from torch import Tensor, nn

from fallow.core.errors import AdapterError, ConfigError
from fallow.core.views import view_of
from fallow.deltas.salt import SALT

ALL = sorted(LAYERS)
RELUS = ["all", "diag", "none"]


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    return OneLayer(layer, "salt", **{"top": 3, "rank": 2, **options}), inputs(layer)


def matrix(model: OneLayer) -> Tensor:
    return view_of(model.layer).read(model.layer.weight.detach())


def changed(model: OneLayer, relu: str, tensors: list[Tensor]) -> Tensor:
    """W' by the equation, on the method's own basis."""
    a, b, x, y = tensors
    delta, r = model.delta, model.delta.top
    top, tail = a * delta.s[:r] + b, torch.diag(delta.s[r:]) + x @ y
    whole = torch.block_diag(torch.diag(top), tail)
    if relu == "all":
        whole = torch.relu(whole)
    if relu == "diag":
        whole = torch.where(torch.eye(len(whole), dtype=torch.bool), torch.relu(whole), whole)
    return delta.U @ whole @ delta.Vt


def shake(delta: SALT) -> None:
    """Large enough that the relu acts on the top, on the tail's diagonal and beside it."""
    with torch.no_grad():
        delta.a.normal_()[0] = -1
        delta.b.normal_()
        delta.X.normal_()
        delta.Y.normal_().mul_(4)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("relu", RELUS)
@pytest.mark.parametrize("form", ["added", "rewritten"])
def test_layer_is_its_equation_in_values_and_gradients(kind: str, relu: str, form: str) -> None:
    model, x = adapted(kind, relu=relu, form=form)
    delta = model.delta
    torch.testing.assert_close((delta.U * delta.s) @ delta.Vt, matrix(model))
    shake(delta)
    assert bool((delta.a * delta.s[:3] + delta.b < 0).any())
    assert bool((delta.s[3:] + (delta.X @ delta.Y).diagonal() < 0).any())
    mine = [delta.a, delta.b, delta.X, delta.Y]
    true = [p.detach().clone().requires_grad_() for p in mine]
    want = with_matrix(model.layer, changed(model, relu, true), x)
    got = model(x)
    torch.testing.assert_close(model.by_merged(x), got)
    backward_both(got, want)
    for p, q in zip(mine, true, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (14, 14)])
@pytest.mark.parametrize("relu", ["all", "diag"])
@pytest.mark.parametrize("rows", [4, 90])
def test_few_rows_are_mixed_and_many_rows_meet_the_formed_weight_with_the_same_result(
    shape: tuple[int, int], relu: str, rows: int
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(*shape).double()
    model = OneLayer(layer, "salt", top=3, rank=2, relu=relu)
    shake(model.delta)
    x = torch.randn(rows, shape[0], dtype=torch.float64, requires_grad=True)
    true = [p.detach().clone().requires_grad_() for p in (x, *model.delta.parameters())]
    got, want = model(x), with_matrix(layer, changed(model, relu, true[1:]), true[0])
    backward_both(got, want)
    assert got.grad_fn.formed == (rows == 90)
    for p, q in zip((x, *model.delta.parameters()), true, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("relu", ["all", "diag"])
def test_a_bf16_base_gets_a_change_and_gradients_made_in_float32(relu: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 32).to(torch.bfloat16)
    model = OneLayer(layer, "salt", top=3, rank=2, relu=relu)
    with torch.no_grad():
        model.delta.randomize()
    x = torch.randn(300, 40, dtype=torch.bfloat16)
    true = [p.detach().double().requires_grad_() for p in model.delta.parameters()]
    exact = OneLayer(nn.Linear(40, 32).double(), "salt", top=3, rank=2, relu=relu)
    exact.layer.weight.data, exact.layer.bias.data = layer.weight.double(), layer.bias.double()
    for name in ("U", "s", "Vt"):
        setattr(exact.delta, name, getattr(model.delta, name).double())
    got, want = model(x), with_matrix(exact.layer, changed(exact, relu, true), x.double())
    assert got.dtype == torch.bfloat16
    assert got.grad_fn.formed is False
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
    grad = torch.randn(300, 32, dtype=torch.bfloat16)
    got.backward(grad)
    want.backward(grad.double())
    for p, q in zip(model.delta.parameters(), true, strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rows", "kept"), [(4, "p"), (90, "x")])
def test_for_the_backward_no_matrix_is_kept(rows: int, kept: str) -> None:
    torch.manual_seed(0)
    model = OneLayer(nn.Linear(12, 20), "salt", top=3, rank=2)
    model.delta.randomize()
    x = torch.randn(rows, 12, requires_grad=True)
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        model(x)
    own = [t.shape for t in saved if t.untyped_storage().data_ptr() not in there]
    assert own == ([(12, rows)] if kept == "p" else [])
    assert (x.data_ptr() in [t.data_ptr() for t in saved]) == (kept == "x")


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("relu", RELUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_init_leaves_the_output_bit_for_bit_and_gauss_changes_it_a_little(
    kind: str, relu: str, dtype: torch.dtype
) -> None:
    model, x = adapted(kind, dtype, relu=relu)
    assert torch.equal(model(x), model.layer(x))
    assert float(model.delta.X.detach().abs().max()) <= (6 / 21 / 2) ** 0.5
    assert float(model.delta.X.detach().std()) > 0.1
    gauss, x = adapted(kind, relu=relu, init="gauss")
    gap = float((gauss(x) - gauss.layer(x)).detach().abs().max())
    assert 0 < gap < 1e-2


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("options", "top", "rank"),
    [({"top": 3, "rank": 2}, 3, 2), ({"top": None, "rank": 2}, 1, 2), ({"top": None, "ratio": 0.5}, None, 2),
     ({"top": 99}, "k", 0), ({"top": 7, "rank": 8}, 7, "rest")],
)  # fmt: skip
def test_parameter_count_is_two_for_each_of_the_top_and_2q_for_each_of_the_tail(
    kind: str, options: dict, top: object, rank: object
) -> None:
    model, _ = adapted(kind, **options)
    k = min(model.view.shape)
    top = {"k": k, None: k // 2}.get(top, top)
    rank = min(8, k - top) if rank == "rest" else rank
    assert (model.delta.a.numel(), model.delta.X.shape) == (top, (k - top, rank))
    count = 2 * top + 2 * rank * (k - top)
    assert SALT.parameter_count(model.view.shape, model.delta.o) == count
    assert sum(p.numel() for p in model.delta.parameters()) == count
    assert not any(b.requires_grad for b in model.delta.buffers())


def test_counts_for_width_768_are_the_papers_where_its_rank_is_not_above_the_tail() -> None:
    for top, rank, count in ((76, 256, 354_456), (700, 68, 10_648), (700, 256, 10_648)):
        assert SALT.parameter_count((768, 2304), SALT.Options(top=top, rank=rank)) == count


@pytest.mark.parametrize("relu", RELUS)
def test_all_values_may_be_the_top(relu: str) -> None:
    for kind in ("linear", "conv"):
        model, x = adapted(kind, torch.float32, top=99, relu=relu)
        assert torch.equal(model(x), model.layer(x))
        model.delta.randomize()
        torch.testing.assert_close(model.by_merged(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relu", RELUS)
def test_first_gradients_are_the_projections_of_the_dense_one(relu: str) -> None:
    model, x = adapted("linear", relu=relu)
    delta = model.delta
    dense = model.layer.weight.detach().clone().requires_grad_()
    weights = torch.randn(3, 5, 20, dtype=torch.float64)
    (torch.nn.functional.linear(x, dense) * weights).sum().backward()
    (model(x) * weights).sum().backward()
    inner = delta.U.T @ dense.grad @ delta.Vt.T
    torch.testing.assert_close(delta.b.grad, inner.diagonal()[:3])
    torch.testing.assert_close(delta.a.grad, inner.diagonal()[:3] * delta.s[:3])
    seen = inner[3:, 3:]
    if relu == "all":  # zero entries pass nothing back, so only the diagonal is heard
        seen = torch.diag(seen.diagonal())
    torch.testing.assert_close(delta.Y.grad, delta.X.T @ seen)


def test_values_of_zero_lower_the_rank_and_negative_ones_act_as_zero() -> None:
    model, x = adapted("linear")
    delta = model.delta
    with torch.no_grad():
        delta.b.copy_(-delta.a * delta.s[:3])
    assert torch.linalg.matrix_rank(model.merged(), atol=1e-9) == 12 - 3
    zero = model(x)
    with torch.no_grad():
        delta.b.sub_(5)
    torch.testing.assert_close(model(x), zero)


def test_without_a_relu_the_change_is_of_rank_top_and_q() -> None:
    model, _ = adapted("linear", relu="none")
    model.delta.randomize()
    b, a = model.delta.factors()
    assert (b.shape, a.shape) == ((20, 5), (5, 12))
    torch.testing.assert_close(b @ a, model.merged() - matrix(model))


def test_penalty_is_the_two_norms_and_has_finite_gradients_at_the_start() -> None:
    delta = adapted("linear", reg=0.3)[0].delta
    delta.loss().backward()
    assert float(delta.loss().detach()) == 0
    assert all(not p.grad.any() for p in delta.parameters())
    shake(delta)
    delta.zero_grad()
    top = (delta.a * delta.s[:3] + delta.b - delta.s[:3]).norm()
    want = 0.3 * (top + (delta.X @ delta.Y).norm())
    torch.testing.assert_close(delta.loss(), want)
    mine = torch.autograd.grad(delta.loss(), list(delta.parameters()))
    true = torch.autograd.grad(want, list(delta.parameters()))
    for p, q in zip(mine, true, strict=True):
        torch.testing.assert_close(p, q)
    assert adapted("linear")[0].delta.loss() is None


def test_file_has_no_basis_and_is_refused_where_its_signs_come_out_otherwise() -> None:
    model, x = adapted("linear", torch.float32)
    model.delta.randomize()
    state = {name: t.clone() for name, t in model.delta.state_dict().items()}
    assert set(state) == {"a", "b", "X", "Y", "mark"}
    again, _ = adapted("linear", torch.float32, fresh=False)
    again.delta.load_state_dict(state)
    assert torch.equal(again(x), model(x))
    state["mark"][0, 7] *= -1  # what a basis with this pair turned round has
    with pytest.raises(AdapterError, match="comes out otherwise here"):
        again.delta.load_state_dict(state)
    torch.manual_seed(1)
    other = OneLayer(nn.Linear(12, 20), "salt", top=3, rank=2)
    with pytest.raises(AdapterError, match="another one"):
        other.delta.load_state_dict(model.delta.state_dict())


def test_saved_basis_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted("linear", torch.float32, save_basis=True)
    model.delta.randomize()
    monkeypatch.setattr("fallow.deltas.salt.all_triples", None)  # would fail if called
    again, _ = adapted("linear", torch.float32, save_basis=True, fresh=False)
    again.delta.load_state_dict(model.delta.state_dict())
    assert torch.equal(again(x), model(x))


def test_close_singular_values_anywhere_are_warned_of() -> None:
    layer = nn.Linear(12, 20)
    layer.weight.data = torch.linalg.qr(torch.randn(20, 12))[0] * torch.tensor([*torch.linspace(2, 1, 10), 0.5, 0.5])
    with pytest.warns(UserWarning, match="singular values within 1e-6"):
        OneLayer(layer, "salt", top=3, rank=2)


def test_a_weight_of_lower_rank_can_grow_by_its_shifts() -> None:
    layer = nn.Linear(12, 20)
    layer.weight.data = torch.randn(20, 3) @ torch.randn(3, 12)
    model, x = OneLayer(layer, "salt", top=6, rank=2, relu="none", save_basis=True), inputs(layer)
    torch.testing.assert_close(model(x), layer(x))
    model(x).square().sum().backward()
    assert float(model.delta.b.grad[3:].abs().min()) > 1e-6
    assert float(model.delta.a.grad[3:].abs().max()) < 1e-3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 13}, "rank=13 is above"),
        ({"top": 0}, "top=0"),
        ({"ratio": 0.0}, r"ratio=0\.0"),
        ({"ratio": 1.5}, r"ratio=1\.5"),
        ({"relu": "some"}, "relu='some' must be one of 'all', 'diag', 'none'"),
        ({"init": "ones"}, "init='ones' must be one of 'zero', 'gauss'"),
        ({"reg": -1.0}, r"reg=-1\.0"),
        ({"form": "dense"}, "form='dense'"),
    ],
)
def test_impossible_options_are_refused_by_name(options: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        adapted("linear", **options)
