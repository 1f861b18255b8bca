"""VeRA against its equation and against PEFT's own model."""

from __future__ import annotations

import peft
import pytest
import torch
from one_layer import LAYERS, OneLayer, backward_both, inputs, with_matrix
from torch import Tensor, nn

from fallow.core.errors import ConfigError
from fallow.core.views import view_of
from fallow.deltas.vera import VeRA

ALL = sorted(LAYERS)


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    model, x = OneLayer(layer, "vera", **options), inputs(layer)
    model.delta.randomize()
    return model, x


@pytest.mark.parametrize("kind", ALL)
def test_output_is_unchanged_at_the_start(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    model, x = OneLayer(layer, "vera", rank=5), inputs(layer)
    assert torch.equal(model(x), layer(x))
    assert torch.equal(model.delta.d, torch.full((5,), 0.1))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("rank", [1, 5])  # with b folded into B, and apart
def test_layer_is_w_plus_diag_b_b_diag_d_a_in_values_and_gradients(kind: str, rank: int) -> None:
    model, x = adapted(kind, rank=rank)
    layer, delta = model.layer, model.delta
    d, b = (p.detach().clone().requires_grad_() for p in (delta.d, delta.b))
    change = torch.diag(b) @ model.common.B @ torch.diag(d) @ model.common.A
    w = view_of(layer).read(layer.weight) + change
    want = with_matrix(layer, w, x)
    got = model(x)
    torch.testing.assert_close(model.by_merged(x), got)
    backward_both(got, want)
    torch.testing.assert_close(delta.d.grad, d.grad)
    torch.testing.assert_close(delta.b.grad, b.grad)


def three_layers() -> nn.Sequential:
    """The largest input and the largest output are of different layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 14), nn.Linear(14, 9), nn.Linear(9, 20))


def ours_of(net: nn.Sequential, **options: object) -> list[OneLayer]:
    common = nn.Module()
    return [OneLayer(layer, "vera", common=common, name=str(i), **options) for i, layer in enumerate(net)]


@pytest.mark.parametrize("seed", [0, 7])
def test_projections_values_and_gradients_are_pefts_for_the_same_seed(seed: int) -> None:
    config = peft.VeraConfig(r=5, target_modules=["0", "1", "2"], projection_prng_key=seed)
    theirs = peft.get_peft_model(three_layers(), config)
    ours = ours_of(three_layers(), rank=5, seed=seed)
    common = ours[0].common
    assert torch.equal(common.A, theirs.base_model.vera_A["default"])
    assert torch.equal(common.B, theirs.base_model.vera_B["default"])
    assert common.A.shape == (5, 14)
    assert common.B.shape == (20, 5)
    for layer, mine in zip(theirs.base_model.model, ours, strict=True):
        mine.delta.randomize()
        with torch.no_grad():
            layer.vera_lambda_d["default"].copy_(mine.delta.d)
            layer.vera_lambda_b["default"].copy_(mine.delta.b)
    x = torch.randn(4, 6)
    got, want = nn.Sequential(*ours)(x), theirs(x)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    for layer, mine in zip(theirs.base_model.model, ours, strict=True):
        torch.testing.assert_close(mine.delta.d.grad, layer.vera_lambda_d["default"].grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.delta.b.grad, layer.vera_lambda_b["default"].grad, rtol=1e-4, atol=1e-5)


def test_projections_do_not_depend_on_the_order_of_the_layers() -> None:
    first = ours_of(three_layers(), rank=5)[0].common
    second = ours_of(nn.Sequential(*reversed(list(three_layers()))), rank=5)[0].common
    assert torch.equal(first.A, second.A)
    assert torch.equal(first.B, second.B)


def test_projections_are_saved_once_or_not_at_all_and_trained_never() -> None:
    for saved in (True, False):
        layers = ours_of(three_layers(), rank=5, save_projection=saved)
        assert set(layers[0].common.state_dict()) == ({"A", "B"} if saved else set())
        assert not list(layers[0].common.parameters())
        assert all(set(layer.delta.state_dict()) == {"d", "b"} for layer in layers)


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "embedding"])
def test_parameter_count_is_rank_and_one_for_each_output(kind: str) -> None:
    model, _ = adapted(kind, rank=5)
    assert VeRA.parameter_count(model.view.shape, model.delta.o) == 5 + model.view.shape[0]
    assert sum(p.numel() for p in model.delta.parameters()) == 5 + model.view.shape[0]


def test_backward_keeps_a_few_numbers_a_token_and_nothing_of_the_layers_width() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, x = adapted("linear", dtype, rank=1)  # folded, at most a sixteenth of 20
        skip = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.common.buffers()]}
        held: dict[int, int] = {}

        def pack(t: Tensor, held: dict[int, int] = held, skip: set[int] = skip) -> Tensor:
            if t.untyped_storage().data_ptr() not in skip:
                held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x.requires_grad_())
        assert y.dtype == dtype
        assert sum(held.values()) == 4 * (3 * 5 + 20)  # x A^T and b B


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    model, x = adapted("conv", torch.float32, rank=3)
    again, _ = adapted("conv", torch.float32, rank=3)
    again.delta.randomize()
    again.delta.load_state_dict(model.delta.state_dict())
    assert torch.equal(again(x), model(x))


def test_importance_is_the_norm_of_each_ranks_part() -> None:
    model, _ = adapted("linear", rank=3)
    b, a = model.delta.factors()
    parts = model.delta.importance()
    for k in range(3):
        assert float(parts[k]) == pytest.approx(float((b[:, [k]] @ a[[k]]).detach().norm()), rel=1e-9)


def test_dropout_acts_in_training_only() -> None:
    model, x = adapted("linear", rank=3, dropout=0.5)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_compiled_layer_gives_the_same() -> None:
    model, x = adapted("linear", torch.float32, rank=3)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize("options", [{"rank": 0}, {"d_initial": 0}, {"dropout": 1.0}, {"save_projection": 1.5}])
def test_bad_options_are_refused_by_name(options: dict[str, object]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        OneLayer(nn.Linear(12, 20), "vera", **options)
