"""LoRA-XS against its equation."""

from __future__ import annotations

import pytest
import torch
from one_layer import LAYERS, OneLayer, backward_both, inputs, with_matrix
from torch import Tensor, nn

from fallow.core.errors import ConfigError
from fallow.core.views import view_of
from fallow.deltas.lora_xs import LoRAXS

ALL = sorted(LAYERS)


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    model, x = OneLayer(layer, "lora-xs", **options), inputs(layer)
    model.delta.randomize()
    return model, x


@pytest.mark.parametrize("kind", ALL)
def test_factors_hold_the_best_approximation_of_the_weight_with_its_singular_values_at_the_input(kind: str) -> None:
    model, _ = adapted(kind, rank=3)
    w, delta = model.view.read(model.layer.weight), model.delta
    s = torch.linalg.svdvals(w)
    assert float((w - delta.B @ delta.A).norm()) == pytest.approx(float(s[3:].norm()), rel=1e-9)
    torch.testing.assert_close(delta.B.T @ delta.B, torch.eye(3, dtype=w.dtype))
    torch.testing.assert_close(delta.A @ delta.A.T, torch.diag(s[:3] ** 2))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_layer_is_w_plus_s_b_r_a_in_values_and_gradients(kind: str, alpha: float | None) -> None:
    model, x = adapted(kind, rank=3, alpha=alpha)
    layer, delta = model.layer, model.delta
    r = delta.R.detach().clone().requires_grad_()
    w = view_of(layer).read(layer.weight) + (1.0 if alpha is None else 2.0) * (delta.B @ r @ delta.A)
    want = with_matrix(layer, w, x)
    got = model(x)
    torch.testing.assert_close(model.by_merged(x), got)
    backward_both(got, want)
    torch.testing.assert_close(delta.R.grad, r.grad)


@pytest.mark.parametrize("kind", ALL)
def test_output_is_unchanged_at_the_start_and_the_core_alone_is_trained(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    model, x = OneLayer(layer, "lora-xs", rank=3), inputs(layer)
    assert torch.equal(model(x), layer(x))
    assert [name for name, _ in model.delta.named_parameters()] == ["R"]
    assert LoRAXS.parameter_count(model.view.shape, model.delta.o) == model.delta.R.numel() == 9
    before = model.delta.A.clone(), model.delta.B.clone()
    optimizer = torch.optim.SGD(model.delta.parameters(), 0.1)
    model(x).square().sum().backward()
    assert float(model.delta.R.grad.abs().max()) > 1e-3  # zero is no dead point
    optimizer.step()
    assert torch.equal(before[0], model.delta.A)
    assert torch.equal(before[1], model.delta.B)


def test_a_gradient_step_moves_the_weight_by_the_gradient_between_the_factors() -> None:
    model, x = adapted("linear", rank=3)
    dense = model.layer.weight.detach().clone().requires_grad_()
    model.delta.R.data.zero_()
    torch.nn.functional.linear(x, dense, model.layer.bias).square().sum().backward()
    model(x).square().sum().backward()
    b, a = model.delta.B, model.delta.A
    torch.testing.assert_close(model.delta.R.grad, b.T @ dense.grad @ a.T)


def test_backward_keeps_a_few_numbers_a_token_and_not_the_input() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, x = adapted("linear", dtype, rank=2)
        skip = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        held: dict[int, int] = {}

        def pack(t: Tensor, held: dict[int, int] = held, skip: set[int] = skip) -> Tensor:
            if t.untyped_storage().data_ptr() not in skip:
                held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x.requires_grad_())
        assert y.dtype == dtype
        assert sum(held.values()) == 4 * 3 * 5 * 2


def test_file_holds_the_factors_or_the_core_alone_and_both_go_on_bit_for_bit() -> None:
    for saved, names in ((True, {"R", "A", "B"}), (False, {"R"})):
        model, x = adapted("conv", torch.float32, rank=4, save_factors=saved)
        state = model.delta.state_dict()
        assert set(state) == names
        torch.manual_seed(0)
        again = OneLayer(LAYERS["conv"](), "lora-xs", rank=4, save_factors=saved, fresh=False)
        again.delta.load_state_dict(state)
        assert torch.equal(again(x), model(x))


def test_signs_of_the_vectors_do_not_depend_on_the_decomposition() -> None:
    model, _ = adapted("linear", rank=4)
    flipped = OneLayer(nn.Linear(12, 20).double(), "lora-xs", rank=4)
    flipped.layer.weight.data.copy_(-model.layer.weight)
    flipped = OneLayer(flipped.layer, "lora-xs", rank=4)
    torch.testing.assert_close(flipped.delta.A, model.delta.A)
    torch.testing.assert_close(flipped.delta.B, -model.delta.B)


def test_importance_is_the_share_of_each_direction_in_the_change() -> None:
    model, _ = adapted("linear", rank=3, alpha=6.0)
    torch.testing.assert_close(model.delta.importance().norm(), model.delta.delta_weight().detach().norm())


def test_dropout_acts_in_training_only() -> None:
    model, x = adapted("linear", rank=3, dropout=0.5)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_compiled_layer_gives_the_same() -> None:
    model, x = adapted("linear", torch.float32, rank=3)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 13}, {"alpha": 0}, {"dropout": 1.0}, {"save_factors": "no"}])
def test_bad_options_are_refused_by_name(options: dict[str, object]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        OneLayer(nn.Linear(12, 20), "lora-xs", **options)
