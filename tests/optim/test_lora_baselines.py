"""LoRA+ and Riemannian preconditioning, the baselines of the rules that know factor pairs."""

from __future__ import annotations

import io

import pytest
import torch
from factor_models import HOSTS, adapted, loss_of, train, values

from fallow.core.errors import ConfigError
from fallow.optim.lora_plus import LoRAPlus, lora_plus
from fallow.optim.pairs import find_pairs
from fallow.optim.riemannian import Riemannian, preconditioned


@pytest.mark.parametrize("host", HOSTS)
def test_b_has_a_rate_of_its_own_but_in_embeddings(host):
    model = adapted(host)
    optimizer = LoRAPlus(model, lr=1e-3, ratio=8.0)
    rates = {id(param): group["lr"] for group in optimizer.param_groups for param in group["params"]}
    for pair in find_pairs(model, "test"):
        assert rates[id(pair.a)] == 1e-3
        assert rates[id(pair.b)] == pytest.approx(1e-3 if pair.view.kind == "embedding" else 8e-3)
    assert len(rates) == sum(param.requires_grad for param in model.parameters())
    before = values(model)
    names = {id(param): name for name, param in model.named_parameters()}
    loss_of(model).backward()
    optimizer.step()
    for pair in find_pairs(model, "test"):  # the first step of AdamW is the rate
        moved = (pair.b - before[names[id(pair.b)]]).abs().max().item()
        assert moved == pytest.approx(rates[id(pair.b)], rel=1e-2)


def test_groups_are_for_any_optimizer_and_a_ratio_of_one_is_none():
    plain, model = adapted("fallow"), adapted("fallow")
    train(plain, torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1), 3)
    train(model, torch.optim.SGD(lora_plus(model, lr=0.1, ratio=1.0)), 3)
    assert all(torch.equal(value, values(model)[name]) for name, value in values(plain).items())


def test_gradients_are_divided_by_the_gram_matrices():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 7), (2, 9, 3), (2, 3, 7), (2, 9, 3))
    a, b, grad_a, grad_b = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    of_a, of_b = preconditioned(a, b, grad_a, grad_b, 1e-3)
    unit = 1e-3 * torch.eye(3, dtype=torch.float64)
    for i in range(2):
        torch.testing.assert_close(of_a[i], torch.linalg.inv(b[i].T @ b[i] + unit) @ grad_a[i], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(of_b[i], grad_b[i] @ torch.linalg.inv(a[i] @ a[i].T + unit), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("host", HOSTS)
def test_steps_are_those_of_the_plain_rule_on_preconditioned_gradients(host, rule):
    model, twin = adapted(host), adapted(host)
    optimizer = Riemannian(model, lr=1e-2, rule=rule, damping=1e-2)
    plain = torch.optim.AdamW if rule == "adamw" else torch.optim.SGD
    reference = plain([p for p in twin.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        reference.zero_grad()
        loss_of(twin, step).backward()
        for pair in find_pairs(twin, "test"):
            matrices = (pair.a, pair.b, pair.a.grad, pair.b.grad)
            of_a, of_b = preconditioned(*(m.detach().flatten(1)[None] for m in matrices), 1e-2)
            pair.a.grad, pair.b.grad = of_a.view(pair.a.shape), of_b.reshape(pair.b.shape)
        reference.step()
    for name, value in values(model).items():
        torch.testing.assert_close(value, values(twin)[name], rtol=1e-4, atol=1e-6)


def test_a_resumed_run_goes_on_bit_for_bit():
    model = adapted("fallow")
    optimizer = Riemannian(model, lr=1e-2, weight_decay=0.1)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(3, 5))
    file.seek(0)
    held = torch.load(file, weights_only=True)
    again = adapted("fallow", seed=5)
    other = Riemannian(again, lr=1e-2, weight_decay=0.1)
    again.load_state_dict(held["model"])
    other.load_state_dict(held["optimizer"])
    train(again, other, range(3, 5))
    assert all(torch.equal(value, values(again)[name]) for name, value in values(model).items())


def test_impossible_settings_are_refused_when_it_is_made():
    model = adapted("fallow")
    for made, said in (
        (lambda: LoRAPlus(model, ratio=0.0), "ratio=0.0"),
        (lambda: LoRAPlus(model, lr=-1.0), "lr of LoRAPlus=-1.0"),
        (lambda: Riemannian(model, rule="lion"), "rule='lion' must be one of 'adamw', 'sgd'"),
        (lambda: Riemannian(model, damping=0.0), "damping=0.0"),
    ):
        with pytest.raises(ConfigError, match=said):
            made()
