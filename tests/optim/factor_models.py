"""Small networks with LoRAs for the tests of rules that know factor pairs: linear, convolution and embedding, by each
of the three that can hold them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fallow

HOSTS = ("fallow", "fallow in PEFT", "PEFT")
TARGETS = ["embed", "conv", "first", "second"]


class Net(nn.Module):
    """ids (N, 6) -> (N, 4): an embedding, a convolution, and two linear layers of one shape and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(self.embed(x).mT).mT
        return self.head(torch.tanh(self.second(torch.tanh(self.first(h)))).mean(1))


def adapted(host: str, rank: int = 3, alpha: float = 6.0, targets: list[str] | None = None, seed: int = 0) -> nn.Module:
    """Net with LoRAs whose B is not zero; float32. The head is trained too."""
    torch.manual_seed(seed)
    targets, net = targets or TARGETS, Net()
    if host == "fallow":
        model: nn.Module = fallow.attach(net, "lora", targets, rank=rank, alpha=alpha)
    else:
        from peft import LoraConfig, get_peft_model

        config = (
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
            if host == "PEFT"
            else fallow.LoRAConfig(rank=rank, alpha=alpha, target_modules=targets)
        )
        model = get_peft_model(net, config)
    torch.manual_seed(seed + 1)
    for param in model.parameters():
        if param.requires_grad:
            param.data = 0.3 * torch.randn_like(param)
    head = next(module for name, module in model.named_modules() if name.endswith("head"))
    head.requires_grad_(True)
    return model


def batch(seed: int = 0, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(11, (size, 6), generator=generator)
    return x, torch.randint(4, (size,), generator=generator)


def loss_of(model: nn.Module, seed: int = 0, size: int = 16) -> Tensor:
    x, y = batch(seed, size)
    return nn.functional.cross_entropy(model(x), y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range | int) -> list[float]:
    """The losses of steps of one batch each."""
    losses = []
    for step in range(steps) if isinstance(steps, int) else steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        fallow.step(model)
        losses.append(loss.item())
    return losses


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}
