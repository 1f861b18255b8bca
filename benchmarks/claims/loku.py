"""Forgetting one digit: inverted hinge, gradient difference and gradient ascent, from three starts.

python benchmarks/claims/loku.py --seeds 5

An MLP 64-128-128-10 that knows all digits is to forget class 3 and to keep the others; rank 4, alpha 8, in all layers,
Adam, 16 images of each kind a step, losses 1 to 1. Figures after 10 and after 60 steps: `forget`, test accuracy on
class 3; `retain`, on the others; `ce`, cross-entropy of class 3. Rates are chosen by retain - forget after 60 steps on
held-out digits. FILA sees 12 batches of 16 of each kind.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from protocol import arguments, digits, pretrained, table
from torch import Tensor, nn

import fallow
from fallow.objectives.unlearning import inverted_hinge, log_likelihood

CLASS, BATCH, STEPS = 3, 16, (10, 60)
LRS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
LOSSES = {"hinge": inverted_hinge, "difference": log_likelihood, "ascent": log_likelihood}
CONTENDERS = [(loss, start) for loss in LOSSES for start in ("zero", "pissa", "fila")]


def draw(data: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    index = torch.randint(len(data[0]), (BATCH,), generator=generator)
    return data[0][index], data[1][index]


def halves(data: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What is to be forgotten, what is to be kept."""
    is_it = data[1] == CLASS
    return (data[0][is_it], data[1][is_it]), (data[0][~is_it], data[1][~is_it])


@torch.no_grad()
def figures(model: nn.Module, data: tuple[Tensor, Tensor], step: int) -> dict[str, float]:
    (x, y), (others, theirs) = halves(data)
    logits = model(x)
    return {
        f"forget {step}": float((logits.argmax(1) == y).float().mean()),
        f"retain {step}": float((model(others).argmax(1) == theirs).float().mean()),
        f"ce {step}": float(nn.functional.cross_entropy(logits, y)),
    }


def run(label: str, lr: float, seed: int, sweep: bool) -> dict[str, float]:
    name, begun = label.split(", ")
    data, model = digits("turned", seed).source, copy.deepcopy(pretrained("mlp", "turned", seed))
    forget, retain = halves(data["train"])
    generator = torch.Generator().manual_seed(seed + 3)
    start: Any = begun
    if begun == "fila":
        seen = [
            fallow.probe(model, [draw(part, generator) for _ in range(12)], {"fisher"}, targets=["0", "2", "4"])
            for part in (forget, retain)
        ]
        start = fallow.FILA(*seen)
    torch.manual_seed(seed + 1)
    fallow.attach(model, "lora", ["0", "2", "4"], rank=4, alpha=8.0, start=start)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    found: dict[str, float] = {}
    measured = data["held out" if sweep else "test"]
    for step in range(1, max(STEPS) + 1):
        x, y = draw(forget, generator)
        loss = LOSSES[name](model(x), y)
        if name != "ascent":
            x, y = draw(retain, generator)
            loss = loss + nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in STEPS:
            found |= figures(model, measured, step)
    return {**found, "score": found["retain 60"] - found["forget 60"]}


if __name__ == "__main__":
    described = {f"{loss}, {start}": {"lrs": LRS} for loss, start in CONTENDERS}
    table("loku", described, run, "score", arguments(__doc__).seeds, {"note": "forget class 3", "batch": BATCH})
