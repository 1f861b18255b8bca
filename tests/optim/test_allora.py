"""ALLoRA against its equations, with the gradient of B A formed."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from factor_models import HOSTS, Net, adapted, batch, loss_of, train, values
from torch import Tensor, nn
from torch.func import functional_call

import fallow
from fallow.core.errors import ConfigError
from fallow.optim.allora import ALLoRA
from fallow.optim.pairs import Pair, find_pairs
from fallow.optim.row_scaling import row_gains

ETA = 2.0


def model_of(host: str, **options) -> nn.Module:
    return adapted(host, rank=3, alpha=3.0, **options).double()


def scaled(model: nn.Module, **options) -> ALLoRA:
    return ALLoRA(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), **options)


def gains(pair: Pair) -> Tensor:
    rows = (pair.b.flatten(1) @ pair.a.flatten(1)).norm(dim=1)
    return 1 / torch.sqrt(rows + 1 / ETA**2)


def dense_gradients(model: nn.Module) -> dict[str, Tensor]:
    """G (out, in) of every pair's product, by the names of the layers."""
    plain, base, changes = Net().double(), {}, {}
    for name, param in model.named_parameters():
        parts = name.split(".")
        key = next(
            (".".join([at, parts[-1]]) for at in ("embed", "conv", "first", "second", "head") if at in parts), ""
        )
        if parts[-1] in ("weight", "bias") and not any(part.startswith("lora") for part in parts):
            base[key] = param.detach()
    for pair in find_pairs(model, "test"):
        name = pair.name.split(".")[-1]
        changes[name] = (pair.b.flatten(1) @ pair.a.flatten(1)).detach().requires_grad_()
        weight = base[f"{name}.weight"]
        base[f"{name}.weight"] = pair.view.write(pair.view.read(weight) + changes[name], weight)
    x, y = batch()
    nn.functional.cross_entropy(functional_call(plain, base, (x,)), y).backward()
    return {name: change.grad for name, change in changes.items()}


@pytest.mark.parametrize("host", HOSTS)
def test_gradients_of_the_factors_are_those_of_the_equations(host):
    model = model_of(host)
    expected = dense_gradients(model)
    scaled(model, eta=ETA)
    loss_of(model).backward()
    pairs = find_pairs(model, "test")
    assert len(pairs) == 4
    for pair in pairs:
        a, b = pair.a.flatten(1), pair.b.flatten(1)
        g = gains(pair).unsqueeze(1) * expected[pair.name.split(".")[-1]]
        torch.testing.assert_close(pair.b.grad.flatten(1), g @ a.T, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pair.a.grad.flatten(1), b.T @ g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("host", HOSTS)
def test_outputs_and_the_gradients_of_everything_else_are_loras(host):
    plain, model = model_of(host), model_of(host)
    scaled(model, eta=ETA)
    x, _ = batch()
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=0 if host == "PEFT" else 1e-14)  # other kernels
    loss_of(plain).backward()
    loss_of(model).backward()
    heads = [next(m for n, m in each.named_modules() if n.endswith("head")) for each in (plain, model)]
    torch.testing.assert_close(heads[0].weight.grad, heads[1].weight.grad, rtol=1e-12, atol=1e-12)
    for one, other in zip(find_pairs(plain, "test"), find_pairs(model, "test"), strict=True):
        c = gains(one).unsqueeze(1)
        torch.testing.assert_close(c * one.b.grad.flatten(1), other.b.grad.flatten(1), rtol=1e-10, atol=1e-12)
        ratio = other.a.grad.flatten(1) / one.a.grad.flatten(1)
        moved = one.a.grad.flatten(1) != 0
        assert ratio[moved].std() > 0.01  # no multiple of LoRA's gradient


