"""The look for gradients and what goes along with Deltas, on both hosts, also in copies of a model."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

import fallow
from fallow.core.delta import Delta
from fallow.core.errors import ConfigError, TrainingError

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))


class Passing(nn.Module):
    """Has a layer that never runs, one whose weight it reads past it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.runs, self.idle, self.passed, self.head = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        passed = getattr(self.passed, "base_layer", self.passed)
        return self.head(nn.functional.linear(self.runs(x), passed._parameters["weight"]))


TARGETS = ["runs", "idle", "passed"]


def of_own(**options: Any) -> nn.Module:
    return fallow.attach(Passing(), "lora", options.pop("targets", TARGETS), rank=2, **options)


def of_peft(**options: Any) -> nn.Module:
    targets = options.pop("targets", TARGETS)
    return get_peft_model(Passing(), fallow.LoRAConfig(rank=2, target_modules=targets, **options))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def deltas(model: nn.Module) -> list[Delta]:
    return [module for module in model.modules() if isinstance(module, Delta)]


@pytest.mark.parametrize("make", [of_own, of_peft])
def test_an_optimizer_refuses_its_first_step_where_adapted_weights_have_no_gradient(make: Callable[..., nn.Module]):
    model = make()
    with pytest.raises(TrainingError, match="3 of 3 adapted weights"):
        fallow.check_gradients(model)
    optimizer = sgd(model)
    optimizer.step()  # nothing to judge by yet
    assert fallow.step(model) == 0
    model(X).sum().backward()
    before = [param.detach().clone() for param in model.parameters()]
    for _ in range(2):  # the error comes as long as the fault is there
        with pytest.raises(TrainingError, match="2 of 3 adapted weights received no gradient: 'idle', 'passed'"):
            optimizer.step()
        with pytest.raises(TrainingError, match=r"read past them: exclude them .* expect_gradients=False"):
            fallow.step(model)
    assert all(torch.equal(param, kept) for param, kept in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("make", [of_own, of_peft])
def test_whoever_does_not_expect_all_gradients_says_so(make: Callable[..., nn.Module]):
    model = make(expect_gradients=False)
    model(X).sum().backward()
    sgd(model).step()
    assert fallow.step(model) == 0
    with pytest.raises(TrainingError, match="2 of 3"):
        fallow.check_gradients(model)
    alone = make(targets=["runs"])
    alone(X).sum().backward()
    sgd(alone).step()
    assert fallow.check_gradients(alone) == 1
    alone.requires_grad_(False)
    with pytest.raises(TrainingError, match="no adapted weight is trained"):
        fallow.check_gradients(alone)
    with pytest.raises(ConfigError, match="has no adapter"):
        fallow.check_gradients(Passing())


@pytest.mark.parametrize("make", [of_own, of_peft])
def test_an_adapter_without_any_gradient_is_refused_beside_a_head_that_is_trained(make: Callable[..., nn.Module]):
    model = make(targets=["idle"])
    head = model.get_submodule("base_model.model.head" if make is of_peft else "head").requires_grad_(True)
    model(X).sum().backward()
    with pytest.raises(TrainingError, match="1 of 1 adapted weights received no gradient: 'idle'"):
        sgd(model).step()
    torch.optim.SGD(head.parameters(), lr=0.1).step()  # which does not train the adapter


def test_each_optimizer_answers_for_what_it_trains_and_each_adapter_for_itself():
    model = of_peft(targets=["runs", "head"])
    model.add_adapter("other", fallow.LoRAConfig(rank=2, target_modules=["runs"]))
    layers = [model.get_submodule(f"base_model.model.{name}") for name in ("runs", "head")]
    model(X).sum().backward()
    layers[1].zero_grad()
    torch.optim.SGD(layers[0].fallow_delta["default"].parameters(), lr=0.1).step()
    model.set_adapter("other")
    model.zero_grad()
    model(X).sum().backward()
    sgd(model).step()  # the first adapter rests now


def test_chosen_entries_are_looked_at_too():
    model = get_peft_model(Passing(), fallow.SaRAConfig(target_modules=["runs", "idle"], fraction=0.5))
    model(X).sum().backward()
    with pytest.raises(TrainingError, match="1 of 2 adapted weights received no gradient: 'idle'"):
        sgd(model).step()


# -- copies -----------------------------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


def injected(config: Any) -> nn.Module:
    return inject_adapter_in_model(config, nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))


