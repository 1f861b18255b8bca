"""The engine in every kind of training loop: resume, schedulers, loss scaling, checkpointing, Trainer, other models."""

from __future__ import annotations

import copy
import io
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fallow
from fallow.core.errors import AdapterError, ConfigError, ModelError, SelectionError
from fallow.core.select import Amount, Selection, Target


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 80, generator=generator).to(dtype), torch.randint(0, 10, (8,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, scheduler=None) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        x, y = batch(step, dtype)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [3, 7])  # before and after the re-selection
@pytest.mark.parametrize("method", ["sara", "shira"])
def test_a_resumed_run_is_bit_identical_to_one_that_was_not_interrupted(mlp, dtype, stop, method):
    def make(model: nn.Module) -> tuple[fallow.Selective, torch.optim.lr_scheduler.LRScheduler]:
        if method == "shira":
            optimizer = fallow.SHiRA(model, "wm", density=0.1, lr=1e-2, weight_decay=0.01)
        else:
            optimizer = fallow.SaRA(
                model, fraction=0.1, lr=1e-2, weight_decay=0.01, rank_weight=5e-3, reselect_at=5, seed=3
            )
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)

    whole = mlp(dtype)
    optimizer, scheduler = make(whole)
    train(whole, optimizer, range(12), scheduler)

    first = mlp(dtype)
    optimizer_1, scheduler_1 = make(first)
    train(first, optimizer_1, range(stop), scheduler_1)
    saved = through_a_file({"optimizer": optimizer_1.state_dict(), "scheduler": scheduler_1.state_dict()})

    second = mlp(dtype)
    optimizer_2, scheduler_2 = make(second)
    optimizer_2.load_state_dict(saved["optimizer"])
    scheduler_2.load_state_dict(saved["scheduler"])
    assert same(weights(second), weights(first))
    train(second, optimizer_2, range(stop, 12), scheduler_2)
    assert same(weights(second), weights(whole))
    assert optimizer_2.events == optimizer.events
    assert optimizer_2.live_parameters == optimizer.live_parameters
    with optimizer_2.disabled():
        assert same(weights(second), weights(mlp(dtype)))


def test_a_state_loads_onto_trained_weights_and_onto_another_choice(mlp):
    model = mlp()
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2, reselect_at=2)
    train(model, optimizer, range(4))
    saved = through_a_file(optimizer.state_dict())
    other = mlp()
    other.load_state_dict(model.state_dict())
    # chosen on trained weights, with another amount and other layers
    engine = fallow.SaRA(other, fraction=0.3, lr=1e-5, include="weight")
    engine.load_state_dict(saved)
    assert engine.selected() == {k: v for k, v in optimizer.selected().items() if k in engine.selected()}
    assert engine.param_groups[0]["lr"] == 1e-2
    train(model, optimizer, range(4, 8))
    train(other, engine, range(4, 8))
    assert same(weights(other), weights(model))
    with engine.disabled():
        assert same(weights(other), weights(mlp()))


def test_a_state_holds_plain_tensors_and_numbers_and_foreign_states_are_refused(mlp):
    model = mlp()
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2)
    with pytest.raises(AdapterError, match="no state of a selective optimizer"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    saved = optimizer.state_dict()
    small = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(AdapterError, match=r"trains '0.weight' \[96, 80\], which this model lacks"):
        fallow.SaRA(small, fraction=0.1, lr=1e-2).load_state_dict(saved)

    with pytest.raises(AdapterError, match="in the form 'value', this optimizer in 'delta'"):
        fallow.SHiRA(mlp(), "wm", density=0.1).load_state_dict(saved)


def test_states_of_another_rule_broken_ones_and_closed_optimizers_are_refused_and_change_nothing(mlp):
    model = mlp()
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2)
    train(model, optimizer, range(2))
    before = weights(model)
    momentum = fallow.SaRA(mlp(), fraction=0.1, lr=1e-2, rule=lambda groups: torch.optim.SGD(groups, momentum=0.9))
    with pytest.raises(AdapterError, match="holds the moments of SGD, this optimizer's rule is AdamW"):
        optimizer.load_state_dict(momentum.state_dict())
    for key, value in (("index", slice(1, None)), ("weight", slice(1, None)), ("index", None)):
        saved = copy.deepcopy(optimizer.state_dict())
        held = saved["selective"]["tensors"]["0.weight"]
        held[key] = held[key] + 96 * 80 if value is None else held[key][value]
        with pytest.raises(AdapterError, match=r"broken at '0.weight'"):
            optimizer.load_state_dict(saved)
    assert same(weights(model), before)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.close()
    with pytest.raises(ConfigError, match="closed; make a new one to load a state into"):
        optimizer.load_state_dict(saved)
    assert same(weights(model), before)
    model(batch(0)[0]).sum().backward()
    assert all(param.grad is not None for param in model.parameters())  # no hook is back


