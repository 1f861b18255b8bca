"""Budgets that change ranks in two processes of DistributedDataParallel: the same decisions, the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fallow
from fallow.budgets.adalora import AdaLoRARanks
from fallow.budgets.growing import growing
from fallow.budgets.increlora import IncreLoRA
from fallow.budgets.pruning import pruning
from fallow.core.distributed import rank
from fallow.core.errors import ConfigError
from ranks import run_ranks

BUDGETS = {
    "increlora": lambda: IncreLoRA(top=1, begin=4, every=2, warmup=3),
    "adalora": lambda: AdaLoRARanks(begin=5, end=18),
}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 8))


def ranks_of(model: nn.Module, budget: str) -> list[int]:
    if budget == "increlora":
        return [part.rank for part in growing(model).parts]
    return [int(delta.gate.count_nonzero()) for delta in pruning(model).parts.values()]


def trained(budget: str) -> tuple[list[list[int]], list[Tensor]]:
    """The ranks after each step, and the Parameters in the end, of a process with its half of the batch."""
    model = fallow.attach(network(), "adalora", rank=4, budget=BUDGETS[budget]())
    run = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(2))
    mine = x[16 * rank() : 16 * rank() + 16]
    seen = []
    for _ in range(20):
        optimizer.zero_grad()
        (run(mine) - mine.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        fallow.step(run)
        seen.append(ranks_of(model, budget))
    return seen, [param.detach().clone() for param in model.parameters()]


def searched() -> dict[str, float]:
    """The gates of a search in which each process has batches of its own."""
    model = network()
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(5 + rank()))
    torch.manual_seed(7 + rank())  # which draws other factors, too
    halves = [[half] for half in x.chunk(2)]

    def wrong(net: nn.Module, batch: Tensor) -> Tensor:
        return (net(batch) - batch.sum(1, keepdim=True)).square().mean()

    return fallow.search_modules(model, *halves, loss=wrong, steps=10, rank=2).gates


def both() -> dict[str, Any]:
    told: dict[str, Any] = {budget: trained(budget) for budget in BUDGETS}
    told["gates"] = searched()
    try:
        fallow.attach(network(), "lora", rank=3, budget=BUDGETS["increlora"]())
    except ConfigError as error:
        told["refused"] = str(error)
    return told


def test_two_processes_take_the_same_decisions_and_stay_equal() -> None:
    first, second = run_ranks(both)
    for budget in BUDGETS:
        assert first[budget][0] == second[budget][0]
        assert sum(first[budget][0][-1]) == 12
        assert len({tuple(ranks) for ranks in first[budget][0]}) > 3
        assert all(torch.equal(a, b) for a, b in zip(first[budget][1], second[budget][1], strict=True))
    assert first["gates"] == second["gates"]
    assert len(set(first["gates"].values())) == 3
    assert "several processes cannot train" in first["refused"]
    assert "'adalora'" in first["refused"]
