"""Adapters of the host without PEFT, whose layers share a trained tensor, on two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import fallow
from fallow.core.delta import Delta
from fallow.core.distributed import rank
from fallow.core.errors import ModelError
from fallow.core.host.layer import sites
from fallow.core.sharded import whole
from ranks import run_ranks

STEPS, BATCH = 4, 8


class Bank(Delta):
    """D = diag(u) B v aᵀ: all layers share B and a frozen direction a drawn from the seed; u and v are each layer's."""

    name = "host-test-bank"
    supports = ("linear",)

    def setup(self, site: Any) -> None:
        self.share(
            "B", site, lambda: nn.Parameter(0.1 * torch.randn(16, 3, generator=site.generator("B", shared=True)))
        )
        self.share("a", site, lambda: torch.randn(16, generator=site.generator("a", shared=True)))
        self.u = nn.Parameter(torch.ones(site.shape[0]))
        self.v = nn.Parameter(torch.zeros(3))

    def factors(self) -> tuple[Tensor, Tensor]:
        out, inner = self.view.shape
        return ((self.shared("B")[:out] @ self.v) * self.u).unsqueeze(1), self.shared("a")[:inner].unsqueeze(0)


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


def attached(method: Any = Bank, **options: Any) -> Net:
    net = Net()
    fallow.attach(net, method, seed=2, **options)
    return net


def train(net: nn.Module, steps: range, part: Any = lambda x: x, optimizer: Any = None) -> list[float]:
    optimizer = optimizer or torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 0.02)
    losses = []
    for step in steps:
        chance = torch.Generator().manual_seed(step)
        x, wanted = torch.randn(BATCH, 9, generator=chance), torch.randn(BATCH, 5, generator=chance)
        loss = nn.functional.mse_loss(net(part(x)), part(wanted))
        loss.backward()
        optimizer.step()
        fallow.step(net)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def half(values: Tensor) -> Tensor:
    return values[rank() * BATCH // 2 : (rank() + 1) * BATCH // 2]


def trained(net: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p).clone() for name, p in net.named_parameters() if p.requires_grad}


def sharded(net: Net) -> Net:
    for block in net.blocks:
        fully_shard(block)
    return fully_shard(net)


def on_a_rank(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    ddp = nn.parallel.DistributedDataParallel(attached())
    found["ddp losses"], found["ddp"] = train(ddp, range(STEPS), half), trained(ddp)
    fallow.save(ddp, Path(folder) / f"ddp{rank()}.safetensors")  # only the first rank writes
    net = sharded(attached())
    found["fsdp losses"], found["fsdp"] = train(net, range(STEPS), half), trained(net)
    found["is sharded"] = all(hasattr(p, "placements") for p in net.parameters())
    fallow.save(net, Path(folder) / f"fsdp{rank()}.safetensors")
    with fallow.disabled(net), torch.no_grad():
        found["base"] = net(torch.ones(2, 9))
    told = []
    for refused in (
        lambda: fallow.merge(net),
        lambda: fallow.detach(net),
        lambda: fallow.attach(net, "lora", name="late", rank=2),
        lambda: fallow.attach(ddp, "lora", name="late", rank=2),
    ):
        try:
            refused()
        except ModelError as error:
            told.append(str(error))
    found["told"] = told
    return found


@pytest.fixture(scope="module")
def ranks_found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_ranks(on_a_rank, str(folder))


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does_with_the_whole_batch(ranks_found, way):
    folder, found = ranks_found
    net = attached()
    losses = train(net, range(STEPS))
    for name, value in trained(net).items():
        for one in found:
            torch.testing.assert_close(one[way][name], value, rtol=1e-4, atol=1e-6)
    both = [sum(pair) / 2 for pair in zip(*(one[f"{way} losses"] for one in found), strict=True)]
    torch.testing.assert_close(both, losses, rtol=1e-4, atol=1e-6)
    assert any(name.startswith("adapters_shared.default.B") for name in found[0][way])
    assert not (folder / f"{way}1.safetensors").exists()
    again = fallow.load(Net(), folder / f"{way}0.safetensors")
    for name, value in trained(again).items():
        assert torch.equal(value, found[0][way][name])


def test_a_sharded_model_shows_its_base_and_refuses_what_needs_whole_weights(ranks_found):
    _, found = ranks_found
    assert found[0]["is sharded"]
    with torch.no_grad():
        torch.testing.assert_close(found[0]["base"], Net()(torch.ones(2, 9)))
    merge, detach, attach, within = found[0]["told"]
    assert "merge needs whole weights" in merge
    assert "detach needs whole weights" in detach
    assert "is sharded already; attach the adapter first" in attach
    assert "DistributedDataParallel" in within or "inside" in within


def test_a_shared_tensor_lives_once_at_the_root():
    net = attached()
    assert [name for name, _ in net.named_parameters() if name.endswith(".B")] == ["adapters_shared.default.B"]
    assert len(list(sites(net))) == 3