def test_a_state_in_memory_may_be_loaded_into_two_optimizers_that_go_on_alone(mlp):
    model = mlp()
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2)
    train(model, optimizer, range(2))
    held = copy.deepcopy(optimizer.state_dict())
    twins = []
    for _ in range(2):
        twin = mlp()
        engine = fallow.SaRA(twin, fraction=0.1, lr=1e-2)
        engine.load_state_dict(held)
        train(twin, engine, range(2, 5))
        twins.append(weights(twin))
    assert same(*twins)


def test_a_shira_state_brings_back_layers_that_the_new_choice_lacks(mlp):
    model = mlp()
    optimizer = fallow.SHiRA(model, "wm", density=0.1, lr=1e-2)
    train(model, optimizer, range(3))
    other = mlp()
    engine = fallow.SHiRA(other, "rand", density=0.01, include="4.weight")
    engine.load_state_dict(through_a_file(optimizer.state_dict()))
    for net, rule in ((model, optimizer), (other, engine)):
        train(net, rule, range(3, 5))
    assert same(weights(other), weights(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["sara", "shira"])
def test_an_average_of_the_masters_can_be_put_into_the_weights_and_taken_back(mlp, dtype, method):
    model = mlp(dtype)
    if method == "sara":
        optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2, reselect_at=2)
    else:
        optimizer = fallow.SHiRA(model, "wm", density=0.1, lr=1e-2)
    train(model, optimizer, range(1))
    average = {name: value.clone() for name, value in optimizer.masters().items()}
    train(model, optimizer, range(1, 3))
    own = {name: value.clone() for name, value in optimizer.masters().items()}
    before = weights(model)
    for name, value in average.items():
        value.lerp_(own[name], 0.5)
    optimizer.put(average)
    assert not same(weights(model), before)
    for name, slot in optimizer.slots.items():
        value = average[name] if method == "sara" else slot.base.to(slot.precision) + average[name]
        assert torch.equal(slot.read(), value.to(dtype))
        trained = slice(None) if slot.live is None else slot.live.long()  # those put to rest keep no master
        assert torch.equal(slot.masters()[trained], average[name][trained])
    optimizer.put(own)
    assert same(weights(model), before)


def test_clipping_the_compact_gradients_is_clipping_the_masked_ones(mlp):
    model = mlp()
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2)
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    norm = torch.nn.utils.clip_grad_norm_(optimizer.trainable(), 0.01)
    assert norm > 0.01
    clipped = torch.cat([proxy.grad for proxy in optimizer.trainable()]).norm()
    assert float(clipped) == pytest.approx(0.01, rel=1e-3)


