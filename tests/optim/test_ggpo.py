"""LoRA-GGPO and LoRA-MGPO against their formulas, and that nothing is left behind of a perturbation."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from factor_models import HOSTS, Net, adapted, batch, loss_of, train, values
from torch import Tensor, nn
from torch.func import functional_call

import fallow
from fallow.core.errors import ConfigError
from fallow.optim.ggpo import EVERYTHING, GGPO
from fallow.optim.pairs import find_pairs
from fallow.optim.perturbed import noise

MODES = ({"mode": "ggpo", "sigma": 0.2}, {"mode": "mgpo", "rho": 0.3}, {"mode": "mgpo", "rho": 0.3, "space": "weight"})


def optimizer_of(model: nn.Module, lr: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=lr, weight_decay=0.0)


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters() if not param.requires_grad}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


# -- nothing is left behind -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"sigma": 0.0}, {"mode": "mgpo", "rho": 0.0}])
def test_without_a_radius_training_is_loras_bit_for_bit(options):
    plain, model = adapted("PEFT"), adapted("PEFT")
    optimizers = [optimizer_of(plain), optimizer_of(model)]
    GGPO(model, optimizers[1], **options)
    train(plain, optimizers[0], 4)
    train(model, optimizers[1], 4)
    assert equal(values(plain), values(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("options", MODES, ids=["ggpo", "mgpo", "mgpo in weights"])
def test_frozen_weights_are_the_same_after_a_hundred_steps(options, host, dtype):
    model = adapted(host).to(dtype)
    before = frozen(model)
    optimizer = optimizer_of(model)
    GGPO(model, optimizer, **options)
    train(model, optimizer, 100 if host == "fallow" else 5)
    assert equal(before, frozen(model))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("options", MODES, ids=["ggpo", "mgpo", "mgpo in weights"])
def test_training_feels_it_and_evaluation_never_does(options, host):
    model = adapted(host)
    optimizer = optimizer_of(model)
    GGPO(model, optimizer, **options)
    train(model, optimizer, 2)
    twin = adapted(host)
    twin.load_state_dict(model.state_dict())
    x, _ = batch(7)
    assert not torch.allclose(model(x), twin(x), atol=1e-4)
    torch.testing.assert_close(model.eval()(x), twin.eval()(x), rtol=0, atol=1e-6 if host == "fallow" else 0)
    assert not torch.allclose(model.train()(x), twin.train()(x), atol=1e-4)


@pytest.mark.parametrize("host", HOSTS)
def test_adapters_that_are_switched_off_have_no_noise_either(host):
    model = adapted(host)
    GGPO(model, optimizer_of(model), sigma=0.5)
    x, _ = batch()
    off = fallow.disabled(model) if host == "fallow" else model.disable_adapter()
    with off:
        assert torch.equal(model.train()(x), model.eval()(x))
    assert not torch.equal(model.train()(x), model.eval()(x))


def test_release_and_a_zero_rate_leave_the_values_as_they_were():
    for options in MODES:
        model = adapted("fallow")
        optimizer = optimizer_of(model, lr=0.0)
        ggpo = GGPO(model, optimizer, **options)
        before = values(model)
        train(model, optimizer, 4)
        assert equal(before, values(model))
        loss_of(model).backward()
        ggpo.release()
        assert equal(before, values(model))
        x, _ = batch()
        assert torch.equal(model(x), adapted("fallow")(x))


def test_a_state_dict_within_a_step_holds_the_values_themselves():
    model = adapted("fallow")
    optimizer = optimizer_of(model)
    GGPO(model, optimizer, mode="mgpo", rho=0.5)
    train(model, optimizer, 2)
    before = values(model)
    loss_of(model).backward()
    assert not equal(before, values(model))  # perturbed
    assert equal(before, dict(model.state_dict()))
    assert equal(before, values(model))


# -- the noise of ggpo ------------------------------------------------------------------------------------------------


def dense(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """W' (out, in) of a layer and its G = s (dB A + B dA)."""
    pair = next(p for p in find_pairs(model, "test") if p.name.split(".")[-1] == name)
    a, b = pair.a.detach().flatten(1), pair.b.detach().flatten(1)
    s = pair.scale()
    weight = pair.view.read(pair.read().detach()) + s * b @ a
    if pair.a.grad is None:
        return weight, torch.zeros_like(weight)
    return weight, s * (pair.b.grad.flatten(1) @ a + b @ pair.a.grad.flatten(1))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", ["embed", "conv", "first"])
