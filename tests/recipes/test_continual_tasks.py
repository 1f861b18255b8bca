"""The life cycle of tasks: learned, merged, kept, taken back; on layers of all kinds and on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fallow
from fallow.core.delta import Delta
from fallow.core.errors import AdapterError, ConfigError, ModelError, TrainingError
from fallow.core.held_deltas import held_adapter
from fallow.recipes.continual_tasks import ADAPTER, TaskSequence


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)).to(dtype)


def learn(tasks: TaskSequence, name: str, zero: int | None = None) -> list[Tensor]:
    """A task whose adapter is random; the changes of its weights, in their order."""
    tasks.start_task(name, steps=10)
    deltas = [one.delta for one in held_adapter(tasks.model, ADAPTER).deltas]
    for delta in deltas:
        delta.randomize()
        if zero is not None:
            with torch.no_grad():
                delta.gate[zero] = 0.0
    return [delta.delta_weight().detach().clone() for delta in deltas]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.dim() > 1]


def is_plain(model: nn.Module) -> bool:
    return not any(isinstance(module, Delta) for module in model.modules()) and not hasattr(model, "adapters_shared")


def test_a_task_starts_at_the_merged_model_and_its_end_leaves_a_plain_one_of_the_same_outputs() -> None:
    model, x = network(), torch.randn(5, 12)
    before, names = model(x), [name for name, _ in model.named_parameters()]
    tasks = TaskSequence(model, rank=4)
    tasks.start_task("first", steps=10)
    assert torch.equal(model(x), before)
    tasks.abandon_task()
    for name in ("one", "two"):
        learn(tasks, name)
        trained = model(x)
        assert not torch.allclose(trained, before, atol=1e-2)
        tasks.end_task()
        torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)
        before = model(x)
        assert is_plain(model)
        assert [name for name, _ in model.named_parameters()] == names
        assert type(model[0]) is nn.Linear
        tasks.start_task("next")
        assert torch.equal(model(x), before)
        tasks.abandon_task()


def test_changes_add_up_and_a_removed_task_is_gone_from_the_sum_alone() -> None:
    model = network()
    start, tasks, changes = weights(model), TaskSequence(model, rank=4), []
    for name in ("one", "two", "three"):
        changes.append(learn(tasks, name))
        tasks.end_task()
    for at, (weight, first) in enumerate(zip(weights(model), start, strict=True)):
        torch.testing.assert_close(weight - first, sum(change[at] for change in changes), rtol=1e-5, atol=1e-5)
    third = weights(model)
    removed = tasks.remove_task("two")
    for weight, last, change in zip(weights(model), third, changes[1], strict=True):
        torch.testing.assert_close(weight, last - change, rtol=1e-5, atol=1e-5)
    assert list(tasks.tasks) == ["one", "three"]
    tasks.add_task(removed)
    for weight, last in zip(weights(model), third, strict=True):
        torch.testing.assert_close(weight, last, rtol=1e-5, atol=1e-5)


def test_gates_at_zero_are_no_part_of_what_is_kept() -> None:
    model = network()
    tasks = TaskSequence(model, rank=4)
    (first, second) = learn(tasks, "one", zero=2)
    task = tasks.end_task()
    assert task.ranks == {"0": 3, "2": 3}
    assert task.numbers == 3 * (12 + 16) + 3 * (16 + 8)
    for change, key in ((first, "0"), (second, "2")):
        b, a = task.factors[key]
        torch.testing.assert_close(b @ a, change)
        assert int(torch.linalg.matrix_rank(change)) <= task.ranks[key]


def test_what_gates_and_data_leave_open_is_trained_and_nothing_else() -> None:
    model = network()
    tasks = TaskSequence(model, rank=4, whole=["2.bias"])
    tasks.start_task("one", steps=10)
    trained = {name.rpartition(".")[2] for name, param in model.named_parameters() if param.requires_grad}
    assert trained == {"A", "B", "gate", "bias"}
    rest, gates = tasks.parameter_groups(lr=1e-3, gate_lr=1e-1)
    assert [g["lr"] for g in (rest, gates)] == [1e-3, 1e-1]
    assert [tuple(p.shape) for p in gates["params"]] == [(4,), (4,)]
    assert sum(p.numel() for p in rest["params"]) == 4 * (12 + 16 + 16 + 8) + 8
    plain = TaskSequence(network(), "lora", rank=4)
    plain.start_task("one")
    with pytest.raises(ConfigError, match=r"gate_lr=0.1: 'lora' has no gates"):
        plain.parameter_groups(lr=1e-3, gate_lr=0.1)


def test_a_trained_task_is_pruned_by_its_threshold_merged_and_better_than_before() -> None:
    model, x = network(), torch.randn(64, 12)
    target = torch.randn(64, 8)
    tasks = TaskSequence(model, rank=6, max_kappa=0.1, gate_init="ones")

    def loss() -> Tensor:
        return (model(x) - target).square().mean()

    before = float(loss().detach())
    tasks.start_task("one", steps=60)
    optimizer = torch.optim.AdamW(tasks.parameter_groups(1e-2, 3e-2), weight_decay=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        fallow.step(model)
    trained = float(loss().detach())
    task = tasks.end_task()
    assert float(loss().detach()) == pytest.approx(trained, abs=1e-5)
    assert trained < before
    assert 0 < sum(task.ranks.values()) < 12


def test_with_a_kappa_of_zero_it_is_lora_after_lora_whose_change_carries_the_gates() -> None:
    def run(method: str, **options: object) -> list[Tensor]:
        model = network()
        tasks = TaskSequence(model, method, rank=3, **options)
        for number, name in enumerate(("one", "two")):
            torch.manual_seed(number)
            tasks.start_task(name, steps=5)
            deltas = [one.delta for one in held_adapter(model, ADAPTER).deltas]
            for at, delta in enumerate(deltas):  # the same A in both
                torch.manual_seed(10 * number + at)
                with torch.no_grad():
                    nn.init.normal_(delta.A)
            groups = [p for n, p in model.named_parameters() if p.requires_grad and not n.endswith("gate")]
            optimizer = torch.optim.SGD(groups, 0.05)
            for _ in range(5):
                optimizer.zero_grad()
                model(torch.ones(4, 12)).square().mean().backward()
                optimizer.step()
                fallow.step(model)
            assert tasks.end_task().ranks == {"0": 3, "2": 3}
        return weights(model)

    ones = run("codyra", max_kappa=0.0, gate_init="ones")
    plain = run("lora", alpha=3.0)
    for one, other in zip(ones, plain, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_packed_attention_has_a_rank_for_query_key_and_value_and_merges(batch_first: bool, masked: bool) -> None:
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if masked else None
            return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]

    model, x = Block(), torch.randn(5, 5, 8)
    before = model(x)
    tasks = TaskSequence(model, rank=3, fused={"in_proj_weight": 3})
    tasks.start_task("one", steps=10)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    fused, out = (one.delta for one in held_adapter(model, ADAPTER).deltas)
    fused.randomize()
    out.randomize()
    with torch.no_grad():
        fused.deltas[1].gate[0] = 0.0
    trained = model(x)
    task = tasks.end_task()
    assert task.ranks == {
        "attention.in_proj_weight[0:8]": 3,
        "attention.in_proj_weight[8:16]": 2,
        "attention.in_proj_weight[16:24]": 3,
        "attention.out_proj": 3,
    }
    torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)
    tasks.remove_task("one")
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels_last", [True, False])
def test_convolutions_embeddings_and_tied_weights_take_tasks(channels_last: bool, tiny_gpt2: Callable) -> None:
    conv = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1))
    conv = conv.to(memory_format=torch.channels_last) if channels_last else conv
    for model, x, targets in (
        (conv, torch.randn(2, 3, 6, 6), "all-layers"),
        (tiny_gpt2().eval(), torch.randint(0, 64, (2, 5)), "all-layers"),
    ):

        def out(model: nn.Module = model, x: Tensor = x) -> Tensor:
            found = model(x)
            return getattr(found, "logits", found)

        before = out()
        tasks = TaskSequence(model, targets=targets, rank=2)
        learn(tasks, "one")
        trained = out()
        tasks.end_task()
        torch.testing.assert_close(out(), trained, rtol=1e-4, atol=1e-4)
        tasks.remove_task("one")
        torch.testing.assert_close(out(), before, rtol=1e-4, atol=1e-4)


def test_half_precision_is_summed_up_from_the_start_so_that_small_changes_are_not_lost() -> None:
    model = network(torch.bfloat16)
    start = weights(model)
    tasks, total = TaskSequence(model, "lora", rank=2), torch.zeros(16, 12)
    for number in range(20):
        tasks.start_task(str(number))
        for one in held_adapter(model, ADAPTER).deltas:
            with torch.no_grad():
                one.delta.A.fill_(0.01)
                one.delta.B.fill_(0.01)  # a change of 2e-4, below the resolution of a weight of 0.2
        total += held_adapter(model, ADAPTER).deltas[0].delta.delta_weight().detach()
        tasks.end_task()
    wanted = (start[0].float() + total).bfloat16()
    assert torch.equal(weights(model)[0], wanted)
    assert not torch.equal(wanted, start[0])
    for number in range(20):
        tasks.remove_task(str(number))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), start, strict=True))


def test_tasks_are_files_from_which_the_model_comes_again(tmp_path) -> None:
    model = network()
    base, x = copy.deepcopy(model), torch.randn(5, 12)
    tasks = TaskSequence(model, rank=4, folder=tmp_path / "tasks", whole=["2.bias"])
    for name in ("one", "two", "three"):
        learn(tasks, name, zero=1)
        with torch.no_grad():
            model[2].bias += 0.5
        tasks.end_task()
    tasks.remove_task("two")
    assert sorted(p.name for p in (tmp_path / "tasks").iterdir()) == [
        "one.safetensors", "sequence.json", "three.safetensors",
    ]  # fmt: skip
    assert load_file(tmp_path / "tasks" / "one.safetensors")["0.b"].shape == (16, 3)
    again = copy.deepcopy(base)
    loaded = TaskSequence.load(again, tmp_path / "tasks")
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)
    assert list(loaded.tasks) == ["one", "three"]
    assert loaded.how["rank"] == 4
    loaded.remove_task("three")
    assert not (tmp_path / "tasks" / "three.safetensors").exists()
    loaded.remove_task("one")
    torch.testing.assert_close(again(x), base(x), rtol=1e-5, atol=1e-5)
    learned = copy.deepcopy(base)
    learned[0].weight.data += 1
    with pytest.raises(AdapterError, match="began from another model: '0' is not the weight it was"):
        TaskSequence.load(learned, tmp_path / "tasks")


def test_broken_files_and_folders_in_use_are_refused(tmp_path) -> None:
    with pytest.raises(AdapterError, match=r"holds no sequence.json"):
        TaskSequence.load(network(), tmp_path)
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ConfigError, match=r"is in use; .*TaskSequence.load"):
        TaskSequence(network(), folder=tmp_path)
    model = network()
    tasks = TaskSequence(model, rank=2, folder=tmp_path / "tasks")
    learn(tasks, "one")
    tasks.end_task()
    base = network()
    file = tmp_path / "tasks" / "one.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(AdapterError, match="cannot be read as safetensors"):
        TaskSequence.load(base, tmp_path / "tasks")


def test_starts_that_keep_the_model_and_ranks_of_a_budget_are_merged_and_taken_back(tmp_path) -> None:
    model, x = network(), torch.randn(5, 12)
    before, start = model(x), weights(model)
    tasks = TaskSequence(
        model, "lora", rank=3, start="pissa", budget=fallow.Uniform({"2": 2}), folder=tmp_path / "tasks"
    )
    tasks.start_task("one")
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    for one in held_adapter(model, ADAPTER).deltas:
        with torch.no_grad():
            one.delta.B.mul_(1.5)
    trained = model(x)
    assert not torch.allclose(trained, before, atol=1e-2)
    task = tasks.end_task()
    assert task.ranks == {"0": 6, "2": 4}  # B A - B0 A0
    torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)
    tasks.remove_task("one")
    for weight, first in zip(weights(model), start, strict=True):
        torch.testing.assert_close(weight, first, rtol=1e-5, atol=1e-5)
    assert TaskSequence.load(network(), tmp_path / "tasks").how["start"] == "pissa"


def test_mistakes_are_told_by_name_and_change_nothing() -> None:
    model, x = network(), torch.randn(2, 12)
    before = model(x)
    tasks = TaskSequence(model, rank=2)
    for call, message in (
        (tasks.end_task, "end_task: no task is open"),
        (lambda: tasks.parameter_groups(1e-3), "parameter_groups: no task is open"),
        (lambda: tasks.start_task("a/b"), "name='a/b' must be of letters"),
        (lambda: tasks.remove_task("one"), "there is no task 'one'"),
        (lambda: TaskSequence(network(), "dora"), "method='dora' changes a weight"),
        (lambda: TaskSequence(network(), whole=["3.bias"]), "whole: the model has no parameter '3.bias'"),
        (lambda: TaskSequence(network(), rank=0).start_task("one"), "rank=0"),
        (
            lambda: TaskSequence(network(), rank=2, whole=["0.weight"]).start_task("one"),
            "'0.weight' has an adapter too",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    tasks.start_task("one")
    for call, message in (
        (lambda: tasks.start_task("two"), r"start_task\('two'\): 'one' is not at its end"),
        (lambda: tasks.remove_task("one"), "remove_task: task 'one' is open"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    held_adapter(model, ADAPTER).deltas[0].delta.A.data[0] = float("nan")
    with pytest.raises(TrainingError, match="task 'one' has values that are no numbers"):
        tasks.end_task()
    tasks.abandon_task()
    assert torch.equal(model(x), before)
    tasks.start_task("one")
    tasks.end_task()
    with pytest.raises(ConfigError, match="there is a task 'one' already"):
        tasks.start_task("one")
    taken = network()
    fallow.attach(taken, "lora", rank=2)
    with pytest.raises(ConfigError, match="the model has adapters already"):
        TaskSequence(taken, rank=2).start_task("one")
    for other, message in (
        (nn.Sequential(nn.Linear(3, 3)), "task 'one' changes '0' by 16 x 12, but it is 3 x 3"),
        (nn.Sequential(nn.Linear(12, 16)), "task 'one' changes '2', which the model does not have"),
    ):
        with pytest.raises(ConfigError, match=message):
            TaskSequence(other, rank=2).add_task(tasks.tasks["one"])


def test_a_quantised_model_is_refused_before_anything_is_attached() -> None:
    from fallow.core.quantized import quantize_

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize_(model, "int8")
    with pytest.raises(ModelError, match="is quantised, so no task can be merged"):
        TaskSequence(model, rank=2).start_task("one")
    assert is_plain(model)


def test_the_official_starts_decide_about_survival_and_this_is_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 200))
    tasks = TaskSequence(model, rank=200)
    tasks.start_task("one", steps=500)
    for _ in range(500):  # no gradient at all
        fallow.step(model)
    task = tasks.end_task()
    assert task.chance is not None
    assert task.chance > 0.6
    first = TaskSequence(network(), "lora", rank=2)
    learn(first, "one")
    assert first.end_task().chance is None
