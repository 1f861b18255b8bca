"""Two processes with halves of each batch train as one does with the whole, and send compact gradients alone."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fallow.core.distributed import rank
from fallow.core.errors import ConfigError, ModelError
from fallow.selection.lt_sft import LTSFT
from fallow.selection.sara import SaRA, smallest
from fallow.selection.selective import Selective
from fallow.selection.shira import SHiRA
from ranks import run_ranks
from zoo import Zoo

STEPS, BATCH = 3, 8
Trained = dict[str, Any]


def model(dtype: torch.dtype = torch.float32) -> Zoo:
    torch.manual_seed(1)
    return Zoo().to(dtype)


def data(step: int) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(step)
    return torch.randint(0, 32, (BATCH, 5), generator=chance), torch.randint(0, 10, (BATCH,), generator=chance)


def sara(net: nn.Module, **more: Any) -> SaRA:
    term = {"rank_weight": 5e-3, "rank_min_side": 4, "rank_min_selected": 5}
    # Without the bias of the keys, whose gradient is zero but for rounding, which AdamW blows up to whole steps.
    return SaRA(net, fraction=0.3, lr=1e-2, reselect_at=2, exclude="in_proj_bias", **term | more)


def half(values: Tensor) -> Tensor:
    size = len(values) // 2
    return values[rank() * size : (rank() + 1) * size]


def trained(net: nn.Module, optimizer: Selective) -> Trained:
    return {
        "weights": {name: param.detach().clone() for name, param in net.named_parameters()},
        "index": {name: slot.trained.clone() for name, slot in optimizer.slots.items()},
        "moments": [state["exp_avg"] for state in optimizer.state.values()],
    }


def alone(dtype: torch.dtype, clip: float | None = None) -> Trained:
    net = model(dtype)
    optimizer = sara(net)
    for step in range(STEPS):
        ids, labels = data(step)
        nn.functional.cross_entropy(net(ids), labels).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(optimizer.trainable(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return trained(net, optimizer)


def wrapped(dtype: torch.dtype, parts: int = 1, clip: float | None = None) -> Trained:
    """Within DistributedDataParallel, each rank's half in `parts` of an accumulation."""
    net = model(dtype)
    if rank():  # rank 0's weights count
        with torch.no_grad():
            net.head.weight.add_(1)
    optimizer = sara(net)
    outer = DistributedDataParallel(net)
    for step in range(STEPS):
        ids, labels = map(half, data(step))
        for number in range(parts):
            last = number == parts - 1
            with contextlib.nullcontext() if last else outer.no_sync():
                size = len(ids) // parts
                some = slice(number * size, (number + 1) * size)
                (nn.functional.cross_entropy(outer(ids[some]), labels[some]) / parts).backward()
                if not last:
                    assert not optimizer.averaging.done or step == 0
        assert optimizer.averaging.done
        if clip is not None:
            nn.utils.clip_grad_norm_(optimizer.trainable(), clip)
        optimizer.step()
        optimizer.zero_grad()
    found = trained(net, optimizer)
    found["bucketed"] = outer._get_ddp_logging_data()["total_parameter_size_bytes"]
    found["dense"] = sum(param.grad.numel() for param in net.parameters() if param.grad is not None)
    optimizer.close()
    found["closed"] = hasattr(net, "_ddp_params_and_buffers_to_ignore")
    return found


def bare() -> Trained:
    """Without DistributedDataParallel, in a hand-made accumulation of unequal numbers of passes."""
    net = model(torch.float64)
    optimizer = sara(net)
    for step in range(STEPS):
        ids, labels = map(half, data(step))
        sizes = [1, 3] if rank() else [4]
        with optimizer.no_sync():
            for ids_of, labels_of in zip(ids.split(sizes), labels.split(sizes), strict=True):
                loss = nn.functional.cross_entropy(net(ids_of), labels_of, reduction="sum") / len(ids)
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained(net, optimizer)


