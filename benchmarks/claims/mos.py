"""MoS's claim: a pool that all layers share beats LoRA of as many trained numbers.

Eight residual blocks of width 64, trained on digits, learn them turned four ways, each with its labels permuted anew.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from protocol import arguments, digits, table
from torch import Tensor, nn

import fallow

BLOCKS, WIDTH, STEPS, LRS = 8, 64, 800, (5e-3, 1e-2, 2e-2, 4e-2)
Pool = tuple[Tensor, Tensor]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(WIDTH, WIDTH)}) for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.relu(block["fc"](x))
        logits: Tensor = self.head(x)
        return logits


def learn(model: nn.Module, params: Iterator[nn.Parameter], lr: float, data: Pool, steps: int, seed: int) -> None:
    optimizer, (x, y) = torch.optim.Adam(params, lr=lr), data
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(x), (128,), generator=generator)
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()


@lru_cache
def pretrained(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = Residual()
    learn(model, model.parameters(), 1e-3, digits("turned", seed).source["train"], 600, seed)
    return model


@lru_cache
def turned(part: str, seed: int) -> Pool:
    """Four turns; which is which shows in the corner pixel, since each has its own labels."""
    x, y = digits("turned", seed).source[part]
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = [], []
    for turns in range(4):
        images = x.view(-1, 8, 8).rot90(turns, (1, 2)).clone()
        images[:, 0, 0] = turns / 3
        inputs.append(images.flatten(1))
        labels.append(torch.randperm(10, generator=generator)[y])
    return torch.cat(inputs), torch.cat(labels)


def run(contender: dict[str, Any], lr: float, seed: int, sweep: bool) -> dict[str, float]:
    model = copy.deepcopy(pretrained(seed))
    torch.manual_seed(seed + 1)
    fallow.attach(model, contender["method"], ["fc"], seed=seed, expect_gradients=False, **contender["options"])
    params = [param for param in model.parameters() if param.requires_grad]
    start = time.process_time()
    learn(model, iter(params), lr, turned("train", seed), STEPS, seed + 2)
    seconds = time.process_time() - start
    x, y = turned("held out" if sweep else "test", seed)
    with torch.no_grad():
        right = float((model(x).argmax(1) == y).float().mean())
    return {"target": right, "trained": sum(param.numel() for param in params), "seconds": seconds}


if __name__ == "__main__":
    mos = {"equivalent_rank": 2, "alpha": 8.0, "dropout": 0.0}
    contenders: dict[str, dict[str, Any]] = {
        "all 16 in every layer": {"method": "mos", "options": {**mos, "rank": 16, "shards": 1, "private_rank": 0}},
        "LoRA r=2": {"method": "lora", "options": {"rank": 2, "alpha": 8.0}},
        "MoS r=8, l=1, p=0": {"method": "mos", "options": {**mos, "rank": 8, "shards": 1, "private_rank": 0}},
        "MoS r=8, l=4, p=0": {"method": "mos", "options": {**mos, "rank": 8, "shards": 4, "private_rank": 0}},
        "MoS r=8, l=4, p=1": {"method": "mos", "options": {**mos, "rank": 8, "shards": 4, "private_rank": 1}},
        "LoRA r=8": {"method": "lora", "options": {"rank": 8, "alpha": 8.0}},
    }
    described = {label: {**contender, "lrs": LRS} for label, contender in contenders.items()}
    table(
        "mos", described, lambda label, lr, seed, sweep: run(contenders[label], lr, seed, sweep), "target",
        arguments(__doc__, seeds=3).seeds,
        {"note": "the first has all 16 vectors of the pool in every layer, those of A and of B paired by chance"},
    )  # fmt: skip
