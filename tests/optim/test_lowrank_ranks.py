"""Two processes with whole weights (DDP) or slices of them (FSDP2) take the steps of one on the whole batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fallow.core.distributed import rank
from fallow.core.errors import ConfigError
from fallow.core.sharded import whole
from fallow.optim.lowrank import LowRank
from ranks import run_ranks

STEPS, BATCH = 5, 8
AGAIN = ("warm", "blocks", "small")  # those that run within DistributedDataParallel too, and are resumed
KINDS: dict[str, dict[str, Any]] = {
    "warm": {"residual": "fira", "moments": "rotate"},
    "svd": {"basis": "gram", "scale": 0.5, "weight_decay": 0.1},
    "matrix": {"basis": "gram", "residual": {"name": "fira", "level": "matrix"}},
    "dct": {"basis": "dct", "residual": "feedback", "refresh_every": 1, "moments": "rotate"},
    "apollo": {"basis": "gaussian", "residual": "apollo"},
    "mini": {"basis": "gaussian", "rank": 1, "residual": {"name": "apollo", "level": "tensor"}},
    "columns": {"basis": "coordinates", "residual": "sign", "inner": "lion"},
    "blocks": {"basis": "block", "rank": 0.5, "residual": "sgd", "moments": "reset"},
    "small": {"basis": "gram", "state_dtype": "8bit"},
}


def model() -> nn.Sequential:
    """Rows that two ranks cannot share equally; no matrix wider than high, whose projected side would change."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 15), nn.LayerNorm(15), nn.Linear(15, 15)).double()


def data(step: int) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 6, generator=chance).double(), torch.randn(BATCH, 15, generator=chance).double()


def half(values: Tensor) -> Tensor:
    return values[rank() * BATCH // 2 : (rank() + 1) * BATCH // 2]


def made(net: nn.Module, **options: Any) -> LowRank:
    return LowRank(net.named_parameters(), 1e-2, **{"rank": 3, "refresh_every": 3, "side": "right", **options})


def walk(net: nn.Module, optimizer: LowRank, steps: range, part: Any = lambda x: x) -> None:
    for step in steps:
        inputs, wanted = map(part, data(step))
        nn.functional.mse_loss(net(inputs), wanted).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(param).clone() for name, param in net.named_parameters()}


def sharded() -> nn.Sequential:
    net = model()
    fully_shard(net[0])
    fully_shard(net[2])
    return fully_shard(net)


def through_torchs_checkpoints() -> dict[str, dict[str, Tensor]]:
    """Weights of a run, and of one that goes on from what torch.distributed.checkpoint makes of its states."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    net, other = sharded(), sharded()
    own, resumed = made(net, residual="fira"), made(other, residual="fira")
    walk(net, own, range(3), half)
    saved = copy.deepcopy(get_optimizer_state_dict(net, own))
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    set_optimizer_state_dict(other, resumed, saved)
    for one, optimizer in ((net, own), (other, resumed)):
        walk(one, optimizer, range(3, STEPS), half)
    return {"run": weights(net), "resumed": weights(other)}


def on_a_rank() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, options in KINDS.items():
        if kind in AGAIN:
            net = DistributedDataParallel(model())
            walk(net, made(net, **options), range(STEPS), half)
            found[f"ddp {kind}"] = weights(net)
        net = sharded()
        own = made(net, **options)
        walk(net, own, range(4), half)
        saved, values = own.state_dict(), copy.deepcopy(net.state_dict())
        state = {
            str(at): {key: whole(value).clone() for key, value in held.items() if isinstance(value, Tensor)}
            for at, held in saved["state"].items()
        }
        saved = copy.deepcopy(saved)
        walk(net, own, range(4, STEPS), half)
        found[f"fsdp {kind}"], found[f"state {kind}"] = weights(net), state
        if kind not in AGAIN:
            continue
        other = sharded()
        other.load_state_dict(values)
        resumed = made(other, **options)
        resumed.load_state_dict(saved)
        walk(other, resumed, range(4, STEPS), half)
        found[f"resumed {kind}"] = weights(other)
    found["checkpoint"] = through_torchs_checkpoints()
    net = sharded()
    hooked = made(net, residual="fira", mode="in_backward")
    walk(net, hooked, range(STEPS), half)
    found["hooked"] = weights(net)
    try:
        net = DistributedDataParallel(model())
        walk(net, made(net, mode="in_backward"), range(1), half)
    except ConfigError as error:
        found["refused"] = str(error)
    for what, options in (
        ("basis", {"basis": "two-sided"}), ("inner", {"inner": "polar"}), ("side", {"side": "left"}),
        ("sums", {"inner": "adafactor"}), ("plain", {"plain_inner": "adafactor"}),
    ):  # fmt: skip
        try:
            made(sharded(), **options).sites()
        except ConfigError as error:
            found[f"refused {what}"] = str(error)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(on_a_rank)


def alone(options: dict[str, Any], steps: int = STEPS) -> tuple[nn.Module, LowRank]:
    net = model()
    own = made(net, **options)
    walk(net, own, range(steps))
    return net, own


@pytest.mark.parametrize(
    ("kind", "way"), [(kind, "fsdp") for kind in KINDS] + [(kind, way) for kind in AGAIN for way in ("ddp", "resumed")]
)
def test_two_ranks_take_the_steps_of_one(ranks, kind, way):
    wanted = weights(alone(KINDS[kind])[0])
    for found in ranks:
        for name, weight in wanted.items():
            torch.testing.assert_close(found[f"{way} {kind}"][name], weight, rtol=0, atol=1e-8, msg=f"{kind} {name}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_states_of_slices_are_saved_as_those_of_the_whole(ranks, kind):
    own = alone(KINDS[kind], 4)[1].state_dict()["state"]
    for found in ranks:
        for at, held in own.items():
            for key, value in held.items():
                if isinstance(value, Tensor):
                    torch.testing.assert_close(found[f"state {kind}"][str(at)][key], value, rtol=0, atol=1e-8)


def test_the_update_in_the_backward_pass_works_on_slices_and_is_refused_with_ddp(ranks):
    wanted = weights(alone({"residual": "fira"})[0])
    for found in ranks:
        for name, weight in wanted.items():
            torch.testing.assert_close(found["hooked"][name], weight, rtol=0, atol=1e-8)
        assert "before the 2 processes could take its mean" in found["refused"]


def test_torchs_checkpoints_of_slices_resume_bit_for_bit(ranks):
    for found in ranks:
        run, resumed = found["checkpoint"]["run"], found["checkpoint"]["resumed"]
        assert all(torch.equal(weight, resumed[name]) for name, weight in run.items())


def test_what_needs_whole_gradients_is_refused_on_slices(ranks):
    for found in ranks:
        assert "basis='two-sided' needs whole gradients" in found["refused basis"]
        assert "inner='polar' needs whole gradients" in found["refused inner"]
        assert "inner='adafactor' needs whole gradients" in found["refused sums"]
        assert "inner='adafactor' needs whole gradients" in found["refused plain"]
        assert "side='left' projects the side of" in found["refused side"]
