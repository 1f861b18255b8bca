"""IncreLoRA: what is scored, who grows and when, what new ranks learn with, and that nothing else changes."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fallow
from fallow.budgets.growing import Growing, chosen, growing
from fallow.budgets.increlora import IncreLoRA
from fallow.core import schedule
from fallow.core.errors import ConfigError

FORMS = ("adalora", "lora", "sora")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.mid, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = self.last(torch.tanh(self.mid(torch.tanh(self.first(x)))))
        return y if labels is None else {"loss": nn.functional.cross_entropy(y, labels), "logits": y}


def data(count: int = 32) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(2)
    x = torch.randn(count, 6, generator=chance)
    return x, (x @ torch.randn(6, 8, generator=chance)).argmax(1)


def grower(method: str = "adalora", target: int = 3, host: str = "own", **options: Any) -> tuple[nn.Module, Growing]:
    given = {"top": 1, "begin": 4, "every": 2, "warmup": 3, **options}
    extra = {"threshold": 0.0} if method == "sora" else {}
    model: Any = Net()
    torch.manual_seed(3)
    if host == "own":
        fallow.attach(model, method, rank=target, budget=IncreLoRA(**given), **extra)
    else:
        peft = pytest.importorskip("peft")
        kind = {"adalora": fallow.AdaLoRAConfig, "lora": fallow.LoRAConfig, "sora": fallow.SoRAConfig}[method]
        config = kind(rank=target, budget=IncreLoRA(**given), target_modules=["first", "mid", "last"], **extra)
        model = peft.get_peft_model(model, config)
    return model, growing(model)


def optimizer_of(model: nn.Module, lr: float = 1e-2, decay: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=decay)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, micro: int = 1, scale: float = 1.0
) -> list[bool]:
    """Whether it grew, of each step."""
    x, y = data()
    grew = []
    for _ in range(steps):
        optimizer.zero_grad()
        for part, labels in zip(x.chunk(micro), y.chunk(micro), strict=True):
            (scale * nn.functional.cross_entropy(model(part), labels) / micro).backward()
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad /= scale
        optimizer.step()
        before = growing(model).finished()
        fallow.step(model)
        grew.append(not before and ranks_of(model) != RANKS.get(id(model)))
        RANKS[id(model)] = ranks_of(model)
    return grew


RANKS: dict[int, list[int]] = {}


def ranks_of(model: nn.Module) -> list[int]:
    return [part.rank for part in growing(model).parts]


# -- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["own", "peft"])
@pytest.mark.parametrize("method", FORMS)
def test_it_starts_as_the_base_at_rank_one(method: str, host: str) -> None:
    x, _ = data()
    base = Net()(x)
    model, grows = grower(method, host=host)
    assert ranks_of(model) == [1, 1, 1]
    change = float((model(x) - base).abs().max())
    assert change <= 1e-6 * float(base.abs().max())
    held = grows.parts[1].delta
    if method != "adalora":
        assert held.A.shape == (1, 12)
        return
    assert held.stage.tolist() == [2, 1, 1, *[0] * 8]  # rank 3 in the end: two at a time, a ceiling of 11
    assert held.gate.tolist() == [0.0, pytest.approx(1e-5), pytest.approx(1e-5), *[0.0] * 8]


def test_the_reserve_learns_without_counting_and_what_is_not_yet_there_stays_bit_for_bit() -> None:
    for reserve in (True, False):
        model, grows = grower(reserve=reserve, begin=100)
        delta = grows.parts[0].delta
        before = {name: param.detach().clone() for name, param in delta.named_parameters()}
        train(model, optimizer_of(model), 4)
        moved = {name: (param.detach() != before[name]) for name, param in delta.named_parameters()}
        assert moved["gate"].tolist() == [True, *[False] * (len(delta.gate) - 1)]
        last = 3 if reserve else 1
        assert moved["A"].any(1).tolist() == [i < last for i in range(len(delta.gate))]
        assert moved["B"].any(0).tolist() == [i < last for i in range(len(delta.gate))]


# -- the score --------------------------------------------------------------------------------------------------------


def dense_scores(model: nn.Module, loss: Any) -> list[float]:
    """Sum |D * G| / sqrt(out in) of each weight, from autograd on dense changes."""
    plain = Net().requires_grad_(False)
    layers = {name: getattr(plain, name) for name in ("first", "mid", "last")}
    changes = {}
    for part, (name, layer) in zip(growing(model).parts, layers.items(), strict=True):
        changes[name] = part.delta.delta_weight().detach().requires_grad_()
        del layer._parameters["weight"]
        layer.weight = getattr(Net(), name).weight.detach() + changes[name]
    grads = torch.autograd.grad(loss(plain), list(changes.values()))
    return [
        float((d * g).abs().sum()) / math.sqrt(d.numel())
        for d, g in zip((c.detach() for c in changes.values()), grads, strict=True)
    ]


def loss_on(x: Tensor, y: Tensor) -> Any:
    return lambda model: nn.functional.cross_entropy(model(x), y)


@pytest.mark.parametrize("method", FORMS)
def test_the_score_is_that_of_dense_changes_and_counts_every_pass(method: str) -> None:
    model, grows = grower(method, begin=100)
    optimizer = optimizer_of(model)
    train(model, optimizer, 5)
    x, y = data()
    parts = [loss_on(*half) for half in zip(x.chunk(2), y.chunk(2), strict=True)]
    for loss in parts:
        (loss(model) / 2).backward()
    got = [float(part.taken()) for part in grows.parts]
    assert got == pytest.approx(
        [(a + b) / 2 for a, b in zip(*[dense_scores(model, p) for p in parts], strict=True)], rel=1e-4
    )
    assert [float(part.taken()) for part in grows.parts] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("method", FORMS)
def test_the_cheap_score_is_what_each_rank_is_worth_to_first_order(method: str) -> None:
    model, grows = grower(method, begin=100, score="gates")
    optimizer = optimizer_of(model)
    train(model, optimizer, 5)
    x, y = data()
    optimizer.zero_grad()
    loss_on(x, y)(model).backward()
    want = []
    for part in grows.parts:
        b, a = (factor.detach() for factor in part.delta.factors())
        g = dense_gradient(model, part, loss_on(x, y))
        want.append(
            sum(abs(float((torch.outer(b[:, k], a[k]) * g).sum())) for k in range(len(a))) / math.sqrt(g.numel())
        )
    optimizer.step()
    assert [float(part.taken()) for part in grows.parts] == pytest.approx(want, rel=5e-3)  # of those in reserve too


def dense_gradient(model: nn.Module, part: Any, loss: Any) -> Tensor:
    plain = Net().requires_grad_(False)
    for other in growing(model).parts:
        layer = getattr(plain, other.name)
        layer.weight.add_(other.delta.delta_weight().detach())
    weight = getattr(plain, part.name).weight.requires_grad_()
    return torch.autograd.grad(loss(plain), weight)[0]


def test_means_are_kept_of_shares_or_of_the_scores_themselves() -> None:
    for absolute in (False, True):
        model, grows = grower(begin=100, absolute=absolute)
        optimizer = optimizer_of(model)
        train(model, optimizer, 2)
        before = [part.score.clone() for part in grows.parts]
        x, y = data()
        optimizer.zero_grad()
        loss_on(x, y)(model).backward()
        value = dense_scores(model, loss_on(x, y))
        value = value if absolute else [v / sum(value) for v in value]
        optimizer.step()
        fallow.step(model)
        for part, old, v in zip(grows.parts, before, value, strict=True):
            mean = 0.85 * float(old[0]) + 0.15 * v
            spread = 0.85 * float(old[1]) + 0.15 * abs(v - mean)
            assert part.score.tolist() == pytest.approx([mean, spread], rel=1e-4)


@pytest.mark.parametrize("score", ["exact", "gates"])
def test_scores_may_be_taken_in_some_steps_alone(score: str) -> None:
    model, grows = grower(begin=100, score=score, score_every=3)
    optimizer = optimizer_of(model)
    changed = []
    for _ in range(7):
        before = torch.stack([part.score.clone() for part in grows.parts])
        train(model, optimizer, 1)
        changed.append(not torch.equal(before, torch.stack([part.score for part in grows.parts])))
    assert changed == [False, False, True, False, False, True, False]


@pytest.mark.parametrize("score", ["exact", "gates"])
def test_a_loss_scale_changes_no_decision_and_a_step_without_numbers_says_nothing(score: str) -> None:
    told = []
    for scale in (1.0, 1024.0):
        model, _ = grower(score=score)
        train(model, optimizer_of(model), 16, scale=scale)
        told.append((ranks_of(model), [part.score.clone() for part in growing(model).parts]))
    assert told[0][0] == told[1][0]
    for a, b in zip(told[0][1], told[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    model, grows = grower(begin=100)
    train(model, optimizer_of(model), 3)
    before = [part.score.clone() for part in grows.parts]
    x, y = data()
    (float("inf") * loss_on(x, y)(model)).backward()
    fallow.step(model)  # the optimizer made no step, as a loss scaler has it
    assert all(torch.equal(part.score, old) for part, old in zip(grows.parts, before, strict=True))


def test_under_a_gradient_scaler_the_same_grows_as_without() -> None:
    told = []
    for scaled in (False, True):
        model, _ = grower(score="exact")
        optimizer = optimizer_of(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4, enabled=scaled)
        x, y = data()
        for _ in range(16):
            optimizer.zero_grad()
            scaler.scale(loss_on(x, y)(model)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
            scaler.step(optimizer)
            scaler.update()
            fallow.step(model)
        told.append((ranks_of(model), [param.detach().clone() for param in model.parameters()]))
    assert told[0][0] == told[1][0]
    for a, b in zip(told[0][1], told[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("score", ["exact", "gates"])
def test_blocks_and_weights_that_modules_read_themselves_grow_each_by_itself(score: str) -> None:
    torch.manual_seed(1)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True), "up": nn.Linear(8, 16)})
    budget = IncreLoRA(top=2, begin=2, every=2, warmup=2, score=score)
    fallow.attach(model, "adalora", rank=2, budget=budget, fused={".*in_proj_weight": 3, "up": 2})
    optimizer = optimizer_of(model)
    x = torch.randn(4, 5, 8)
    for _ in range(12):
        optimizer.zero_grad()
        y, _ = model["attention"](x, x, x, need_weights=False)
        (model["up"](y) - 1).square().mean().backward()
        optimizer.step()
        fallow.step(model)
    names = ["attention.in_proj_weight.0", "attention.in_proj_weight.1", "attention.in_proj_weight.2"]
    assert [part.name for part in growing(model).parts] == [*names, "attention.out_proj", "up.0", "up.1"]
    assert sum(ranks_of(model)) == 12
    assert all(float(part.score[0]) > 0 for part in growing(model).parts)
    assert set(fallow.trim(model)) == {part.name for part in growing(model).parts}


def test_a_base_in_bfloat16_and_autocast_grow_too() -> None:
    for autocast in (False, True):
        model, grows = grower()
        if not autocast:
            for module in model.children():
                for param in module._parameters.values():
                    param.data = param.data.bfloat16()
        optimizer = optimizer_of(model)
        x, y = data()
        for _ in range(16):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = nn.functional.cross_entropy(model(x if autocast else x.bfloat16()).float(), y)
            loss.backward()
            optimizer.step()
            fallow.step(model)
        assert grows.finished()
        assert sum(ranks_of(model)) == 9


# -- growth -----------------------------------------------------------------------------------------------------------


def test_the_best_with_room_get_rank_and_ties_go_to_the_first() -> None:
    assert chosen([1.0, 3.0, 2.0], [5, 5, 5], top=2, step=2, left=9) == {1: 2, 2: 2}
    assert chosen([1.0, 3.0, 2.0], [5, 0, 1], top=2, step=2, left=9) == {2: 1, 0: 2}
    assert chosen([1.0, 1.0, 1.0], [5, 5, 5], top=2, step=2, left=9) == {0: 2, 1: 2}
    assert chosen([1.0, 3.0, 2.0], [5, 5, 5], top=3, step=2, left=3) == {1: 2, 2: 1}


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize(("target", "step", "top"), [(3, None, 1), (4, 2, 2), (2, 3, 3)])
def test_growth_is_due_only_then_and_the_sum_of_ranks_is_hit_exactly(
    method: str, target: int, step: int, top: int
) -> None:
    model, grows = grower(method, target, step=step, top=top)
    optimizer = optimizer_of(model)
    seen = [sum(ranks_of(model))]
    for number in range(1, 31):
        train(model, optimizer, 1)
        seen.append(sum(ranks_of(model)))
        if seen[-1] != seen[-2]:
            assert number > 4
            assert number % 2 == 0
    assert seen == sorted(seen)
    assert seen[-1] == target * 3 == grows.goal
    assert grows.finished()
    trained = sum(part.rank * (sum(part.delta.view.shape) + (method != "lora")) for part in grows.parts)
    if method != "adalora":
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    else:
        assert all((part.delta.stage != 1).all() for part in grows.parts)
        assert all(not part.delta.gate[part.delta.stage == 0].any() for part in grows.parts)


def test_who_grows_is_who_scores_most() -> None:
    model, grows = grower(top=1)
    optimizer = optimizer_of(model)
    train(model, optimizer, 5)
    for part, score in zip(grows.parts, (0.3, 0.1, 0.9), strict=True):
        part.score.copy_(torch.tensor([score, 1e6]))
    before = ranks_of(model)
    train(model, optimizer, 1)
    assert [b - a for a, b in zip(before, ranks_of(model), strict=True)] == [0, 0, 2]


@pytest.mark.parametrize("method", FORMS)
def test_the_model_is_unchanged_by_growth_but_jumps_as_the_official_code_has_it_where_that_is_asked_for(
    method: str,
) -> None:
    x, _ = data()
    for compat in (False, True):
        model, grows = grower(method, compat_scale=compat, reserve=False)
        train(model, optimizer_of(model, 0.1, 0.0), 6)
        change = [part.delta.delta_weight().detach() for part in grows.parts]
        before, said = ranks_of(model), model(x).detach()
        grows._grow()
        after = ranks_of(model)
        assert sum(after) > sum(before)
        for part, old, r, now in zip(grows.parts, change, before, after, strict=True):
            want = old * r / now if compat else old
            torch.testing.assert_close(part.delta.delta_weight().detach(), want, rtol=1e-4, atol=1e-7)
        moved = float((model(x) - said).abs().max())
        assert moved > 1e-3 if compat else moved <= 1e-4


def test_a_promoted_gate_moves_and_its_reserve_is_filled_up() -> None:
    model, grows = grower(top=3, target=4, begin=2, every=4, warmup=2)
    optimizer = optimizer_of(model)
    train(model, optimizer, 4)
    delta = grows.parts[1].delta
    assert delta.stage.tolist()[:6] == [2, 2, 2, 1, 1, 0]
    held = delta.gate.detach().clone()
    train(model, optimizer, 1)
    assert torch.equal(delta.gate[1:], held[1:])  # the first step of a warm-up is none
    train(model, optimizer, 2)
    assert (delta.gate[:3] != held[:3]).all()
    assert torch.equal(delta.gate[3:], held[3:])


def test_new_ranks_warm_up_reach_the_peak_and_end_at_zero_with_the_run() -> None:
    _, grows = grower(warmup=5)
    grows.total, grows.steps = 45, 20
    group = {"lr": 4e-3, "initial_lr": 1e-2, "params": []}
    rates = []
    for age in range(26):
        grows.steps = 20 + age
        rates.append(group["lr"] * grows.pace(age, group, {}))
    assert rates[:6] == pytest.approx([0.0, 2e-3, 4e-3, 6e-3, 8e-3, 1e-2])
    assert rates[15] == pytest.approx(1e-2 * (25 - 15) / (25 - 5))
    assert rates[25] == 0.0
    without = {"lr": 4e-3, "params": []}  # no schedule: up to the group's own rate
    assert [grows.pace(age, without, {}) for age in (0, 1, 5, 20)] == pytest.approx([0.0, 0.2, 1.0, 1.0])


def test_the_orthogonal_penalty_is_of_all_that_learns_and_falls() -> None:
    model, grows = grower(begin=100)
    want = 0.0
    for part in grows.parts:
        there = part.delta.stage > 0
        a, b = part.delta.A[there].detach(), part.delta.B[:, there].detach()
        want += float((a @ a.T - torch.eye(3)).norm() + (b.T @ b - torch.eye(3)).norm())
    assert float(fallow.penalty(model)) == pytest.approx(0.5 / (2 * 3) * want, rel=1e-5)
    optimizer = optimizer_of(model, decay=0.0)
    before = float(fallow.penalty(model))
    train(model, optimizer, 30)
    assert float(fallow.penalty(model)) < 0.8 * before


# -- files, resuming, hosts, loops ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [7, 30])
@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("host", ["own", "peft"])
def test_a_file_saved_after_growth_loads_on_a_fresh_model_and_is_a_plain_lora(
    host: str, method: str, steps: int, tmp_path: Path
) -> None:
    from peft import PeftModel

    model, _ = grower(method, host=host)
    train(model, optimizer_of(model), steps)
    x, _ = data()
    said = model(x).detach()
    if host == "own":
        fallow.save(model, tmp_path / "file")
        again = fallow.load(Net(), tmp_path / "file")
    else:
        model.save_pretrained(tmp_path / "file")
        again = PeftModel.from_pretrained(Net(), tmp_path / "file")
    torch.testing.assert_close(again(x), said, rtol=0, atol=1e-6)
    fallow.to_lora(model, tmp_path / "lora")
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path / "lora")(x), said, rtol=0, atol=1e-5)


@pytest.mark.parametrize("host", ["own", "peft"])
def test_a_run_that_stops_between_two_growths_resumes_bit_for_bit(host: str) -> None:
    model, grows = grower(host=host)
    optimizer = optimizer_of(model)
    train(model, optimizer, 7)
    assert not grows.finished()
    held = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 20)
    again, other = grower(host=host)
    resumed = optimizer_of(again)
    again.load_state_dict(held[0])
    resumed.load_state_dict(held[1])
    schedule.resume(again, 7)
    assert ranks_of(again) != [1, 1, 1]
    train(again, resumed, 20)
    assert ranks_of(again) == ranks_of(model)
    assert other.finished()
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("method", ["lora", "sora"])
def test_what_grows_for_real_resumes_with_what_its_state_tells(method: str) -> None:
    model, grows = grower(method)
    optimizer = optimizer_of(model)
    train(model, optimizer, 7)
    held = copy.deepcopy((model.state_dict(), optimizer.state_dict(), grows.state_dict()))
    train(model, optimizer, 20)
    again, other = grower(method)
    other.load_state_dict(held[2])
    again.load_state_dict(held[0])
    resumed = optimizer_of(again)
    resumed.load_state_dict(held[1])
    schedule.resume(again, 7)
    train(again, resumed, 20)
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_copy_of_a_growing_model_grows_by_itself() -> None:
    model, _ = grower()
    train(model, optimizer_of(model), 7)
    twin = copy.deepcopy(model)
    before = ranks_of(model)
    train(twin, optimizer_of(twin), 20)
    assert growing(twin).finished()
    assert ranks_of(model) == before
    assert not growing(model).finished()


def test_an_adapter_that_is_not_trained_does_not_grow() -> None:
    model, _ = grower()
    train(model, optimizer_of(model), 5)
    before = ranks_of(model)
    fallow.attach(model, "lora", rank=2, name="other")
    x, y = data()
    optimizer = optimizer_of(model)
    for _ in range(6):
        loss_on(x, y)(model).backward()
        optimizer.step()
        fallow.step(model)
    assert ranks_of(model) == before
    fallow.activate(model, "default")
    train(model, optimizer_of(model), 9)
    assert growing(model).finished()


def by_accelerate(method: str) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    model, _ = grower(method, begin=0.2, every=None)
    whole = accelerate.Accelerator(cpu=True)
    optimizer = optimizer_of(model, decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 20))
    run, optimizer, rate = whole.prepare(model, optimizer, rate)
    schedule.resolve(run, 20)
    x, y = data()
    for _ in range(20):
        loss = run(x=x, labels=y)["loss"]
        whole.backward(loss)
        optimizer.step()
        rate.step()
        fallow.step(run)
        optimizer.zero_grad()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return model


def by_trainer(method: str, folder: Path, resume: bool = False, host: str = "own") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    model, _ = grower(method, host=host, begin=0.2, every=None)
    x, y = data()
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    arguments = transformers.TrainingArguments(
        folder, max_steps=20, per_device_train_batch_size=32, save_steps=9, report_to=[], use_cpu=True,
        disable_tqdm=True, lr_scheduler_type="linear", learning_rate=1e-2, weight_decay=0.0, max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[fallow.Callback(model)])
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-9") if resume else None)
    return model


def by_hand(method: str) -> nn.Module:
    model, _ = grower(method, begin=0.2, every=None)
    optimizer = optimizer_of(model, decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 20))
    schedule.resolve(model, 20)
    x, y = data()
    for _ in range(20):
        optimizer.zero_grad()
        model(x, y)["loss"].backward()
        optimizer.step()
        rate.step()
        fallow.step(model)
    return model


@pytest.mark.parametrize("method", ["adalora", "lora"])
def test_a_bare_loop_accelerate_and_the_trainer_do_the_same(method: str, tmp_path: Path) -> None:
    bare = by_hand(method)
    assert growing(bare).finished()
    others = [by_accelerate(method)]
    if method == "adalora":  # fresh rows of LoRA come from torch's generator, of which the Trainer takes numbers too
        others.append(by_trainer(method, tmp_path))
    else:
        assert ranks_of(by_trainer(method, tmp_path)) == ranks_of(bare)
    for other in others:
        assert ranks_of(other) == ranks_of(bare)
        for (name, a), (_, b) in zip(bare.named_parameters(), other.named_parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("host", ["own", "peft"])
def test_the_trainer_resumes_between_two_growths_bit_for_bit(host: str, tmp_path: Path) -> None:
    whole = by_trainer("adalora", tmp_path, host=host)
    again = by_trainer("adalora", tmp_path, resume=True, host=host)
    assert growing(again).finished()
    for (name, a), (_, b) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"first": 0}, "first=0"), ({"step": 0}, "step=0"), ({"top": 0.0}, "top=0.0"), ({"top": 0}, "top=0"),
        ({"begin": 1.5}, "begin=1.5"), ({"begin": 0.7}, "begin=0.7"), ({"every": 0}, "every=0"),
        ({"beta1": 1.5}, "beta1=1.5"), ({"score": "x"}, "score='x'"), ({"warmup": -1}, "warmup=-1"),
        ({"score_every": 0}, "score_every=0"), ({"reserve": "x"}, "reserve='x'"), ({"ceiling": 0}, "ceiling=0"),
        ({"end": 0.0}, "end=0.0"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused_by_name(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        IncreLoRA(**options)


def test_what_cannot_grow_is_refused_and_the_model_is_as_it_was() -> None:
    model = Net()
    before = [name for name, _ in model.named_modules()]
    for method, options, budget, told in (
        ("dora", {"rank": 4}, IncreLoRA(), "'dora' at 'first' cannot"),
        ("lora", {"rank": 2}, IncreLoRA(first=3), "below first=3"),
        ("lora", {"rank": 4}, IncreLoRA(ceiling=3), "ceiling=3"),
        ("adalora", {"rank": 4, "start": "pissa"}, IncreLoRA(), "leave start= out"),
    ):
        with pytest.raises(ConfigError, match=told):
            fallow.attach(model, method, budget=budget, **options)
        assert [name for name, _ in model.named_modules()] == before, method
    with pytest.raises(ConfigError, match="grows; attach it with"):
        growing(model)


def test_a_run_of_unknown_length_or_one_too_short_is_refused() -> None:
    model, _ = grower(begin=0.1, every=None)
    optimizer = optimizer_of(model)
    with pytest.raises(ConfigError, match="length is not known"):
        train(model, optimizer, 1)
    model, _ = grower(target=8, step=1, every=10)
    with pytest.raises(ConfigError, match="raise top= or step="):
        schedule.resolve(model, 50)


def test_dora_grows_by_the_scores_of_its_gradients_without_a_jump() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10))
    x, y = torch.randn(32, 12), torch.randn(32, 10)
    with pytest.raises(ConfigError, match="score='gates'"):
        fallow.attach(model, "dora", rank=3, budget="increlora")
    fallow.attach(model, "dora", rank=3, alpha=6.0, budget=fallow.IncreLoRA(score="gates", top=1))
    schedule.resolve(model, 40)
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], 1e-2)
    for _ in range(40):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        before = model(x).detach()
        fallow.step(model)
        torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=1e-6)
        optimizer.zero_grad()
    deltas = [model[at].adapters["default"] for at in (0, 2)]
    assert sum(delta.A.shape[0] for delta in deltas) == 6
    assert {delta.scaling for delta in deltas} == {2.0}