@pytest.mark.parametrize("host", HOSTS)
def test_what_flows_to_the_layer_below_is_not_scaled(host):
    found = []
    for scale in (False, True):
        model = model_of(host, targets=["second"])
        if scale:
            scaled(model, eta=ETA)
        first = next(m for n, m in model.named_modules() if n.split(".")[-1] == "first")
        first.weight.requires_grad_(True)
        loss_of(model).backward()
        found.append(first.weight.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


def test_at_a_zero_b_its_gradient_is_eta_times_loras():
    plain, model = model_of("fallow"), model_of("fallow")
    for each in (plain, model):
        for pair in find_pairs(each, "test"):
            pair.b.data.zero_()
    scaled(model, eta=ETA)
    loss_of(plain).backward()
    loss_of(model).backward()
    for one, other in zip(find_pairs(plain, "test"), find_pairs(model, "test"), strict=True):
        torch.testing.assert_close(ETA * one.b.grad, other.b.grad, rtol=1e-10, atol=1e-14)
        assert (other.a.grad == 0).all()


def test_gains_of_large_and_of_tiny_rows():
    a, b = torch.randn(3, 9, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    rows = (b @ a).norm(dim=1)
    torch.testing.assert_close(row_gains(a, b, ETA), 1 / (rows + 0.25).sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(row_gains(a, b, 1e9), rows**-0.5, rtol=1e-9, atol=0)
    torch.testing.assert_close(row_gains(a, 1e8 * b, ETA), (1e8 * rows) ** -0.5, rtol=1e-6, atol=0)
    assert row_gains(a.bfloat16(), b.bfloat16(), ETA).dtype == torch.float32


def test_no_matrix_of_the_size_of_the_weight_is_formed(peak_bytes):
    a, b = torch.randn(4, 4096), torch.randn(4096, 4)
    assert peak_bytes(lambda: row_gains(a, b, ETA)) < 4096 * 64


def test_gains_follow_the_factors_and_have_no_gradient():
    model = model_of("fallow", targets=["first"])
    scaled(model, eta=ETA)
    pair = find_pairs(model, "test")[0]
    for factor in (1.0, 30.0):
        pair.b.data.mul_(factor)
        expected = dense_gradients(model)["first"]
        model.zero_grad()
        loss_of(model).backward()
        wanted = gains(pair).detach().unsqueeze(1) * expected @ pair.a.detach().T
        torch.testing.assert_close(pair.b.grad, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("host", ["fallow", "PEFT"])
def test_the_output_dependent_variant_scales_every_token_by_itself(host):
    model = model_of(host, targets=["second"])
    pair = find_pairs(model, "test")[0]
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen["x"], seen["y"] = args[0].detach(), output
        output.retain_grad()

    pair.layer.register_forward_hook(keep)
    scaled(model, eta=ETA, by="outputs")
    loss_of(model).backward()
    x, d = seen["x"].flatten(0, -2), seen["y"].grad.flatten(0, -2)
    a, b = pair.a.detach(), pair.b.detach()
    d = d / ((x @ a.T @ b.T).abs() + 1 / ETA**2).sqrt()
    torch.testing.assert_close(pair.b.grad, d.T @ (x @ a.T), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(pair.a.grad, (d @ b).T @ x, rtol=1e-10, atol=1e-14)


def test_grouped_convolutions_and_weights_that_their_module_reads():
    torch.manual_seed(0)
    conv = fallow.attach(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), "lora", ["0"], rank=2).double()
    attention = fallow.attach(
        nn.MultiheadAttention(8, 2, batch_first=True), "lora", ["in_proj_weight"], rank=2
    ).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    for model, run in ((conv, lambda m: m(x[:, :4])), (attention, lambda m: m(x, x, x)[0])):
        for param in model.parameters():
            param.data.normal_()
        found = []
        for scale in (False, True):
            each = copy.deepcopy(model)
            if scale:
                scaled(each, eta=ETA)
            run(each).square().sum().backward()
            found.append(find_pairs(each, "test")[0])
        c = gains(found[0]).unsqueeze(1)
        torch.testing.assert_close(c * found[0].b.grad, found[1].b.grad, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(found[0].a.grad, found[1].a.grad)


@pytest.mark.parametrize("host", HOSTS)
def test_checkpointing_copies_and_low_precision_keep_the_scaling(host):
    from torch.utils.checkpoint import checkpoint

    model = model_of(host)
    scaled(model, eta=ETA)
    loss_of(model).backward()
    expected = [pair.b.grad for pair in find_pairs(model, "test")]
    x, y = batch()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        each.zero_grad()
        logits = checkpoint(each, x, use_reentrant=False)
        nn.functional.cross_entropy(logits, y).backward()
        for pair, grad in zip(find_pairs(each, "test"), expected, strict=True):
            torch.testing.assert_close(pair.b.grad, grad, rtol=1e-12, atol=1e-14)
    model.float().zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model).backward()
    for pair, grad in zip(find_pairs(model, "test"), expected, strict=True):
        assert (pair.b.grad.double() - grad).norm() < 0.1 * grad.norm()


def test_release_leaves_plain_lora():
    for host in HOSTS:
        plain, model = model_of(host), model_of(host)
        scaled(model, eta=ETA).release()
        loss_of(plain).backward()
        loss_of(model).backward()
        for one, other in zip(find_pairs(plain, "test"), find_pairs(model, "test"), strict=True):
            assert torch.equal(one.b.grad, other.b.grad)


def test_an_adapter_trained_so_is_a_plain_lora_in_its_file(tmp_path):
    model = model_of("fallow")
    allora = scaled(model, eta=ETA)
    train(model, allora.optimizer, 3)
    x, _ = batch()
    path = fallow.save(model, tmp_path / "adapter.safetensors")
    base = copy.deepcopy(model)
    fallow.detach(base)
    again = fallow.load(base, path)
    torch.testing.assert_close(again(x), model(x), rtol=1e-12, atol=1e-12)
    fallow.merge(again)
    torch.testing.assert_close(again(x), model(x), rtol=1e-10, atol=1e-10)


# -- on the update ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("host", HOSTS)
def test_on_the_update_rows_of_b_move_by_their_gain_and_a_by_the_mean(host, rule):
    plain, model = model_of(host), model_of(host)
    optimizers = [rule([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (plain, model)]
    ALLoRA(model, optimizers[1], eta=ETA, where="update")
    before = values(plain)
    train(plain, optimizers[0], 1)
    train(model, optimizers[1], 1)
    names = {id(param): name for name, param in [*plain.named_parameters(), *model.named_parameters()]}
    for one, other in zip(find_pairs(plain, "test"), find_pairs(model, "test"), strict=True):
        a, b = before[names[id(one.a)]], before[names[id(one.b)]]
        c = 1 / ((b.flatten(1) @ a.flatten(1)).norm(dim=1) + 1 / ETA**2).sqrt()
        rows = c.view(-1, *[1] * (b.dim() - 1))
        torch.testing.assert_close(other.b - b, rows * (one.b - b), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(other.a - a, c.mean() * (one.a - a), rtol=1e-9, atol=1e-12)


def test_under_adam_the_gradient_form_warns_and_the_update_form_does_not():
    model = adapted("fallow", alpha=3.0)
    params = [p for p in model.parameters() if p.requires_grad]
    with pytest.warns(UserWarning, match="next to nothing under AdamW"):
        ALLoRA(model, torch.optim.AdamW(params)).release()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ALLoRA(model, torch.optim.AdamW(params), where="update").release()
        ALLoRA(model, torch.optim.SGD(params, lr=0.1)).release()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eta": 0.0}, "eta=0.0 must be a finite number above 0"),
        ({"where": "forward"}, "where='forward' must be one of 'grad', 'update'"),
        ({"by": "columns"}, "by='columns'"),
        ({"where": "update", "by": "outputs"}, "by='outputs' must be one of 'rows'"),
        ({"by": "outputs"}, "by='outputs' needs what a layer adds"),
    ],
)
def test_impossible_settings_are_refused_when_it_is_made(options, said):
    with pytest.raises(ConfigError, match=said):
        ALLoRA(adapted("fallow", alpha=3.0), **options)


def test_a_scale_and_a_lacking_factor_are_refused():
    with pytest.raises(ConfigError, match="has one of 2; give alpha = rank"):
        ALLoRA(adapted("PEFT", alpha=6.0))
    model = adapted("fallow", alpha=3.0)
    with pytest.raises(ConfigError, match="lacks a factor of"):
        ALLoRA(model, torch.optim.SGD([find_pairs(model, "test")[0].a], lr=0.1))