HOSTS = {
    "own": lambda method, **o: fallow.attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), method, ["0", "1"], **o),
    "peft": lambda method, **o: get_peft_model(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), CONFIGS[method](target_modules=["0", "1"], **o)
    ),
    "injected": lambda method, **o: injected(CONFIGS[method](target_modules=["0", "1"], **o)),
}
CONFIGS = {"dylora": fallow.DyLoRAConfig, "pego": fallow.PEGOConfig, "lora": fallow.LoRAConfig}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_of_a_model_have_steps_of_their_own(host: str, copied: Callable[[nn.Module], nn.Module]):
    model = HOSTS[host]("dylora", rank=4)
    assert [fallow.step(model) for _ in range(2)] == [1, 1]
    other = copied(model)
    assert [fallow.step(other) for _ in range(3)] == [1, 1, 1]
    assert [int(delta.steps) for delta in deltas(other)] == [5, 5]
    assert [int(delta.steps) for delta in deltas(model)] == [2, 2]
    again = copied(other)
    del other
    assert fallow.step(again) == 1
    assert [int(delta.steps) for delta in deltas(again)] == [6, 6]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_of_a_model_have_the_term_of_the_objective(host: str, copied: Callable[[nn.Module], nn.Module]):
    other = copied(HOSTS[host]("pego", rank=1, group=2))
    for delta in deltas(other):
        delta.randomize()
    optimizer = sgd(other)
    (0.0 * other(X).sum()).backward()
    params = [p for p in other.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(fallow.penalty(other), params, allow_unused=True)
    optimizer.step()
    assert sum(float(grad.abs().sum()) for grad in wanted if grad is not None) > 0
    for param, grad in zip(params, wanted, strict=True):
        torch.testing.assert_close(param.grad, torch.zeros_like(param) if grad is None else grad)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_of_a_model_have_their_gradients_looked_for(host: str, copied: Callable[[nn.Module], nn.Module]):
    other = copied(HOSTS[host]("lora", rank=2))
    other(X).sum().backward()
    next(delta for delta in deltas(other)).zero_grad()
    with pytest.raises(TrainingError, match="1 of 2 adapted weights received no gradient: '0'"):
        sgd(other).step()


def test_copies_with_chosen_entries_select_again_and_have_their_low_rank_term():
    torch.manual_seed(0)
    config = fallow.SaRAConfig(
        target_modules=["0"], fraction=0.5, reselect_at=[2], rank_weight=0.1, rank_min_side=1, rank_min_selected=1
    )
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    found = []
    for each in (model, copy.deepcopy(model), pickled(model)):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            each(X).square().sum().backward()
            optimizer.step()
            fallow.step(each)
        entries = each.base_model.model[0].fallow_delta["default"]
        found.append((entries.values.detach(), entries.live))
    assert 0 < int((~found[0][1]).sum()) < found[0][1].numel()
    for values, live in found[1:]:
        assert torch.equal(values, found[0][0])
        assert torch.equal(live, found[0][1])


def test_nothing_keeps_an_adapter_that_was_taken_off():
    import gc
    import weakref

    model = fallow.attach(nn.Sequential(nn.Linear(8, 8)), "dylora", rank=4)
    refs = [weakref.ref(delta) for delta in deltas(model)]
    fallow.detach(model)
    gc.collect()
    assert [ref() for ref in refs] == [None]
    assert fallow.step(model) == 0