def test_deviations_are_those_of_the_formula(host, name):
    model = adapted(host)
    optimizer = optimizer_of(model, lr=0.0)  # so that W' is still that of the gradient
    ggpo = GGPO(model, optimizer, sigma=0.1, beta=3.0)
    layer = next(layer for layer in ggpo.layers if layer.name.split(".")[-1] == name)
    for step in range(2):
        weight, g = dense(model, name)
        expected = 0.1 / math.sqrt(weight.shape[1]) * (weight.square().sum(1) + 3.0 * g.square().sum(1)).sqrt()
        torch.testing.assert_close(ggpo.noise.deviations(layer, ggpo.steps), expected, rtol=1e-4, atol=1e-6)
        assert (g.norm() > 0) == (step > 0)
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def test_the_noise_has_the_deviation_of_its_row():
    std = torch.tensor([0.0, 0.1, 2.0])
    draws = torch.stack([noise(std, 7, seed, torch.float32) for seed in range(2000)])
    torch.testing.assert_close(draws.std(0).mean(1), std, rtol=0.03, atol=0)
    assert draws.mean().abs() < 0.02
    assert torch.equal(draws[5], noise(std, 7, 5, torch.float32))


def test_flat_lora_is_the_case_without_gradients_whose_sigma_rises():
    model = adapted("fallow")
    optimizer = optimizer_of(model)
    ggpo = GGPO(model, optimizer, sigma=0.05, beta=0.0, ramp="cosine", total_steps=10)
    layer = next(layer for layer in ggpo.layers if layer.name == "first")
    seen = []
    for step in range(11):
        weight, _ = dense(model, "first")
        expected = 0.05 * 0.5 * (1 - math.cos(math.pi * step / 10)) / math.sqrt(6) * weight.norm(dim=1)
        torch.testing.assert_close(ggpo.noise.deviations(layer, ggpo.steps), expected, rtol=1e-4, atol=1e-7)
        seen.append(ggpo.noise.sigma_at(ggpo.steps))
        train(model, optimizer, 1)
    assert seen[0] == 0
    assert seen[10] == pytest.approx(0.05)


