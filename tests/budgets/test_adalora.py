"""AdaLoRA, form and budget: the schedule, the scores, PEFT's decisions, and what is left in the end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fallow
from fallow.budgets.adalora import AdaLoRARanks
from fallow.budgets.pruning import Pruning, left, pruning
from fallow.core import schedule
from fallow.core.errors import ConfigError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def data() -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(2)
    x = torch.randn(32, 6, generator=chance)
    return x, (x @ torch.randn(6, 8, generator=chance)).argmax(1)


def pruned(**options: Any) -> tuple[nn.Module, Pruning, torch.optim.Optimizer]:
    model = Net()
    torch.manual_seed(3)
    fallow.attach(model, "adalora", rank=4, budget=AdaLoRARanks(**{"begin": 5, "end": 20, **options}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    return model, pruning(model), optimizer


def backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x, y = data()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        backward(model, optimizer)
        optimizer.step()
        fallow.step(model)


def test_the_budget_falls_along_a_cubic_as_in_peft() -> None:
    from peft.tuners.adalora.layer import RankAllocator

    class Held:
        peft_config = type("Config", (), {"tinit": 10, "tfinal": 20, "total_step": 100, "deltaT": 1})
        init_bgt, target_bgt = 24, 16

    for step in range(1, 81):
        assert left(step, 10, 80, 24, 16) == RankAllocator.budget_schedule(Held, step)[0]  # type: ignore[arg-type]
    assert left(81, 10, 80, 24, 16) == 16


def test_the_same_triplets_are_zeroed_as_by_peft() -> None:
    """PEFT's allocator is given our weights and gradients, before each step, and our triplets after it."""
    from peft import AdaLoraConfig, get_peft_model

    model, prunes, optimizer = pruned(every=2)
    config = AdaLoraConfig(
        init_r=6, target_r=4, tinit=5, tfinal=10, deltaT=2, total_step=30, target_modules=["first", "last"]
    )
    theirs: Any = get_peft_model(Net(), config)
    allocator = theirs.base_model.rankallocator
    layers = {name: getattr(theirs.base_model.model, name) for name in ("first", "last")}
    decisions = 0
    for step in range(1, 20):
        backward(model, optimizer)
        before = {n: [p.detach().clone() for p in (d.A, d.gate, d.B)] for n, d in prunes.parts.items()}
        optimizer.step()
        for name, layer in layers.items():
            delta, (a, g, b) = prunes.parts[name], before[name]
            for tensor, value, grad in (
                (layer.lora_A, a, delta.A.grad),
                (layer.lora_E, g[:, None], delta.gate.grad[:, None]),
                (layer.lora_B, b, delta.B.grad),
            ):
                tensor["default"].data.copy_(value)
                tensor["default"].grad = grad.clone()
        allocator.update_ipt(theirs)
        fallow.step(model)
        budget, due = allocator.budget_schedule(step)
        if due and budget < allocator.init_bgt:
            decisions += 1
            pattern = allocator.mask_to_budget(theirs, budget)
            for name, delta in prunes.parts.items():
                (kept,) = (mask for key, mask in pattern.items() if f".{name}." in key)
                assert (delta.gate != 0).tolist() == kept, step
    assert decisions == 7


def test_the_rank_in_the_end_is_the_budget_and_what_is_zero_stays_zero() -> None:
    model, prunes, optimizer = pruned()
    assert (prunes.first, prunes.last) == (12, 8)
    train(model, optimizer, 19)
    assert any(delta.gate.count_nonzero() < 6 for delta in prunes.parts.values())
    assert all((delta.stage == 2).all() for delta in prunes.parts.values())
    train(model, optimizer, 1)
    kept = [delta.stage == 2 for delta in prunes.parts.values()]
    assert sum(int(mask.sum()) for mask in kept) == 8
    assert not prunes.held
    train(model, optimizer, 10)
    for delta, mask in zip(prunes.parts.values(), kept, strict=True):
        assert torch.equal(delta.gate != 0, mask)


def test_a_run_resumes_bit_for_bit_with_the_budgets_state() -> None:
    model, prunes, optimizer = pruned()
    train(model, optimizer, 12)
    held = copy.deepcopy((model.state_dict(), optimizer.state_dict(), prunes.state_dict()))
    train(model, optimizer, 15)
    again, others, resumed = pruned()
    again.load_state_dict(held[0])
    resumed.load_state_dict(held[1])
    others.load_state_dict(held[2])
    schedule.resume(again, 12)
    train(again, resumed, 15)
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"first": 0.5}, "first=0.5"), ({"begin": 9, "end": 3}, "begin=9 must be before end=3"),
        ({"begin": 1.5}, "begin=1.5"), ({"every": 0}, "every=0"), ({"beta2": 2.0}, "beta2=2.0"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused_by_name(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        AdaLoRARanks(**options)


def test_other_forms_and_runs_of_unknown_length_are_refused() -> None:
    model = Net()
    with pytest.raises(ConfigError, match="attach 'adalora'"):
        fallow.attach(model, "lora", rank=4, budget="adalora")
    with pytest.raises(ConfigError, match="is pruned; attach it"):
        pruning(model)
    model, _, optimizer = pruned(begin=0.1, end=0.5)
    with pytest.raises(ConfigError, match="length is not known"):
        train(model, optimizer, 1)
    with pytest.raises(ConfigError, match=r"steps 0 and 0 of 1"):
        schedule.resolve(model, 1)


# -- the form ---------------------------------------------------------------------------------------------------------


def test_a_start_fills_it_and_changes_nothing() -> None:
    x, _ = data()
    said = Net()(x)
    for start in ("pissa", "gaussian", "orthogonal"):
        model = fallow.attach(Net(), "adalora", rank=4, start=start)
        torch.testing.assert_close(model(x), said, rtol=0, atol=1e-5)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        backward(model, optimizer)
        optimizer.step()
        assert float((model(x) - said).abs().max()) > 1e-4, start


def test_resize_keeps_the_most_important_and_growth_changes_nothing() -> None:
    model, x = fallow.attach(Net(), "adalora", rank=4, alpha=6.0), data()[0]
    deltas: list[Any] = [getattr(model, name).adapters["default"] for name in ("first", "last")]
    for delta in deltas:
        delta.randomize()
        delta.gate.data[1] = 0.0
    said = model(x).detach()
    for delta in deltas:
        parts = torch.stack([(1.5 * delta.gate[k] * torch.outer(delta.B[:, k], delta.A[k])).norm() for k in range(4)])
        torch.testing.assert_close(delta.importance(), parts.detach())
        delta.resize(3)
        assert delta.stage.tolist() == [2, 2, 2]
        delta.resize(5)
        assert (delta.o.rank, delta.o.alpha, delta.scaling) == (5, 7.5, 1.5)
    torch.testing.assert_close(model(x), said)


def test_bad_options_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"orthogonal=-1.0"):
        fallow.attach(Net(), "adalora", orthogonal=-1.0)
    model = fallow.attach(Net(), "adalora", rank=4, orthogonal=0.0)
    assert float(fallow.penalty(model)) == 0.0
