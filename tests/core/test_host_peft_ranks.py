"""Weight parameterizations in PEFT's host on two processes: DistributedDataParallel, and sharded by FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import fallow
from fallow.core.distributed import rank
from fallow.core.errors import ModelError, TrainingError
from fallow.core.sharded import whole

STEPS, BATCH = 3, 8
CONFIGS = {  # added, with tensors that layers share, in the weight's place, steps and a buffer that follows them
    "lora": lambda: fallow.LoRAConfig(rank=2, target_modules=TARGETS),
    "mos": lambda: fallow.MoSConfig(rank=3, equivalent_rank=2, shards=1, dropout=0.0, target_modules=TARGETS),
    "dora": lambda: fallow.DoRAConfig(rank=2, target_modules=TARGETS),
    "dylora": lambda: fallow.DyLoRAConfig(rank=3, strict=False, target_modules=TARGETS),
}
TARGETS = ["blocks.0", "blocks.1", "head"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(nn.Linear(9, 9) for _ in range(2))
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def adapted(method: str) -> PeftModel:
    net = Net()
    torch.manual_seed(2)
    return get_peft_model(net, CONFIGS[method]())


def half(values: Tensor) -> Tensor:
    return values[rank() * BATCH // 2 : (rank() + 1) * BATCH // 2]


def train(net: nn.Module, part: Any = lambda x: x) -> list[float]:
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 0.02)
    losses = []
    for step in range(STEPS):
        chance = torch.Generator().manual_seed(step)
        x, wanted = torch.randn(BATCH, 9, generator=chance), torch.randn(BATCH, 5, generator=chance)
        loss = nn.functional.mse_loss(net(part(x)), part(wanted))
        loss.backward()
        optimizer.step()
        fallow.step(net)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(net: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p).clone() for name, p in net.named_parameters() if p.requires_grad}


def sharded(model: PeftModel) -> PeftModel:
    inner = model.get_base_model()
    for block in inner.blocks:
        fully_shard(block)
    return fully_shard(model)


def on_a_rank(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method in CONFIGS:
        ddp = nn.parallel.DistributedDataParallel(adapted(method))
        found[f"{method} ddp losses"], found[f"{method} ddp"] = train(ddp, half), trained(ddp)
        net = sharded(adapted(method))
        found[f"{method} fsdp losses"], found[f"{method} fsdp"] = train(net, half), trained(net)
        found[f"{method} is sharded"] = all(hasattr(p, "placements") for p in net.parameters())
        try:
            net.save_pretrained(folder / f"{method}-{rank()}")
        except ModelError as error:
            found[f"{method} told"] = str(error)
        full = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
        if rank() == 0:  # the others have none
            net.save_pretrained(folder / method, state_dict=full)
        with net.disable_adapter(), torch.no_grad():
            found[f"{method} base"] = net(torch.ones(2, 9))
    lacking = sharded(get_peft_model(Net(), fallow.LoRAConfig(rank=2, target_modules=TARGETS)))
    inner = lacking.get_base_model()
    lacking.get_base_model().blocks[1].register_forward_hook(lambda module, args, out: out.detach())
    lacking(torch.ones(2, 9)).sum().backward()
    try:
        torch.optim.SGD(lacking.parameters(), 0.1).step()
    except TrainingError as error:
        found["told"] = str(error)
    del inner
    return found


def _rank(number: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
    torch.save(on_a_rank(folder), folder / f"{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks_found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    # Forked: a new interpreter would import PEFT anew, which takes longer than all of this file.
    torch.multiprocessing.start_processes(_rank, (folder,), nprocs=2, start_method="fork")
    return folder, [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(2)]


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", CONFIGS)
def test_two_processes_train_as_one_does_with_the_whole_batch(ranks_found, method: str, way: str):
    _, found = ranks_found
    alone = adapted(method)
    began = trained(alone)
    losses = train(alone)
    assert not all(torch.equal(value, began[name]) for name, value in trained(alone).items())
    for name, value in trained(alone).items():
        for one in found:
            torch.testing.assert_close(one[f"{method} {way}"][name], value, rtol=1e-4, atol=1e-6)
    both = [sum(pair) / 2 for pair in zip(*(one[f"{method} {way} losses"] for one in found), strict=True)]
    torch.testing.assert_close(both, losses, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_sharded_model_is_saved_whole_and_shows_its_base(ranks_found, method: str):
    folder, found = ranks_found
    assert found[0][f"{method} is sharded"]
    with torch.no_grad():
        torch.testing.assert_close(found[0][f"{method} base"], Net()(torch.ones(2, 9)))
    again = PeftModel.from_pretrained(Net(), folder / method, is_trainable=True)
    for name, value in trained(again).items():
        assert torch.equal(value, found[0][f"{method} fsdp"][name]), name
    assert "give it the whole tensors, save_pretrained(..., state_dict=" in found[1][f"{method} told"]
    assert not (folder / f"{method}-0" / "adapter_model.safetensors").exists()


def test_gradients_are_looked_for_in_sharded_models_too(ranks_found):
    _, found = ranks_found
    assert "2 of 3 adapted weights received no gradient: 'blocks.0', 'blocks.1'" in found[1]["told"]