def test_the_other_combination_is_kohyas():
    model = adapted("fallow")
    optimizer = optimizer_of(model, lr=0.0)
    ggpo = GGPO(model, optimizer, sigma=0.1, beta=3.0, combine="kohya")
    train(model, optimizer, [0])
    layer = next(layer for layer in ggpo.layers if layer.name == "conv")
    weight, g = dense(model, "conv")
    expected = (0.1 * weight.norm(dim=1) + 3.0 * g.square().sum(1)) / math.sqrt(6)
    torch.testing.assert_close(ggpo.noise.deviations(layer, ggpo.steps), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("host", HOSTS)
def test_gradients_are_those_at_the_perturbed_point_for_layers_below_too(host):
    model = adapted(host).double()
    ggpo = GGPO(model, optimizer_of(model), sigma=0.5, seed=3)
    bias = next(param for name, param in model.named_parameters() if "conv" in name and name.endswith("bias"))
    bias.requires_grad_(True)
    loss_of(model).backward()
    base = {}
    plain = Net().double()
    for pair in ggpo.pairs:
        name = pair.name.split(".")[-1]
        layer = next(layer for layer in ggpo.layers if layer.name == pair.name)
        drawn = noise(layer.drawn, pair.view.shape[1], 3_000_009 * 10_007 + layer.index, torch.float64)
        weight = pair.view.read(pair.read().detach())
        change = pair.scale() * pair.b.detach().flatten(1) @ pair.a.detach().flatten(1)
        base[f"{name}.weight"] = pair.view.write(weight + drawn + change, pair.read()).clone().requires_grad_()
    for name, param in model.named_parameters():
        parts = name.split(".")
        if (parts[-1] == "bias" or "head" in parts) and "lora_A" not in parts and "lora_B" not in parts:
            key = next(at for at in ("conv", "first", "second", "head") if at in parts)
            base[f"{key}.{parts[-1]}"] = param.detach().clone().requires_grad_()
    x, y = batch()
    nn.functional.cross_entropy(functional_call(plain, base, (x,)), y).backward()
    torch.testing.assert_close(bias.grad, base["conv.bias"].grad, rtol=1e-9, atol=1e-12)
    for pair in ggpo.pairs:
        g = pair.view.read(base[f"{pair.name.split('.')[-1]}.weight"].grad)
        a, b = pair.a.detach().flatten(1), pair.b.detach().flatten(1)
        torch.testing.assert_close(pair.b.grad.flatten(1), pair.scale() * g @ a.T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(pair.a.grad.flatten(1), pair.scale() * b.T @ g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_forwards_and_micro_batches_share_the_noise_and_torchs_generator_is_left_alone(reentrant):
    from torch.utils.checkpoint import checkpoint

    model = adapted("fallow")
    optimizer = optimizer_of(model)
    GGPO(model, optimizer, sigma=0.5)
    before = torch.get_rng_state()
    x, y = batch()
    zero = torch.zeros((), requires_grad=True)  # reentrant checkpointing wants an input that requires a gradient
    grads = []
    for again in (False, True):
        model.zero_grad()
        run = (lambda z: checkpoint(lambda z: model(x) + z, z, use_reentrant=reentrant)) if again else model(x).add
        nn.functional.cross_entropy(run(zero), y).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name])
    assert torch.equal(model(x), model(x))
    assert torch.equal(torch.get_rng_state(), before)
    optimizer.step()
    first = model(x)
    train(model, optimizer, 1)
    assert not torch.equal(first, model(x))


def test_rows_with_larger_gradients_get_more_noise():
    model = adapted("fallow")
    optimizer = optimizer_of(model, lr=0.0)
    plain = GGPO(model, optimizer, sigma=0.1, beta=0.0)
    train(model, optimizer, [0])
    layer = next(layer for layer in plain.layers if layer.name == "first")
    _, g = dense(model, "first")
    without = plain.noise.deviations(layer, 1)
    guided = plain
    guided.noise.beta = 100.0
    gain = guided.noise.deviations(layer, 1).square() - without.square()
    assert torch.corrcoef(torch.stack([gain, g.square().sum(1)]))[0, 1] > 0.999


def test_norms_are_those_before_clipping_and_of_the_whole_accumulation():
    model = adapted("fallow")
    optimizer = optimizer_of(model, lr=0.0)
    ggpo = GGPO(model, optimizer, sigma=0.0)
    for micro in range(3):
        loss_of(model, micro).backward()
    expected = dense(model, "first")[1].square().sum(1)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    torch.testing.assert_close(ggpo.noise.rows["first"], expected, rtol=1e-4, atol=1e-8)


def test_the_scale_of_a_scaler_is_divided_out():
    model = adapted("fallow")
    optimizer = optimizer_of(model, lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ggpo = GGPO(model, optimizer, sigma=0.0, scaler=scaler)
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)
    scaler.update()
    expected = dense(model, "first")[1].square().sum(1)
    torch.testing.assert_close(ggpo.noise.rows["first"], expected, rtol=1e-4, atol=1e-8)


# -- the step of mgpo -------------------------------------------------------------------------------------------------


def factors(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for pair in find_pairs(model, "test") for p in (pair.a, pair.b)])