def test_gradient_scaling_unscales_once_and_a_skipped_step_changes_nothing(mlp):
    model, plain_model = mlp(), mlp()
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2)
    plain = fallow.SaRA(plain_model, fraction=0.1, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        x, y = batch(step)
        before = weights(model)
        loss = nn.functional.cross_entropy(model(x), y)
        if step == 2:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(optimizer.trainable(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 2:
            assert same(weights(model), before)
            assert scaler.get_scale() == 512.0
            continue
        nn.functional.cross_entropy(plain_model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(plain.trainable(), 1.0)
        plain.step()
        plain.zero_grad()
    for ours, theirs in zip(model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast_reach_float32_weights_in_float32(mlp, dtype):
    model = mlp()
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-3)
    base = weights(model)
    x, y = batch(0)
    with torch.autocast("cpu", dtype=dtype):
        loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    assert all(proxy.grad.dtype == torch.float32 for proxy in optimizer.trainable())
    optimizer.step()
    assert not same(weights(model), base)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_run(mlp, use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Sequential) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            # the first layer twice in one pass: its hook fires once per checkpoint under re-entrant autograd
            for layers in (self.inner[:3], self.inner[:3], self.inner[3:]):
                x = checkpoint(layers, x, use_reentrant=use_reentrant)
            return x

    class Plain(nn.Module):
        def __init__(self, inner: nn.Sequential) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[3:](self.inner[:3](self.inner[:3](x)))

    ends = []
    for wrap in (Checkpointed, Plain):
        model = wrap(mlp())
        optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2)
        train(model, optimizer, range(5))
        ends.append(weights(model))
    assert all(param.grad is None for param in model.parameters())
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=0, atol=1e-6)


def test_a_loop_that_clears_only_the_model_still_starts_each_step_anew(mlp):
    ends = []
    for clear_model_only in (True, False):
        model = mlp()
        optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2)
        for step in range(4):
            x, y = batch(step)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            (model if clear_model_only else optimizer).zero_grad()
        ends.append(weights(model))
    assert same(*ends)


def test_a_closure_is_evaluated_inside_the_step(mlp):
    model, twin = mlp(), mlp()
    optimizer, plain = (fallow.SaRA(m, fraction=0.1, lr=1e-2) for m in (model, twin))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for step in range(3):
        x, y = batch(step)
        assert optimizer.step(closure).item() > 0
    train(twin, plain, range(3))
    assert same(weights(model), weights(twin))


def test_schedulers_warm_up_and_change_the_rule_itself(mlp):
    model = mlp()
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
    base = weights(model)
    train(model, optimizer, range(1), scheduler)
    assert same(weights(model), base)  # lr 0 in the first step
    assert optimizer.param_groups[0]["lr"] == 5e-3
    assert optimizer.rule.param_groups[0]["lr"] == 5e-3
    train(model, optimizer, range(1, 2), scheduler)
    assert not same(weights(model), base)


def test_another_rule_may_take_the_place_of_adamw(mlp):
    model = mlp().double()
    base = weights(model)
    optimizer = fallow.SaRA(model, fraction=0.1, lr=0.1, rule=lambda groups: torch.optim.SGD(groups))
    x, y = batch(0, torch.float64)
    nn.functional.cross_entropy(model(x), y).backward()
    slot = optimizer.slots["0.weight"]
    expected = base["0.weight"].reshape(-1)[slot.index.long()] - 0.1 * slot.proxy.grad
    optimizer.step()
    torch.testing.assert_close(slot.read(), expected)


def test_a_rule_with_a_group_for_each_weight_resumes_where_the_choice_is_the_same(mlp):
    def make(model: nn.Module, **options) -> fallow.SaRA:
        def rule(groups: list[dict]) -> torch.optim.Optimizer:
            return torch.optim.AdamW([{"params": [p], "lr": 1e-2 / (1 + i)} for i, p in enumerate(groups[0]["params"])])

        return fallow.SaRA(model, fraction=0.1, lr=1e-2, rule=rule, reselect_at=2, **options)

    model, twin = mlp(), mlp()
    optimizer, other = make(model), make(twin)
    train(model, optimizer, range(3))
    saved = through_a_file(optimizer.state_dict())
    other.load_state_dict(saved)
    for net, rule in ((model, optimizer), (twin, other)):
        train(net, rule, range(3, 5))
    assert same(weights(twin), weights(model))
    assert [group["lr"] for group in other.param_groups][:2] == [1e-2, 5e-3]
    third = mlp()
    with pytest.raises(AdapterError, match="trains other weights than this optimizer, and its rule has several groups"):
        make(third, include="0.weight").load_state_dict(saved)
    assert same(weights(third), weights(mlp()))


def test_weights_loaded_into_the_model_in_between_are_followed(mlp):
    """As with any torch optimizer: what the user writes into the model is what training goes on from."""
    model = mlp()
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2)
    train(model, optimizer, range(3))
    best = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(3, 6))
    model.load_state_dict(best)
    for proxy in optimizer.trainable():
        proxy.grad = torch.zeros_like(proxy)
    optimizer.state.clear()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step()  # a zero gradient and no moments: nothing may move
    for name, slot in optimizer.slots.items():
        assert torch.equal(saved["selective"]["tensors"][name]["weight"], slot.read())
    assert same(weights(model), {name: best[name] for name in weights(model)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["sara", "shira"])
def test_values_written_past_autograd_are_saved_and_trained_on(mlp, dtype, method):
    """`param.data.copy_`, as in the EMA of diffusers, does not raise autograd's version counter."""
    model = mlp(dtype)
    make = fallow.SaRA if method == "sara" else fallow.SHiRA
    optimizer = make(model, **({"fraction": 0.1} if method == "sara" else {"mask": "wm", "density": 0.1}), lr=1e-2)
    base, entry = weights(model), optimizer.slots["0.weight"].index.long()
    train(model, optimizer, range(1))
    early = weights(model)
    train(model, optimizer, range(1, 4))
    for name, param in model.named_parameters():
        param.data.copy_(early[name])
    change = optimizer.delta().entries["0.weight"].values
    saved = (base["0.weight"].float().view(-1)[entry] + change).to(dtype)
    expected = early["0.weight"].view(-1)[entry]
    torch.testing.assert_close(saved, expected, rtol=0, atol=1e-8)
    assert not torch.equal(expected, base["0.weight"].view(-1)[entry])
    train(model, optimizer, range(4, 5))
    late = weights(model)
    for name, param in model.named_parameters():
        param.data.copy_(early[name])
    for proxy in optimizer.trainable():
        proxy.grad = torch.zeros_like(proxy)
    optimizer.state.clear()
    optimizer.step()  # a zero gradient and no moments: nothing may move
    assert not same(late, early)
    assert same(weights(model), early)


def test_training_is_refused_while_the_model_shows_another_scale(mlp):
    model = mlp()
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2)
    train(model, optimizer, range(2))
    trained = weights(model)
    optimizer.set_scale(0.3)
    with pytest.raises(ConfigError, match=r"at scale 0.3; call set_scale\(1.0\)"):
        optimizer.step()
    saved = through_a_file(optimizer.state_dict())
    optimizer.set_scale(1.0)
    assert same(weights(model), trained)
    other = mlp()
    fallow.SaRA(other, fraction=0.1, lr=1e-2).load_state_dict(saved)
    assert same(weights(other), trained)  # the state holds the trained values, not those on show


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_disable_and_scale_restore_bit_for_bit_in_every_dtype(mlp, dtype):
    model = mlp(dtype)
    base = weights(model)
    optimizer = fallow.SaRA(model, fraction=0.2, lr=1e-2)
    train(model, optimizer, range(3))
    trained = weights(model)
    for scale in (0.0, 0.7, 1.6, 1.0):
        optimizer.set_scale(scale)
        with optimizer.disabled():
            assert same(weights(model), base)
    assert same(weights(model), trained)


