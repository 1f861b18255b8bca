"""Q-GaLore's weights of 8 bits: no float copy, moved in float32, rounded by chance, saved and gone on with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fallow
from fallow.core.errors import ConfigError
from fallow.core.quantized import dense_state, quantize_
from fallow.core.small_floats import uniform
from fallow.core.stored_weight import StoredWeight, of_parameter
from fallow.core.weight_codes import INT8


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 4))


def data(count: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 24, generator=generator)
    return x, x[:, :4].sin() + x[:, 4:8]


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    x, y = data()
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def q_galore(model: nn.Module, **options: Any) -> fallow.QGaLore:
    return fallow.QGaLore(
        model, **{"lr": 1e-2, "rank": 8, "scale": 1.0, "refresh_every": 20, "weights": "int8", **options}
    )


def test_rounding_by_chance_has_the_value_as_its_mean_and_keeps_the_largest() -> None:
    w = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    mean = torch.zeros_like(w)
    for step in range(400):
        parts = INT8.encode(w, uniform(w, step))
        out = torch.empty_like(w)
        INT8.decode(parts, out)
        assert int(parts["codes"].abs().max()) == 127
        assert ((out - w).abs() <= parts["scale"][:, None] * 1.001).all()
        mean += out / 400
    assert ((mean - w).abs() < parts["scale"][:, None] * 0.13).all()  # 5 deviations of the mean of 400


def test_projected_weights_are_int8_alone_and_the_rest_stays() -> None:
    model = net()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = q_galore(model, rank=8)
    kinds = {name: of_parameter(param) for name, param in model.named_parameters()}
    assert [name for name, store in kinds.items() if store is not None] == ["0.weight", "2.weight"]
    assert kinds["0.weight"].nbytes == 24 * 48 + 4 * 48
    for now, then in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(
            torch.as_tensor(now.dense() if isinstance(now, StoredWeight) else now), then, rtol=0, atol=3e-3
        )
    trained(model, optimizer, 2)
    assert all(param.requires_grad for param in model.parameters())
    assert kinds["0.weight"] is of_parameter(model[0].weight)


def test_they_learn_nearly_as_float_weights_do_and_by_nearest_rounding_do_not() -> None:
    plain = trained(model := net(), fallow.QGaLore(model, 1e-3, 8, scale=1.0, refresh_every=20), 200)
    chance = trained(model := net(), q_galore(model, lr=1e-3), 200)
    nearest = trained(model := net(), q_galore(model, lr=1e-3, rounding="nearest"), 200)
    assert plain[0] > 1.2 * plain[-1]
    assert abs(chance[-1] - plain[-1]) < 0.1 * (plain[0] - plain[-1])
    assert nearest[-1] - plain[-1] > 2 * abs(chance[-1] - plain[-1])


@pytest.mark.parametrize("inner", ["adamw", "lion", "sgdm"])
@pytest.mark.parametrize("residual", ["drop", "fira", "sgd"])
def test_one_step_is_that_of_a_float_weight_but_for_the_rounding(inner: str, residual: str) -> None:
    options = {
        "inner": inner,
        "residual": residual,
        "state_dtype": "fp32",
        "basis_dtype": None,
        "lr": 1e-2,
        "weight_decay": 0.1,
    }
    coded, plain = net(), net()
    own = q_galore(coded, **options)
    for name in ("0", "2"):  # the same values to begin with
        plain.get_submodule(name).weight.data.copy_(coded.get_submodule(name).weight.dense())
    other = q_galore(plain, weights=None, **options)
    trained(coded, own, 1)
    trained(plain, other, 1)
    for name in ("0", "2"):
        one, expected = coded.get_submodule(name).weight, plain.get_submodule(name).weight
        scale = of_parameter(one).parts["scale"][:, None]
        assert ((one.dense() - expected).abs() <= scale * 1.01).all()


def test_a_dense_state_goes_on_as_the_codes_do() -> None:
    model = net()
    optimizer = q_galore(model)
    trained(model, optimizer, 7)
    saved, state = dense_state(model), copy.deepcopy(optimizer.state_dict())
    assert all(type(tensor) is Tensor for tensor in saved.values())
    again = net(3)
    other = q_galore(again)
    again.load_state_dict(saved)
    other.load_state_dict(state)
    assert torch.equal(of_parameter(again[0].weight).parts["codes"], of_parameter(model[0].weight).parts["codes"])
    torch.testing.assert_close(trained(again, other, 5), trained(model, optimizer, 5), rtol=1e-4, atol=1e-5)


def test_in_the_backward_pass_they_move_too() -> None:
    model = net()
    losses = trained(model, q_galore(model, lr=3e-3, mode="in_backward"), 30)
    assert losses[-1] < 0.8 * losses[0]
    assert model[0].weight.grad is None


def test_what_cannot_be_trained_as_a_code_is_refused_and_the_model_stays() -> None:
    model = net()
    with pytest.raises(ConfigError, match="give the model itself"):
        q_galore(model.parameters())
    with pytest.raises(ConfigError, match="weights='int4'"):
        q_galore(model, weights="int4")
    with pytest.raises(ConfigError, match="no linear layer or convolution whose weight is projected"):
        q_galore(model, rank=64)
    with pytest.raises(ConfigError, match="rank="):
        q_galore(model, rank=0.0)
    assert not any(isinstance(param, StoredWeight) for param in model.parameters())
    nf4 = net()
    quantize_(nf4, "nf4", min_size=1)
    with pytest.raises(ConfigError, match="kept as nf4"):
        fallow.GaLore([param.requires_grad_() for param in nf4.parameters()], rank=2)
    coded = net()
    quantize_(coded, "int8", min_size=1)
    with pytest.raises(ConfigError, match="kept as int8 and not projected"):
        fallow.GaLore([param.requires_grad_() for param in coded.parameters()], rank=64)
    with pytest.raises(ConfigError, match="compensated"):
        fallow.GaLore([coded[0].weight], rank=4, rounding="compensated")
