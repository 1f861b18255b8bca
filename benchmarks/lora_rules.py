"""Time of a step by the rules for LoRA, on 24 linear layers of 768 x 768 at rank 8 with 256 tokens.

    python benchmarks/lora_rules.py --out benchmarks/results/lora-rules-epyc-1-thread.json

`pass`: forward and backward; `step`: the optimizer's part. Medians over the rounds, the ways in turn, of processor
time on a CPU. "one by one" is the same rule with each layer handled by itself, what batching saves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fallow
from fallow.optim.paired import PairedOptimizer
from fallow.optim.pairs import Stack

LAYERS, WIDTH, RANK, TOKENS = 24, 768, 8, 256


def one_by_one(optimizer: PairedOptimizer) -> PairedOptimizer:
    for arranged in optimizer.arranged:
        arranged.stacks = [Stack([pair]) for stack in arranged.stacks for pair in stack.pairs]
    return optimizer


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-4)


def followed(follow: Callable[..., Any], **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = adamw(model)
        follow(model, optimizer, **options)
        return optimizer

    return make


WAYS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": adamw,
    "LoRA+": lambda model: fallow.LoRAPlus(model),
    "Riemannian": lambda model: fallow.Riemannian(model),
    "LoRA-Pro efficient": lambda model: fallow.LoRAPro(model, mode="efficient"),
    "LoRA-Pro efficient, one by one": lambda model: one_by_one(fallow.LoRAPro(model, mode="efficient")),
    "LoRA-Pro full": lambda model: fallow.LoRAPro(model),
    "LoRA-Pro full, one by one": lambda model: one_by_one(fallow.LoRAPro(model)),
    "LoRA-Pro full, factored": lambda model: fallow.LoRAPro(model, factored=True),
    "ALLoRA on updates": followed(fallow.ALLoRA, where="update"),
    "GGPO": followed(fallow.GGPO),
    "MGPO": followed(fallow.GGPO, mode="mgpo"),
    "MGPO in weights": followed(fallow.GGPO, mode="mgpo", space="weight"),
    "AdamW on all weights": adamw,
}


class Way:
    def __init__(self, name: str, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))).to(device)
        if "all weights" not in name:
            fallow.attach(self.model, "lora", rank=RANK)
        self.optimizer = WAYS[name](self.model)
        self.x = torch.randn(TOKENS, WIDTH, device=device)

    def step(self) -> tuple[float, float]:
        begun = self.now()
        self.model(self.x).square().mean().backward()
        passed = self.now()
        self.optimizer.step()
        done = self.now()
        self.optimizer.zero_grad()
        return passed - begun, done - passed

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    ways = {name: Way(name, given.device) for name in WAYS}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for number in range(given.rounds + 2):
        for name, way in ways.items():
            found = way.step()
            if number >= 2:
                taken[name].append(found)
    figures = {
        name: {key: statistics.median(times[i] for times in taken[name]) for i, key in enumerate(("pass", "step"))}
        for name in WAYS
    }
    for name, found in figures.items():
        print(f"{name:32}" + "".join(f"{key} {1e3 * value:8.1f} ms   " for key, value in found.items()))
    if given.out:
        told = {"device": given.device, "torch": torch.__version__, "threads": torch.get_num_threads()}
        told |= {"layers": LAYERS, "width": WIDTH, "rank": RANK, "tokens": TOKENS, "ways": figures}
        given.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