def test_a_compiled_model_trains_alike_under_the_names_of_the_plain_one(mlp):
    plain, model = mlp(), mlp()
    compiled = torch.compile(model, backend="aot_eager")
    optimizers = [fallow.SaRA(net, fraction=0.1, lr=1e-2, reselect_at=2) for net in (plain, compiled)]
    assert list(optimizers[1].slots) == list(optimizers[0].slots)
    for net, optimizer in zip((plain, compiled), optimizers, strict=True):
        train(net, optimizer, range(4))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_model_of_compiled_blocks_has_the_names_of_the_plain_one_in_files_too(mlp, tmp_path):
    """Compiled block by block, the backward pass holds one block's dense gradients at a time."""
    plain, model = mlp(), mlp()
    model[0] = torch.compile(model[0], backend="aot_eager")
    optimizers = [fallow.SaRA(net, fraction=0.1, lr=1e-2, reselect_at=2) for net in (plain, model)]
    assert optimizers[1].selected() == optimizers[0].selected()
    for net, optimizer in zip((plain, model), optimizers, strict=True):
        train(net, optimizer, range(4))
    optimizers[1].save(tmp_path / "a.safetensors", store="value")
    fresh = mlp()
    fallow.SaRA(fresh, fraction=0.1, lr=1e-2).load(tmp_path / "a.safetensors")
    for ours, theirs, loaded in zip(model.parameters(), plain.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert torch.equal(loaded, ours)
    compiled = mlp()
    compiled[0] = torch.compile(compiled[0], backend="aot_eager")
    adapters = fallow.Adapters(compiled)
    adapters.add("a", tmp_path / "a.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(compiled.parameters(), model.parameters(), strict=True))
    resumed = mlp()
    engine = fallow.SaRA(resumed, fraction=0.1, lr=1e-2)
    engine.load_state_dict(through_a_file(optimizers[1].state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), model.parameters(), strict=True))


def test_other_groups_and_unknown_stores_are_refused(mlp):
    model = mlp()
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2)
    with pytest.raises(ConfigError, match=r"no further groups.*call requires_grad_\(True\) on them"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ConfigError, match="store='all'"):
        optimizer.delta("all")
    with pytest.raises(ConfigError, match="scale=nan"):
        optimizer.set_scale(float("nan"))
    with pytest.raises(ConfigError, match="nothing to re-select"):
        fallow.SHiRA(mlp(), "wm", density=0.1).reselect()