def momenta(model: nn.Module, optimizer: torch.optim.Optimizer, key: str = "exp_avg") -> Tensor:
    pairs = find_pairs(model, "test")
    return torch.cat([optimizer.state[p][key].flatten() for pair in pairs for p in (pair.a, pair.b)])


def gradient_norm(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for pair in find_pairs(model, "test") for p in (pair.a, pair.b)]).norm()


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_perturbation_is_rho_over_the_mean_norm_long_and_along_the_momentum(sign):
    model = adapted("fallow")
    optimizer = optimizer_of(model)
    GGPO(model, optimizer, mode="mgpo", rho=0.05, beta=0.8, sign=sign)
    mean = None
    for step in range(5):
        optimizer.zero_grad()
        before = factors(model)
        loss_of(model, step).backward()
        moved = factors(model) - before
        if step == 0:
            assert (moved == 0).all()
        else:
            m = momenta(model, optimizer)
            torch.testing.assert_close(moved.norm(), 0.05 / mean, rtol=1e-3, atol=0)
            assert torch.cosine_similarity(moved, m, dim=0).item() == pytest.approx(sign, abs=1e-4)
        norm = gradient_norm(model)
        mean = norm if mean is None else 0.8 * mean + 0.2 * norm
        optimizer.step()


def test_the_step_is_from_the_unperturbed_values_with_the_gradient_of_the_perturbed_ones():
    model = adapted("fallow")
    optimizer = optimizer_of(model)
    GGPO(model, optimizer, mode="mgpo", rho=0.1)
    twin = adapted("fallow")
    reference, mean = optimizer_of(twin), None
    params = [p for pair in find_pairs(twin, "test") for p in (pair.a, pair.b)]
    for step in range(4):
        kept = [param.data.clone() for param in params]
        if mean is not None:
            m = [reference.state[param]["exp_avg"] for param in params]
            radius = -0.1 / torch.cat([part.flatten() for part in m]).norm() / mean
            for param, part in zip(params, m, strict=True):
                param.data = param.data + radius * part
        reference.zero_grad()
        loss_of(twin, step).backward()
        norm = gradient_norm(twin)
        mean = norm if mean is None else 0.9 * mean + 0.1 * norm
        for param, value in zip(params, kept, strict=True):
            param.data = value
        reference.step()
        train(model, optimizer, range(step, step + 1))
        torch.testing.assert_close(factors(model), factors(twin), rtol=1e-4, atol=1e-6)


def test_the_length_is_capped_in_units_of_the_first_norm():
    model = adapted("fallow")
    optimizer = optimizer_of(model)
    ggpo = GGPO(model, optimizer, mode="mgpo", rho=0.05, cap=4.0)
    train(model, optimizer, 1)
    ggpo.ahead.norms[EVERYTHING] = ggpo.ahead.first[EVERYTHING] / 100
    before = factors(model)
    loss_of(model, 1)
    torch.testing.assert_close(
        (factors(model) - before).norm(), 4 * 0.05 / ggpo.ahead.first[EVERYTHING], rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("host", ["fallow", "PEFT"])
def test_in_weights_each_layer_moves_along_what_its_momenta_do_to_it(host):
    model = adapted(host)
    optimizer = optimizer_of(model)
    ggpo = GGPO(model, optimizer, mode="mgpo", rho=0.2, space="weight", sign=1)
    train(model, optimizer, [0])
    x, _ = batch()
    model(x)
    assert len(ggpo.layers) == 4
    for layer in ggpo.layers:
        pair = layer.pairs[0]
        a, b = pair.a.detach().flatten(1), pair.b.detach().flatten(1)
        m_a, m_b = (optimizer.state[param]["exp_avg"].flatten(1) for param in (pair.a, pair.b))
        d = pair.scale() * (m_b @ a + b @ m_a)
        u, v = layer.thin
        torch.testing.assert_close(u @ v, 0.2 * d / d.norm() / ggpo.ahead.norms[layer.name], rtol=1e-3, atol=1e-6)


def test_closures_see_the_perturbed_point_and_the_step_does_not():
    model, twin = adapted("fallow"), adapted("fallow")
    optimizers = [optimizer_of(each) for each in (model, twin)]
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        GGPO(each, optimizer, mode="mgpo", rho=0.3)
    for step in range(3):

        def closure(step: int = step) -> Tensor:
            optimizers[0].zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        optimizers[0].step(closure)
        train(twin, optimizers[1], range(step, step + 1))
    assert equal(values(model), values(twin))


def test_sgd_has_a_momentum_too_and_its_lack_is_told():
    model = adapted("fallow")
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.8)
    GGPO(model, optimizer, mode="mgpo", rho=0.05)
    train(model, optimizer, 1)
    before = factors(model)
    loss_of(model, 1)
    moved = factors(model) - before
    assert torch.cosine_similarity(moved, momenta(model, optimizer, "momentum_buffer"), dim=0) < -0.999
    for space in ("param", "weight"):
        bare = adapted("fallow")
        plain = torch.optim.SGD([param for param in bare.parameters() if param.requires_grad], lr=0.1)
        GGPO(bare, plain, mode="mgpo", space=space)
        with pytest.raises(ConfigError, match="needs the momentum of each factor, and SGD keeps none"):
            train(bare, plain, 2)


