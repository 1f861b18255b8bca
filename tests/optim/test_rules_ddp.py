"""LISA and the rules for LoRA in two processes of DistributedDataParallel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fallow
from fallow.core.distributed import rank
from fallow.core.errors import ConfigError
from fallow.optim.pairs import find_pairs
from ranks import run_ranks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(6)]


def train(run: nn.Module, optimizer: torch.optim.Optimizer, part: slice) -> None:
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(x[part]), y[part]).backward()
        optimizer.step()


def made(name: str) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model: nn.Module = Net()
    if name == "LISA":
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, fallow.LISA(model, active=1, interval=2)
    fallow.attach(model, "lora", ["0", "1", "2", "3"], rank=2)
    for pair in find_pairs(model, "test"):  # not zero, whose inverse would magnify the rounding of the first step
        pair.b.data = torch.randn(pair.b.shape, generator=torch.Generator().manual_seed(3))
    if name == "LoRAPro":
        return model, fallow.LoRAPro(model, lr=1e-2), None
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    follow = fallow.ALLoRA(model) if name == "ALLoRA" else fallow.GGPO(model, mode="mgpo", rho=0.1)
    return model, optimizer, follow


def together(name: str) -> list[dict[str, Tensor]]:
    """What each rank ends with, and what one process ends with on both halves of each batch."""
    model, optimizer, follow = made(name)
    run = DistributedDataParallel(model, find_unused_parameters=name == "LISA")
    if follow is not None:
        follow.bind(optimizer)
    train(run, optimizer, slice(4 * rank(), 4 * rank() + 4))
    ended = {key: value.clone() for key, value in model.state_dict().items()}
    model, optimizer, follow = made(name)
    if follow is not None and name != "MGPO":
        follow.bind(optimizer)
    train(model, optimizer, slice(0, 8))
    return [ended, {key: value.detach().clone() for key, value in model.state_dict().items()}]


NAMES = ("LISA", "LoRAPro", "ALLoRA", "MGPO")


def all_together() -> tuple[dict[str, list[dict[str, Tensor]]], str]:
    """Of all rules, and what is said to a DDP that waits for the gradients of all parameters."""
    model, said = Net(), ""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        fallow.LISA(DistributedDataParallel(model), optimizer)
    except ConfigError as error:
        said = str(error)
    return {name: together(name) for name in NAMES}, said


def test_two_processes_train_as_one_on_both_halves_of_the_batch():
    (found, said), (others, _) = run_ranks(all_together)
    for name in NAMES:
        (ended, alone), (elsewhere, _) = found[name], others[name]
        for key, value in ended.items():
            assert torch.equal(value, elsewhere[key]), (name, key)
            if name != "MGPO":  # whose length follows the norms of each process's own gradients
                torch.testing.assert_close(value, alone[key], rtol=1e-3, atol=1e-4)
    assert "find_unused_parameters=True" in said
