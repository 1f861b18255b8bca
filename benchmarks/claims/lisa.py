"""LISA against full fine-tuning, the head alone, and LoRA of as many states, from digits 0 to 4 to digits 5 to 9.

python benchmarks/claims/lisa.py --seeds 3

A residual network (64 wide, 8 blocks of LayerNorm, Linear 64-128, ReLU, Linear 128-64) learns digits 0 to 4 for 300
steps and is tuned on 5 to 9 for 120. `states`: the most numbers that the optimizer's moments held. Each at its own
best rate; then the first five at 3e-4.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import lru_cache

import torch
from protocol import SWEEP_SEEDS, accuracy, arguments, digits, table
from torch import Tensor, nn

import fallow

WIDTH, BLOCKS, STEPS, INTERVAL = 64, 8, 120, 10
LRS = (3e-4, 1e-3, 3e-3, 1e-2)
Data = tuple[Tensor, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def part(data: Data, low: bool) -> Data:
    keep = (data[1] < 5) == low
    return data[0][keep], data[1][keep]


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, steps: int, seed: int) -> tuple[float, int]:
    """The mean loss of the last ten steps, and the most numbers that the moments held."""
    generator, losses, most = torch.Generator().manual_seed(seed), [], 0
    for _ in range(steps):
        chosen = torch.randint(len(data[0]), (64,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data[0][chosen]), data[1][chosen])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        held = (value for state in optimizer.state.values() for key, value in state.items() if key != "step")
        most = max(most, sum(value.numel() for value in held))
    return sum(losses[-10:]) / 10, most


@lru_cache
def pretrained(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model, data = Residual(), part(digits("turned", seed).source["train"], True)
    learn(model, torch.optim.Adam(model.parameters(), 1e-3), data, 300, seed)
    return model


Make = Callable[[nn.Module, float, int], torch.optim.Optimizer]


def over_all(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=lr, weight_decay=0.0)


def lisa(**options: object) -> Make:
    def make(model: nn.Module, lr: float, seed: int) -> torch.optim.Optimizer:
        optimizer = over_all(model, lr)
        fallow.LISA(model, optimizer, interval=INTERVAL, seed=seed, **options)
        return optimizer

    return make


def full(model: nn.Module, lr: float, seed: int) -> torch.optim.Optimizer:
    return over_all(model, lr)


def ends_only(model: nn.Module, lr: float, seed: int) -> torch.optim.Optimizer:
    model.blocks.requires_grad_(False)
    return over_all(model, lr)


def lora(model: nn.Module, lr: float, seed: int) -> torch.optim.Optimizer:
    """Rank 11 in the blocks, and the rest as LISA has it: 38,730 numbers in training, LISA's with two blocks 38,346."""
    fallow.attach(model, "lora", ["up", "down"], rank=11)
    for module in (model.embed, model.norm, model.head):
        module.requires_grad_(True)
    return over_all(model, lr)


CONTENDERS: dict[str, Make] = {
    "full fine-tuning": full,
    "LISA 2": lisa(active=2),
    "LISA 2, states kept": lisa(active=2, state="keep"),
    "LISA 1": lisa(active=1),
    "embedding and head": ends_only,
    "LISA 2, cyclic": lisa(active=2, order="cyclic"),
    "LoRA r=11 and the ends": lora,
}


def run(make: Make, lr: float, seed: int) -> dict[str, float]:
    torch.set_num_threads(1)
    data, model = digits("turned", seed).source, copy.deepcopy(pretrained(seed))
    torch.manual_seed(seed + 1)
    optimizer = make(model, lr, seed)
    start = time.process_time()
    loss, states = learn(model, optimizer, part(data["train"], False), STEPS, seed + 2)
    return {
        "target": accuracy(model, part(data["test"], False)),
        "held_out": accuracy(model, part(data["held out"], False)),
        "loss": loss,
        "states": float(states),
        "seconds": time.process_time() - start,
    }


if __name__ == "__main__":
    told = {label: {"lrs": LRS} for label in CONTENDERS}
    told |= {f"{label} at 0.0003": {"lrs": (3e-4,)} for label in list(CONTENDERS)[:5]}
    table(
        "lisa", told, lambda label, lr, seed, sweep: run(CONTENDERS[label.removesuffix(" at 0.0003")], lr, seed),
        "held_out", arguments(__doc__, 3).seeds,
        {"setting": {"steps": STEPS, "interval": INTERVAL, "blocks": BLOCKS, "sweep_seeds": SWEEP_SEEDS}},
    )  # fmt: skip
