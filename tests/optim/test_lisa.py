"""LISA: which blocks are trained when, what they cost, and that it goes on where it stopped."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fallow
from fallow.core.errors import ConfigError, ModelError
from fallow.optim.blocks import find_blocks, gradient_norms, outside, weight_norms
from fallow.optim.lisa import LISA
from fallow.optim.lowrank import LowRank
from fallow.optim.sampling import Drawing

WIDTH, BLOCKS = 16, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    """(N, 16) -> (N, 5); `reentrant`: how blocks are checkpointed, None for not at all."""

    def __init__(self, blocks: int = BLOCKS, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, WIDTH, generator=generator)
    return nn.functional.cross_entropy(model(x), torch.randint(5, (12,), generator=generator))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range | int) -> list[float]:
    losses = []
    for step in range(steps) if isinstance(steps, int) else steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def made(**options: Any) -> tuple[Stack, torch.optim.AdamW, LISA]:
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, optimizer, LISA(model, optimizer, **options)


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def numel(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def state_numbers(optimizer: torch.optim.Optimizer) -> int:
    return sum(v.numel() for state in optimizer.state.values() for key, v in state.items() if key != "step")


# -- which blocks -----------------------------------------------------------------------------------------------------


def test_within_an_interval_the_drawn_blocks_and_what_is_outside_of_blocks_change_alone():
    model, optimizer, lisa = made(active=2, interval=3)
    sets = []
    for interval in range(6):
        before, active = snapshot(model), list(lisa.active)
        train(model, optimizer, range(3 * interval, 3 * interval + 3))
        expected = {n for n in before if not n.startswith("blocks.") or ".".join(n.split(".")[:2]) in active}
        assert len(active) == 2
        assert moved(model, before) == expected
        sets.append(tuple(active))
    assert len(set(sets)) > 3


def test_the_cyclic_order_takes_every_block_once_in_a_cycle():
    drawing = Drawing([str(i) for i in range(8)], [1] * 8, 3, None, None, "cyclic", seed=4)
    for cycle in range(5):
        drawn = [name for i in range(3) for name in drawing.draw(3 * cycle + i)]
        assert sorted(drawn) == [str(i) for i in range(8)]
    assert drawing.draw(0) != drawing.draw(3)


def test_every_block_moves_within_some_cycles():
    model, optimizer, _ = made(active=3, interval=1, order="cyclic")
    before = snapshot(model)
    train(model, optimizer, 3)
    assert moved(model, before) == set(before)


def test_weights_decide_how_often_a_block_is_drawn():
    drawing = Drawing(["a", "b", "c"], [1] * 3, 1, None, [0.6, 0.3, 0.1], "random", seed=0)
    counts = {name: sum(drawing.draw(i) == [name] for i in range(3000)) / 3000 for name in "abc"}
    assert counts == pytest.approx({"a": 0.6, "b": 0.3, "c": 0.1}, abs=0.03)
    even = Drawing(["a", "b", "c", "d"], [1] * 4, 2, None, None, "random", seed=1)
    shares = [sum(name in even.draw(i) for i in range(2000)) / 2000 for name in "abcd"]
    assert shares == pytest.approx([0.5] * 4, abs=0.04)


def test_a_budget_takes_as_many_blocks_as_fit():
    drawing = Drawing(["a", "b", "c", "d"], [5, 3, 3, 1], 1, 6, None, "random", seed=0)
    for interval in range(40):
        sizes = [{"a": 5, "b": 3, "c": 3, "d": 1}[name] for name in drawing.draw(interval)]
        assert sum(sizes) <= 6
        assert sum(sizes) >= 4
    with pytest.raises(ConfigError, match="budget=4 is below the 5 parameters of 'a'"):
        Drawing(["a", "b"], [5, 3], 1, 4, None, "random", seed=0)


def test_draws_are_the_same_on_all_ranks_and_leave_torchs_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = made(active=2, seed=7)[2].drawing
    torch.manual_seed(99)
    second = made(active=2, seed=7)[2].drawing
    other = made(active=2, seed=8)[2].drawing
    assert [first.draw(i) for i in range(9)] == [second.draw(i) for i in range(9)]
    assert [first.draw(i) for i in range(9)] != [other.draw(i) for i in range(9)]
    torch.set_rng_state(before)
    first.draw(3)
    assert torch.equal(torch.get_rng_state(), before)


# -- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["drop", "keep"])
def test_states_take_what_the_formula_says(state):
    model, optimizer, _ = made(active=2, interval=1, state=state, order="cyclic")
    always = numel(model) - numel(model.blocks)
    for step in range(12):
        train(model, optimizer, range(step, step + 1))
        if state == "drop":  # the set has been drawn anew: the states of both are never held together
            assert state_numbers(optimizer) <= 2 * (always + 2 * numel(model.blocks[0]))
    if state == "keep":
        assert state_numbers(optimizer) == 2 * numel(model)


def test_peak_states_of_an_interval_are_those_of_what_is_in_training():
    model, optimizer, _ = made(active=2, interval=5)
    train(model, optimizer, 4)
    always = numel(model) - numel(model.blocks)
    assert state_numbers(optimizer) == 2 * (always + 2 * numel(model.blocks[0]))


def test_frozen_blocks_hold_no_gradient_and_no_state():
    model, optimizer, lisa = made(active=1, interval=2)
    loss_of(model, 0).backward()
    for name, block in lisa.blocks.items():
        assert all((param.grad is None) == (name not in lisa.active) for param in block.parameters())
    optimizer.step()
    loss_of(model, 1).backward()
    optimizer.step()  # the switch, with gradients that nobody has cleared
    for name, block in lisa.blocks.items():
        if name not in lisa.active:
            assert all(param.grad is None and param not in optimizer.state for param in block.parameters())


def test_memory_falls_with_the_blocks_in_training(peak_bytes: Callable[[Callable[[], object]], int]):
    def peak(active: int | None) -> int:
        model = Stack()
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        if active is not None:
            LISA(model, optimizer, active=active, interval=10)
        return peak_bytes(lambda: train(model, optimizer, 2))

    block = 4 * numel(Stack().blocks[0])
    full, two, one = peak(None), peak(2), peak(1)
    assert full - two > 6 * 3 * block * 0.85  # gradients and two moments of six blocks
    assert two - one > 2 * block


def saved_bytes(model: nn.Module) -> int:
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    held = {param.untyped_storage().data_ptr() for param in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, 0)
    return sum(size for key, size in seen.items() if key not in held)


def test_activations_and_work_of_the_backward_pass_fall():
    from torch.utils.flop_counter import FlopCounterMode

    sizes, work = [], []
    for active in (BLOCKS, 1):
        model, _, _ = made(active=active)
        sizes.append(saved_bytes(model))
        loss = loss_of(model, 0)
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        work.append(counter.get_total_flops())
    assert sizes[1] < 0.85 * sizes[0]  # norms and ReLUs keep what they kept
    assert work[1] < 0.65 * work[0]


def test_with_frozen_embeddings_the_backward_pass_ends_at_the_lowest_active_block():
    model, _, lisa = made(active=1, train_embeddings=False)
    low = list(lisa.blocks).index(lisa.active[0])
    inputs: dict[int, Tensor] = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, args, i=i: inputs.__setitem__(i, args[0]))
    loss_of(model, 0).backward()
    assert [inputs[i].requires_grad for i in range(BLOCKS)] == [i > low for i in range(BLOCKS)]


# -- with optimizers --------------------------------------------------------------------------------------------------


def test_all_blocks_with_kept_states_are_plain_adamw_bit_for_bit():
    model, optimizer, _ = made(active=BLOCKS, interval=2, state="keep")
    plain = Stack()
    train(model, optimizer, 7)
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3), 7)
    assert not moved(model, plain.state_dict())


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
        lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
        lambda params: torch.optim.Adafactor(params),
        lambda params: LowRank(params, lr=1e-3, rank=4),
    ],
    ids=["sgd", "fused", "adafactor", "lowrank"],
)
@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
def test_any_optimizer_and_any_fate_of_the_states(make, state):
    model = Stack()
    optimizer = make(list(model.parameters()))
    LISA(model, optimizer, active=2, interval=2, state=state, order="cyclic")
    before = snapshot(model)
    losses = train(model, optimizer, [0] * 16)
    assert moved(model, before) == set(before)
    assert losses[-1] < losses[0]


def test_offloaded_states_come_back_as_they_were():
    ends = []
    for state in ("keep", "offload"):
        model, optimizer, _ = made(active=2, interval=2, state=state)
        train(model, optimizer, 12)
        ends.append(snapshot(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_offloading_copies_what_lies_on_another_device():
    model, optimizer, lisa = made(active=2, interval=2, state="offload")
    train(model, optimizer, 1)
    param = lisa.trained[lisa.active[0]][0]
    optimizer.state[param]["exp_avg"] = torch.empty(3, device="meta")
    with pytest.raises(NotImplementedError):  # meta tensors have no values to copy, so the copy was asked for
        lisa._freeze([param])


def test_a_returning_block_starts_with_fresh_moments():
    model, optimizer, lisa = made(active=1, interval=2, order="cyclic")
    first = lisa.trained[lisa.active[0]][0]
    train(model, optimizer, 2)
    assert first not in optimizer.state
    while not first.requires_grad:
        train(model, optimizer, 1)
    train(model, optimizer, 1)
    assert optimizer.state[first]["step"].item() == 1


def test_stale_gradients_do_not_reach_the_clipping():
    model, optimizer, lisa = made(active=1, interval=1)
    loss_of(model, 0).backward()
    optimizer.step()
    norms = [param.grad is None for n, b in lisa.blocks.items() if n not in lisa.active for param in b.parameters()]
    assert all(norms)


def test_steps_are_counted_under_accumulation_and_with_closures():
    model, optimizer, lisa = made(active=1, interval=2)
    first = list(lisa.active)
    for micro in range(6):
        loss_of(model, micro).backward()
        if micro % 3 == 2:
            assert lisa.active == first
            optimizer.step()
            optimizer.zero_grad()
    assert lisa.steps == 2

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert lisa.steps == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_are_trained_alike(reentrant):
    ends = []
    for mode in (None, reentrant):
        model = Stack(reentrant=mode)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        LISA(model, optimizer, active=2, interval=2)
        train(model, optimizer, 5)
        ends.append(snapshot(model))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_blocks_that_checkpointing_cuts_off_are_told_of():
    model = Stack(reentrant=True)
    optimizer = torch.optim.AdamW(model.parameters())
    LISA(model, optimizer, active=1, train_embeddings=False)
    loss_of(model, 0).backward()
    with pytest.raises(ModelError, match="has no gradient; under reentrant checkpointing give use_reentrant=False"):
        optimizer.step()


def test_the_rate_rises_at_the_start_of_an_interval():
    model, optimizer, _ = made(active=2, interval=4, warmup=2)
    rates: list[float] = []
    optimizer.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    train(model, optimizer, 8)
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3] * 2)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_release_lets_everything_be_trained_again():
    model, optimizer, lisa = made(active=1, train_head=False)
    lisa.release()
    assert all(param.requires_grad for param in model.parameters())
    before = snapshot(model)
    train(model, optimizer, 1)
    assert moved(model, before) == set(before)


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
def test_a_run_resumed_within_an_interval_goes_on_bit_for_bit(state):
    model, optimizer, lisa = made(active=2, interval=4, state=state)
    train(model, optimizer, range(6))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(6, 14))
    file.seek(0)
    held = torch.load(file, weights_only=True)
    again, other, second = made(active=2, interval=4, state=state)
    again.load_state_dict(held["model"])
    other.load_state_dict(held["optimizer"])
    assert second.steps == 6
    assert second.active == lisa.drawing.draw(1)
    train(again, other, range(6, 14))
    assert not moved(again, model.state_dict())


def test_a_state_of_other_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"trained 'layers.0', which is no block"):
        made()[2].load_state_dict({"steps": 3, "active": ["layers.0"]})


def test_the_trainer_binds_it_and_resumes_it(tmp_path):
    from transformers import Trainer, TrainingArguments

    class Wrapped(Stack):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = super().forward(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    data = [{"x": torch.randn(WIDTH), "labels": torch.tensor(i % 5)} for i in range(64)]

    def run(folder: str, steps: int, resume: str | None = None) -> tuple[nn.Module, LISA]:
        model = Wrapped()
        lisa = LISA(model, active=2, interval=4)
        arguments = TrainingArguments(
            tmp_path / folder, max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            save_steps=6, report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[fallow.Callback(lisa)])
        trainer.train(resume_from_checkpoint=resume)
        return model, lisa

    whole, lisa = run("whole", 10)
    assert lisa.steps == 10
    assert lisa.active == lisa.drawing.draw(2)
    resumed, _ = run("rest", 10, str(tmp_path / "whole" / "checkpoint-6"))
    assert not moved(resumed, whole.state_dict())


# -- finding blocks ---------------------------------------------------------------------------------------------------


def test_embeddings_norms_and_head_are_trained_as_told():
    for option, name in (("train_embeddings", "embed"), ("train_norms", "norm"), ("train_head", "head")):
        model, optimizer, _ = made(active=1, **{option: False})
        before = snapshot(model)
        train(model, optimizer, 1)
        parts = {key.split(".")[0] for key in moved(model, before)}
        assert parts == {"embed", "blocks", "norm", "head"} - {name}


def test_blocks_are_found_in_real_models(tiny_gpt2, tiny_vit, tiny_unet):
    gpt2 = tiny_gpt2()
    blocks = find_blocks(gpt2)
    assert list(blocks) == ["transformer.h.0", "transformer.h.1"]
    sides = {name: outside(gpt2, blocks).get(param) for name, param in gpt2.named_parameters()}
    assert sides["transformer.wte.weight"] == {"embeddings", "head"}  # tied
    assert sides["transformer.wpe.weight"] == {"embeddings"}
    assert sides["transformer.ln_f.bias"] == {"norms"}
    vit = tiny_vit()
    assert [name.rsplit(".", 1)[1] for name in find_blocks(vit)] == ["0", "1"]
    assert {name for name, side in ((n, outside(vit, find_blocks(vit)).get(p)) for n, p in vit.named_parameters())
            if side == {"head"}} == {"classifier.weight", "classifier.bias"}  # fmt: skip
    unet = tiny_unet()
    classes = find_blocks(unet, ["ResnetBlock2D", "Transformer2DModel"])
    assert len(classes) == 12
    assert list(find_blocks(unet, "down_blocks")) == ["down_blocks.0", "down_blocks.1"]


def test_weights_from_norms():
    model = Stack(3)
    with torch.no_grad():
        model.blocks[1].up.weight.mul_(3)
    norms = [(block.up.weight.norm() + block.down.weight.norm()) / 2 for block in model.blocks]
    assert weight_norms(model) == pytest.approx([norm.item() for norm in norms])
    loss_of(model, 0).backward()
    expected = [torch.cat([p.grad.flatten() for p in block.parameters()]).norm().item() for block in model.blocks]
    assert gradient_norms(model) == pytest.approx(expected)
    model.zero_grad()
    with pytest.raises(ConfigError, match=r"'blocks.0' has no gradient"):
        gradient_norms(model)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"active": 0}, "active=0 must be a whole number of at least 1 and at most 8"),
        ({"active": 9}, "active=9"),
        ({"interval": 0}, "interval=0"),
        ({"state": "forget"}, "state='forget' must be one of 'drop', 'keep', 'offload'"),
        ({"order": "sorted"}, "order='sorted'"),
        ({"weights": [1.0] * 7}, "must be 8 finite numbers above 0"),
        ({"weights": [0.0] + [1.0] * 7}, "must be 8 finite numbers above 0"),
        ({"warmup": 21}, "warmup=21"),
        ({"budget": 10}, "budget=10 is below"),
        ({"blocks": "layers"}, "blocks='layers' is neither a module of Stack nor a class"),
        ({"blocks": "embed"}, "finds 1 blocks"),
    ],
)
def test_impossible_settings_are_refused_when_it_is_made(options, said):
    with pytest.raises(ConfigError, match=said):
        made(**options)


def test_an_optimizer_that_lacks_blocks_is_refused():
    model = Stack()
    frozen = [param for block in model.blocks[2:] for param in block.parameters()]
    held = [param for param in model.parameters() if all(param is not other for other in frozen)]
    with pytest.raises(ConfigError, match=r"the optimizer lacks parameters of 'blocks.2'"):
        LISA(model, torch.optim.AdamW(held))
    model.blocks[1].requires_grad_(False)
    with pytest.raises(ConfigError, match=r"the block 'blocks.1' is frozen already"):
        LISA(model, torch.optim.AdamW(model.parameters()))
    assert all(param.requires_grad for param in model.blocks[0].parameters())


def test_blocks_that_share_a_parameter_are_refused():
    model = Stack(3)
    model.blocks[2].up.weight = model.blocks[0].up.weight
    with pytest.raises(ModelError, match=r"'blocks.0' and 'blocks.2' share a parameter"):
        LISA(model)