@pytest.mark.parametrize("how", ["frozen", "replaced"])
def test_steps_that_can_train_nothing_any_more_are_refused(mlp, how):
    """Frozen or replaced after the optimizer was made, as by PEFT or load_state_dict(assign=True)."""
    model = mlp()
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2, rank_weight=5e-3)
    optimizer.step()  # no gradient as yet is no mistake
    extra = nn.Parameter(torch.ones(10))
    if how == "frozen":
        model.requires_grad_(False)
    else:
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    before = weights(model)
    (model(batch(0)[0]) * extra).sum().backward()
    message = (
        "'0.weight' and all other trained weights were frozen" if how == "frozen" else "'0.weight' is another Para"
    )
    with pytest.raises(ModelError, match=message):
        optimizer.step()
    assert same(weights(model), before)


def test_one_part_frozen_later_stays_as_it_is_while_the_rest_trains(mlp):
    model = mlp()
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2)
    model[0].requires_grad_(False)
    base = weights(model)
    train(model, optimizer, range(2))
    moved = {name for name, value in weights(model).items() if not torch.equal(value, base[name])}
    assert moved == {name for name in optimizer.slots if not name.startswith("0.")}


def test_a_copy_or_a_pickle_of_the_optimizer_is_refused_with_the_way_out(mlp):
    model = mlp()
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2)
    with pytest.raises(ConfigError, match=r"neither copied nor pickled.*give it state_dict"):
        copy.deepcopy(optimizer)
    with pytest.raises(ConfigError, match="neither copied nor pickled"):
        torch.save(optimizer, io.BytesIO())
    train(model, optimizer, range(1))
    twin = copy.deepcopy(model)  # the way out
    engine = fallow.SaRA(twin, fraction=0.1, lr=1e-2)
    engine.load_state_dict(optimizer.state_dict())
    for net, rule in ((model, optimizer), (twin, engine)):
        train(net, rule, range(1, 3))
    assert same(weights(twin), weights(model))


def test_a_second_optimizer_needs_the_first_to_be_closed(mlp):
    model = mlp()
    first = fallow.SaRA(model, fraction=0.1, lr=1e-2)
    with pytest.raises(ModelError, match="already trained by another selective optimizer"):
        fallow.SaRA(model, fraction=0.1, lr=1e-2)
    total = first.total_parameters
    part = mlp()
    kept = fallow.SaRA(part, fraction=0.1, lr=1e-2, include="4.weight")
    part.requires_grad_(True)
    with pytest.raises(ModelError, match=r"'4.weight' is already trained"):
        fallow.SaRA(part, fraction=0.1, lr=1e-2)
    part(torch.randn(2, 80)).sum().backward()
    assert part[0].weight.grad is not None  # the refused one left no hook behind
    kept.close()
    first.close()
    assert fallow.SaRA(model, fraction=0.1, lr=1e-2).total_parameters == total