# -- resuming, refusing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", MODES, ids=["ggpo", "mgpo", "mgpo in weights"])
def test_a_resumed_run_goes_on_bit_for_bit(options):
    model = adapted("fallow")
    optimizer = optimizer_of(model)
    GGPO(model, optimizer, **options)
    train(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(4, 7))
    file.seek(0)
    held = torch.load(file, weights_only=True)
    again = adapted("fallow", seed=3)
    other = optimizer_of(again)
    GGPO(again, other, **options)
    again.load_state_dict(held["model"])
    other.load_state_dict(held["optimizer"])
    train(again, other, range(4, 7))
    assert equal(values(model), values(again))


def test_the_trainer_binds_it(tmp_path):
    from transformers import Trainer, TrainingArguments

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = adapted("fallow")

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = Wrapped()
    ggpo = GGPO(model, sigma=0.1)
    x, y = batch(size=32)
    data = [{"x": one, "labels": label} for one, label in zip(x, y, strict=True)]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data, callbacks=[fallow.Callback(ggpo)]).train()
    assert ggpo.steps == 3
    assert all((rows > 0).any() for rows in ggpo.noise.rows.values())


def test_a_copy_of_the_model_is_perturbed_by_itself_alone():
    model = adapted("fallow")
    GGPO(model, optimizer_of(model), sigma=0.5)
    x, _ = batch()
    twin = copy.deepcopy(model.eval())
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "sam"}, "mode='sam' must be one of 'ggpo', 'mgpo'"),
        ({"sigma": -0.1}, "sigma=-0.1"),
        ({"rho": float("nan")}, "rho=nan"),
        ({"mode": "mgpo", "beta": 1.5}, "beta=1.5"),
        ({"ramp": "cosine"}, "total_steps=None must be a whole number"),
        ({"ramp": "linear"}, "ramp='linear'"),
        ({"sign": 0}, "sign=0 must be one of -1, 1"),
        ({"cap": 0.5}, "cap=0.5"),
        ({"combine": "sum"}, "combine='sum'"),
        ({"space": "row"}, "space='row'"),
    ],
)
def test_impossible_settings_are_refused_when_it_is_made(options, said):
    with pytest.raises(ConfigError, match=said):
        GGPO(adapted("fallow"), **options)


def test_weights_that_their_module_reads_are_refused_by_name():
    model = fallow.attach(nn.MultiheadAttention(8, 2), "lora", ["in_proj_weight"], rank=2)
    with pytest.raises(ConfigError, match=r"cannot perturb 'in_proj_weight'"):
        GGPO(model)
    GGPO(model, mode="mgpo")