def with_accelerate(clip: float) -> Trained:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = model(torch.float64)
    outer, optimizer = accelerator.prepare(net, sara(net))
    for step in range(STEPS):
        ids, labels = map(half, data(step))
        for some in (slice(0, 2), slice(2, 4)):
            with accelerator.accumulate(outer):
                accelerator.backward(nn.functional.cross_entropy(outer(ids[some]), labels[some]))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(optimizer.optimizer.trainable(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return trained(net, optimizer.optimizer)


def by_batches(part: Any, kind: Any = SHiRA) -> Selective:
    """A choice by gradients on batches of which each rank has a part."""
    batches = [tuple(map(part, data(step))) for step in range(2)]
    more: dict[str, Any] = {"density": 0.1} if kind is SHiRA else {"fraction": 0.1, "dense_steps": 2}
    return kind(
        model(torch.float64), batches=batches, exclude="in_proj",
        loss=lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1]), **more,
    )  # fmt: skip


def told(action: Any) -> str:
    try:
        action()
    except (ModelError, ConfigError) as error:
        return str(error)
    return "nothing"


def on_a_rank() -> Trained:
    found: Trained = {
        "float32": wrapped(torch.float32),
        "float64": wrapped(torch.float64, parts=2, clip=0.1),
        "bare": bare(),
        "accelerate": with_accelerate(0.1),
        "shira": {name: slot.index for name, slot in by_batches(half).slots.items()},
        "lt-sft": {name: slot.index for name, slot in by_batches(half, LTSFT).slots.items()},
        "wrapped": told(lambda: sara(DistributedDataParallel(model()))),
        "amounts": told(lambda: SaRA(model(), fraction=0.1 * (rank() + 1), lr=1e-3)),
        "in_backward": told(lambda: Selective(model(), smallest, fraction=0.1, in_backward=True)),
    }
    return found


@pytest.fixture(scope="module")
def ranks() -> list[Trained]:
    return run_ranks(on_a_rank)


def assert_same(one: Trained, other: Trained, tolerance: float) -> None:
    for name, index in one["index"].items():
        assert torch.equal(index, other["index"][name]), name
    for name, weight in one["weights"].items():
        torch.testing.assert_close(weight, other["weights"][name], atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("way", "dtype", "clip", "tolerance"),
    [
        ("float32", torch.float32, None, 1e-6),
        ("float64", torch.float64, 0.1, 1e-12),
        ("bare", torch.float64, None, 1e-12),
        ("accelerate", torch.float64, 0.1, 1e-12),
    ],
)
def test_two_ranks_train_as_one_process_on_the_whole_batch(ranks, way, dtype, clip, tolerance):
    whole = alone(dtype, clip)
    moved = model(dtype)
    assert max(float((w - dict(moved.named_parameters())[n]).abs().max()) for n, w in whole["weights"].items()) > 1e-2
    for found in ranks:
        assert_same(found[way], whole, tolerance)
    for name, weight in ranks[0][way]["weights"].items():
        assert torch.equal(weight, ranks[1][way]["weights"][name]), "the ranks agree to the last bit"


def test_no_dense_gradient_lies_in_the_buckets_nor_stays_behind(ranks):
    smallest = min(param.numel() for param in model().parameters())
    for found in ranks:
        assert found["float32"]["bucketed"] == 4 * smallest, "all but one tiny weight are on the ignore list"
        assert found["float32"]["dense"] <= smallest
        assert not found["float32"]["closed"], "close() takes the marks away"


@pytest.mark.parametrize(("name", "kind"), [("shira", SHiRA), ("lt-sft", LTSFT)])
def test_a_choice_by_gradients_sees_the_batches_of_all_ranks(ranks, name, kind):
    alone = by_batches(lambda values: values, kind)
    for found in ranks:
        for weight, slot in alone.slots.items():
            assert torch.equal(found[name][weight], slot.index), weight


def test_what_cannot_be_trained_alike_is_refused_on_every_rank(ranks):
    for found in ranks:
        assert "make the optimizer for the module inside first" in found["wrapped"]
        assert "rank 1 trains other entries than rank 0" in found["amounts"]
        assert "in_backward=True uses each gradient before the 2 processes" in found["in_backward"]