def test_an_optimizer_that_is_dropped_takes_its_hooks_with_it(mlp):
    model = mlp()
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2)
    gone = weakref.ref(optimizer)
    del optimizer  # no reference cycle: it is gone at once
    assert gone() is None
    model(torch.randn(2, 80)).sum().backward()
    assert all(param.grad is not None for param in model.parameters())


def test_any_selector_can_be_given_and_selecting_nothing_is_refused(mlp):
    def diagonal(targets: list[Target], amount: Amount) -> Selection:
        index = {}
        for target in targets:
            if target.weight.ndim == 2:
                rows, columns = target.weight.shape
                index[target.name] = (torch.arange(min(rows, columns)) * (columns + 1)).to(torch.int32)
        return Selection(index)

    model = mlp()
    base = weights(model)
    optimizer = fallow.Selective(model, diagonal, density=0.5, lr=1e-2)
    assert optimizer.trained_parameters == 80 + 80 + 10
    train(model, optimizer, range(2))
    for name, param in model.named_parameters():
        differs = param.detach() != base[name]
        if param.ndim == 2:
            assert not bool((differs & ~torch.eye(*param.shape, dtype=torch.bool)).any())
            assert bool(differs.any())
        else:
            assert not bool(differs.any())
    with pytest.raises(SelectionError, match="selects no weight"):
        fallow.Selective(mlp(), lambda targets, amount: Selection({}), density=0.5)
    with pytest.raises(ConfigError, match="needs one threshold"):
        fallow.Selective(mlp(), diagonal, density=0.5, reselect_at=3)


def test_values_of_a_model_twin_and_the_state_dict_of_the_model_are_untouched_by_the_engine(mlp):
    model = mlp()
    keys = list(model.state_dict())
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2)
    train(model, optimizer, range(2))
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    assert same(weights(twin), weights(model))
    frozen = weights(twin)
    train(model, optimizer, range(2, 4))
    assert same(weights(twin), frozen)
    other = mlp()
    other.load_state_dict(model.state_dict())
    assert same(weights(other), weights(model))


