"""The update in the backward pass: the same steps, no gradients kept, accumulation, clipping, and what it refuses."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import fallow
from fallow.core.errors import ConfigError
from fallow.optim.lowrank import LowRank

RESIDUALS = ["drop", "fira", "sign", "sgd", "feedback", "apollo"]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 12)).double()


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(8, 20, generator=generator).double(), torch.randn(8, 12, generator=generator).double())
        for _ in range(count)
    ]


def backward(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], share: float = 1.0) -> None:
    ((model(batch[0]) - batch[1]).square().mean() * share).backward()


def made(model: nn.Module, **options) -> LowRank:
    return LowRank(model.parameters(), 1e-2, 4, **{"refresh_every": 3, "weight_decay": 0.1, **options})


def assert_alike(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_it_takes_the_steps_of_the_other_mode_and_keeps_no_gradient(residual, passes):
    one, other = net(), net()
    plain, own = made(one, residual=residual), made(other, residual=residual, mode="in_backward", accumulate=passes)
    for step in range(10):
        for batch in batches(10 * passes)[step * passes : (step + 1) * passes]:
            backward(one, batch, 1 / passes)
            backward(other, batch, 1 / passes)
        assert all(param.grad is None for param in other.parameters())
        plain.step()
        plain.zero_grad()
        own.step()
    assert_alike(one, other)


def test_between_passes_only_projected_gradients_stay_but_in_a_step_that_chooses_a_basis():
    model = net()
    own = made(model, mode="in_backward", accumulate=2, refresh_every=3)
    matrices = [model[0].weight, model[2].weight, model[4].weight]
    seen = []
    for first, second in zip(batches(12)[::2], batches(12)[1::2], strict=True):
        backward(model, first, 0.5)
        seen.append([param.grad is not None for param in matrices])
        backward(model, second, 0.5)
        own.step()
    chooses, between = [True] * 3, [False] * 3
    assert seen == [chooses, between, between, chooses, between, between]


@pytest.mark.parametrize("residual", ["drop", "fira"])
def test_the_gradients_alive_at_once_are_the_largest_layers(residual):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    own = LowRank(model.parameters(), 1e-3, 8, residual=residual, mode="in_backward")
    peak = 0
    for _ in range(2):
        hidden = model(torch.randn(4, 64)).square().mean()

        def watch(param):
            nonlocal peak
            peak = max(peak, sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

        handles = [param.register_post_accumulate_grad_hook(watch) for param in model.parameters()]
        hidden.backward()
        own.step()
        for handle in handles:
            handle.remove()
    assert peak <= 1.3 * model[0].weight.nbytes


@pytest.mark.parametrize("residual", ["drop", "fira"])
def test_the_norm_of_the_step_before_clips(residual):
    one, other = net(), net()
    plain, own = made(one, residual=residual), made(other, residual=residual, mode="in_backward", max_norm=0.05)
    before = None
    for batch in batches(6):
        backward(one, batch)
        norm = nn.utils.get_total_norm([param.grad for param in one.parameters()])
        if before is not None:
            nn.utils.clip_grads_with_norm_(one.parameters(), 0.05, before)
        plain.step()
        plain.zero_grad()
        backward(other, batch)
        own.step()
        before = norm
    assert before > 0.1
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_measuring_pass_clips_by_the_norm_of_this_very_step():
    one, other = net(), net()
    plain, own = made(one), made(other, mode="in_backward", max_norm=0.05)
    for batch in batches(4):
        backward(one, batch)
        nn.utils.clip_grad_norm_(one.parameters(), 0.05)
        plain.step()
        plain.zero_grad()
        with own.measuring():
            backward(other, batch)
        backward(other, batch)
        own.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_resumed_run_clips_by_the_norm_it_had():
    def go(model, optimizer, some):
        for batch in some:
            backward(model, batch)
            optimizer.step()

    model = net()
    own = made(model, mode="in_backward", max_norm=0.05)
    go(model, own, batches(8)[:4])
    saved, values = copy.deepcopy(own.state_dict()), copy.deepcopy(model.state_dict())
    go(model, own, batches(8)[4:])
    other = net()
    other.load_state_dict(values)
    resumed = made(other, mode="in_backward", max_norm=0.05)
    resumed.load_state_dict(saved)
    go(other, resumed, batches(8)[4:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_named_optimizer_takes_it_too_and_a_closed_or_dropped_one_leaves_gradients_alone():
    model = net()
    own = fallow.Fira(model, rank=4, mode="in_backward")
    backward(model, batches(1)[0])
    assert all(param.grad is None for param in model.parameters())
    own.step()
    own.close()
    backward(model, batches(1)[0])
    assert all(param.grad is not None for param in model.parameters())
    model.zero_grad()
    own = fallow.Fira(model, rank=4, mode="in_backward")
    del own
    gc.collect()
    backward(model, batches(1)[0])
    assert all(param.grad is not None for param in model.parameters())


def test_what_it_cannot_do_is_an_error_that_says_what_to_do():
    model = net()
    own = made(model, mode="in_backward")
    backward(model, batches(1)[0])
    with pytest.raises(ConfigError, match="got the gradient of pass 2 before step"):
        backward(model, batches(1)[0])
    model = net()
    own = made(model, mode="in_backward", accumulate=2)
    backward(model, batches(1)[0])
    with pytest.raises(ConfigError, match="after 1 of accumulate=2 backward passes"):
        own.step()
    with pytest.raises(ConfigError, match="measuring"), own.measuring():
        pass
    with pytest.raises(ConfigError, match="measuring"):
        made(net()).measuring()
    for options, said in (
        ({"mode": "backward"}, "mode='backward' does not exist"),
        ({"accumulate": 2}, "are for mode='in_backward'"),
        ({"max_norm": 1.0}, "are for mode='in_backward'"),
        ({"mode": "in_backward", "accumulate": 0}, "accumulate=0"),
        ({"mode": "in_backward", "accumulate": 1.5}, "accumulate=1.5 must be a whole number"),
        ({"mode": "in_backward", "max_norm": 0.0}, "max_norm=0.0"),
    ):
        with pytest.raises(ConfigError, match=said):
            made(net(), **options)


def test_a_loss_scaler_works_in_the_other_mode_and_is_refused_in_this():
    for mode in ("step", "in_backward"):
        model = net().float()
        own = made(model, mode=mode)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        x, y = (one.float() for one in batches(1)[0])
        before = [param.detach().clone() for param in model.parameters()]
        scaler.scale((model(x) - y).square().mean()).backward()
        if mode == "in_backward":
            with pytest.raises(ConfigError, match="before GradScaler could unscale them"):
                scaler.step(own)
            continue
        scaler.step(own)
        scaler.update()
        assert all((param != old).any() for param, old in zip(model.parameters(), before, strict=True))
        before = [param.detach().clone() for param in model.parameters()]
        own.zero_grad()
        scaler.scale((model(x) * float("inf")).mean()).backward()
        scaler.step(own)  # skipped, as gradients are infinite
        assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
