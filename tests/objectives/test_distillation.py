"""Feature distillation: its value, what it keeps, and that the teacher stays as it is."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fallow
from fallow.core.errors import ConfigError
from fallow.objectives.distillation import FeatureDistillation, blocks_of, mean_square


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.drop = nn.Linear(width, width), nn.Dropout(0.3)

    def forward(self, x):
        return x + self.drop(torch.tanh(self.first(x)))


class Tower(nn.Module):
    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.body = nn.ModuleList([Block(width) for _ in range(depth)])
        self.norm, self.head, self.checkpointing = nn.BatchNorm1d(width), nn.Linear(width, 4), False

    def forward(self, x):
        for block in self.body:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.head(self.norm(x))


def adapted(drop=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    model = Tower().to(dtype)
    original = copy.deepcopy(model)
    fallow.attach(model, "lora", ["first"], rank=2)
    for module in model.modules():
        if isinstance(module, fallow.Delta):
            module.randomize()
        if isinstance(module, nn.Dropout):
            module.p = drop
    return model, original


def features(model, x):
    seen = []
    for block in model.body:
        x = block(x)
        seen.append(x)
    return seen


def test_values_and_gradients_equal_the_plain_sum_with_both_kinds_of_teacher():
    model, original = adapted()
    model.norm.eval()
    x = torch.randn(5, 8, dtype=torch.float64)
    with torch.no_grad():
        before, logits = features(original.eval(), x), original(x)
    for teacher in (None, original):
        objective = FeatureDistillation(0.6, 0.3, teacher=teacher)
        objective.enter(model)
        outputs = model(x)
        got = objective(model, x, outputs)
        wanted = 0.6 / 3 * sum(F.mse_loss(a, b) for a, b in zip(features(model, x), before, strict=True))
        wanted = wanted + 0.3 * F.mse_loss(outputs, logits)
        torch.testing.assert_close(got, wanted)
        params = [param for param in model.parameters() if param.requires_grad]
        grads = [torch.autograd.grad(term, params, retain_graph=True) for term in (got, wanted)]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)
        objective.leave()
        assert not model.body[0]._forward_hooks


def test_the_same_network_costs_nothing_and_the_teacher_changes_in_nothing():
    model, original = adapted()
    for delta in model.modules():
        if isinstance(delta, fallow.Delta):
            nn.init.zeros_(delta.B)
    objective = FeatureDistillation(teacher=original)
    objective.enter(model)
    state = copy.deepcopy(original.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for step in range(10):
        x = torch.randn(6, 8, dtype=torch.float64)
        outputs = model(x)
        term = objective(model, x, outputs)
        if step == 0:
            assert term == 0
        optimizer.zero_grad()
        (outputs.square().mean() + term).backward()
        optimizer.step()
    assert term > 0
    assert all(torch.equal(value, state[name]) for name, value in original.state_dict().items())
    assert all(param.grad is None for param in original.parameters())
    assert original.training


def test_its_own_teacher_has_no_dropout_and_leaves_the_norms_statistics():
    model, original = adapted(drop=0.5)
    for delta in model.modules():
        if isinstance(delta, fallow.Delta):
            nn.init.zeros_(delta.B)
    x = torch.randn(5, 8, dtype=torch.float64)
    objective = FeatureDistillation(1.0, 1.0)
    objective.enter(model)
    torch.manual_seed(3)
    outputs = model(x)
    statistics = model.norm.running_mean.clone()
    value = objective(model, x, outputs)
    assert torch.equal(model.norm.running_mean, statistics)
    assert value > 0.01  # the tuned one has dropout
    torch.manual_seed(3)
    tuned = features(model, x)
    with torch.no_grad():
        before = features(original.eval(), x)
        logits = original.head((before[-1] - statistics) / (model.norm.running_var + 1e-5).sqrt())
    wanted = sum(F.mse_loss(a, b) for a, b in zip(tuned, before, strict=True)) / 3 + F.mse_loss(outputs, logits)
    torch.testing.assert_close(value, wanted)


def test_checkpointed_blocks_give_the_same_gradients_and_nothing_is_left_behind():
    def gradient(checkpointing):
        model, _ = adapted()
        model.checkpointing = checkpointing
        objective = FeatureDistillation()
        objective.enter(model)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        outputs = model(x)
        (outputs.mean() + objective(model, x, outputs)).backward()
        assert not objective.seen
        return [param.grad for param in model.parameters() if param.requires_grad]

    for one, other in zip(gradient(False), gradient(True), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_have_a_finite_mean_of_float32(dtype):
    tuned = (300 * torch.randn(50, 60)).to(dtype).requires_grad_()
    original = (300 * torch.randn(50, 60)).to(dtype)
    value = mean_square(tuned, original)
    assert value > 65504
    torch.testing.assert_close(value, F.mse_loss(tuned.float(), original.float()), rtol=1e-2, atol=0)
    value.backward()
    wanted = 2 * (tuned.detach().float() - original.float()) / tuned.numel()
    assert (tuned.grad.float() - wanted).norm() < 0.02 * wanted.norm()
    one = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: mean_square(f, torch.zeros(4, 5, dtype=torch.float64)), one)


def test_it_holds_the_features_while_the_task_is_learned():
    def distance(weight):
        model, original = adapted(dtype=torch.float32)
        objective = FeatureDistillation(weight)
        objective.enter(model)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
        torch.manual_seed(1)
        x = torch.randn(16, 8)
        for _ in range(60):
            outputs = model(x)
            loss = F.cross_entropy(outputs, torch.arange(16) % 4) + objective(model, x, outputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            pairs = zip(features(model.eval(), x), features(original.eval(), x), strict=True)
            return sum(float(F.mse_loss(a, b)) for a, b in pairs)

    assert distance(10.0) < 0.3 * distance(0.0)


def test_blocks_are_found_by_path_or_as_the_longest_list():
    model, _ = adapted()
    assert blocks_of(model) == blocks_of(model, "body") == list(model.body)
    outer = nn.Sequential(model, nn.Linear(4, 4))
    assert blocks_of(outer, "0.body") == list(model.body)
    with pytest.raises(ConfigError, match="blocks='layers' is no list of blocks of Tower; its lists: body"):
        FeatureDistillation(blocks="layers").enter(model)
    with pytest.raises(ConfigError, match="is no list of blocks of Linear; its lists: none"):
        blocks_of(nn.Linear(2, 2))


def test_what_cannot_be_is_refused():
    model, _ = adapted()
    x = torch.randn(4, 8, dtype=torch.float64)
    objective = FeatureDistillation()
    with pytest.raises(ConfigError, match=r"call objective\.enter"):
        objective(model, x, model(x))
    with pytest.raises(ConfigError, match="the teacher has not 3 blocks"):
        FeatureDistillation(teacher=Tower(depth=2)).enter(model)
    with pytest.raises(ConfigError, match="teacher=function must be a module"):
        FeatureDistillation(teacher=lambda batch: batch)
    with pytest.raises(ConfigError, match="features=-1 must be a finite number"):
        FeatureDistillation(-1)