class TestOtherModels:
    def test_a_unet_trains_only_what_was_chosen(self, tiny_unet):
        model = tiny_unet()
        self.check(
            model,
            lambda: model(torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.randn(2, 5, 16)).sample.square().mean(),
        )

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_a_checkpointed_unet_under_accumulation_takes_the_same_steps(self, tiny_unet, accumulate):
        ends = []
        for checkpointed in (False, True):
            torch.manual_seed(0)
            model = tiny_unet().train()
            if checkpointed:
                model.enable_gradient_checkpointing()
            optimizer = fallow.SaRA(model, fraction=0.05, lr=1e-3)
            for step in range(2 * accumulate):
                latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
                (model(latents, torch.tensor([step, 7]), text).sample.square().mean() / accumulate).backward()
                if (step + 1) % accumulate == 0:
                    torch.nn.utils.clip_grad_norm_(optimizer.trainable(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
            ends.append(weights(model))
        for name in ends[0]:
            torch.testing.assert_close(ends[0][name], ends[1][name], rtol=0, atol=1e-6)

    def test_gpt2_with_a_tied_embedding_trains_it_once(self, tiny_gpt2):
        model, ids = tiny_gpt2(), torch.randint(0, 64, (2, 9))
        optimizer = self.check(model, lambda: model(input_ids=ids, labels=ids).loss)
        assert "transformer.wte.weight" in optimizer.slots
        assert "lm_head.weight" not in optimizer.slots
        assert model.lm_head.weight is model.transformer.wte.weight

    def test_a_vit_trains_only_what_was_chosen(self, tiny_vit):
        model = tiny_vit()
        pixels, labels = torch.randn(2, 3, 16, 16), torch.tensor([1, 4])
        self.check(model, lambda: model(pixel_values=pixels, labels=labels).loss)

    def check(self, model: nn.Module, loss) -> fallow.SaRA:
        model.train()
        base = weights(model)
        dense = copy.deepcopy(base)
        optimizer = fallow.SaRA(model, fraction=0.05, lr=1e-2, rank_weight=5e-3, rank_min_side=16, rank_min_selected=5)
        assert optimizer.total_parameters == sum(param.numel() for param in model.parameters())
        first = None
        for _ in range(8):
            torch.manual_seed(0)
            value = loss()
            first = first or value.item()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert value.item() < first
        for name, param in model.named_parameters():
            differs = (param.detach() != dense[name]).reshape(-1)
            if name in optimizer.slots:
                differs[optimizer.slots[name].index.long()] = False
            assert not bool(differs.any()), name
        with optimizer.disabled():
            assert same(weights(model), base)
        return optimizer


def test_low_rank_factors_of_peft_train_beside_chosen_entries_of_other_layers(mlp):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(mlp(), LoraConfig(r=4, target_modules=["0"]))
    model.base_model.model[2].requires_grad_(True)
    factors = [param for name, param in model.named_parameters() if "lora_" in name]
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2, include=r"[.]2[.]")
    for param in factors:
        param.requires_grad_(True)
    dense = torch.optim.AdamW(factors, lr=1e-2)
    base = weights(model)
    for step in range(2):
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        for rule in (optimizer, dense):
            rule.step()
            rule.zero_grad()
    moved = {name for name, value in weights(model).items() if not torch.equal(value, base[name])}
    assert moved == {name for name in base if "lora_" in name} | set(optimizer.slots)
    slot = optimizer.slots["base_model.model.2.weight"]
    assert int((slot.read() != slot.base).sum()) == slot.index.numel() < slot.weight.numel() // 5


def test_accelerate_accumulates_clips_saves_and_restores_like_a_plain_loop(mlp, tmp_path):
    from accelerate import Accelerator

    def make() -> tuple[nn.Module, fallow.SaRA, torch.optim.lr_scheduler.LRScheduler]:
        model = mlp()
        optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2, reselect_at=2, rank_weight=5e-3)
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10)

    plain, optimizer, scheduler = make()
    for step in range(8):
        x, y = batch(step)
        (nn.functional.cross_entropy(plain(x), y) / 2).backward()
        if step % 2:
            torch.nn.utils.clip_grad_norm_(optimizer.trainable(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    model, inner, scheduler = make()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    wrapped, outer, scheduler = accelerator.prepare(model, inner, scheduler)

    def go(steps: range) -> None:
        for step in steps:
            with accelerator.accumulate(wrapped):
                x, y = batch(step)
                accelerator.backward(nn.functional.cross_entropy(wrapped(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(inner.trainable(), 0.5)
                outer.step()
                scheduler.step()
                outer.zero_grad()

    go(range(6))
    accelerator.save_state(str(tmp_path))
    go(range(6, 8))
    assert same(weights(model), weights(plain))
    accelerator.load_state(str(tmp_path))
    assert not same(weights(model), weights(plain))
    go(range(6, 8))
    assert same(weights(model), weights(plain))
    assert inner.live_parameters == optimizer.live_parameters < inner.trained_parameters


def test_the_hugging_face_trainer_clips_clears_saves_and_resumes(tiny_gpt2, tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (16, 9))]

    def run(folder: str, resume: bool = False) -> tuple[nn.Module, fallow.SaRA]:
        torch.manual_seed(0)
        model = tiny_gpt2()
        optimizer = fallow.SaRA(model, fraction=0.05, lr=1e-2, reselect_at=0.5)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=6, per_device_train_batch_size=4, max_grad_norm=0.05,
            save_steps=4, report_to=[], use_cpu=True, disable_tqdm=True, seed=0, logging_steps=100,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=[fallow.Callback(optimizer)]
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-4") if resume else None)
        return model, optimizer

    model, optimizer = run("whole")
    assert optimizer.schedule.steps == 6
    assert [event["step"] for event in optimizer.events] == [3]
    assert 0 < optimizer.live_parameters < optimizer.trained_parameters
    assert all(proxy.grad is None for proxy in optimizer.trainable())
    again, optimizer_2 = run("whole", resume=True)
    assert optimizer_2.schedule.steps == 6
    assert same(weights(again), weights(model))


def test_the_callback_wants_a_selective_optimizer_or_a_model():
    with pytest.raises(ConfigError, match="needs a selective optimizer"):
        fallow.Callback(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))


def test_public_names_are_importable():
    for name in fallow.__all__:
        assert getattr(fallow, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'SARA'"):
        fallow.SARA  # noqa: B018
