"""SMoRA against LoRA at the same active rank, and at all its ranks, on four tasks at once; and what the balance does.

python benchmarks/claims/smora.py --seeds 3

Digits turned by 0, 90, 180 and 270 degrees; each turn has its own permutation of the labels, so the tasks conflict. The
network (64-64-64-10) knows the first. `accuracy` is the mean test accuracy of the four; `dead` the share of ranks that
no token of the test chooses, `load` the most chosen rank's share over the mean's, both averaged over three layers.
Rates are chosen on held-out digits.
"""

from __future__ import annotations

import copy
import statistics
from functools import lru_cache

import torch
from protocol import accuracy, arguments, digits, learn, table
from torch import Tensor, nn

import fallow
from fallow.deltas.smora import SMoRA

STEPS, LRS = 800, (1e-3, 3e-3, 1e-2, 3e-2)
CONTENDERS = {
    "LoRA r=4": ("lora", {"rank": 4, "alpha": 16.0}),
    "LoRA r=8": ("lora", {"rank": 8, "alpha": 16.0}),
    "LoRA r=32": ("lora", {"rank": 32, "alpha": 16.0}),
    "SMoRA 4 of 32": ("smora", {"rank": 32, "active": 4}),
    "SMoRA 4 of 32, u=0": ("smora", {"rank": 32, "active": 4, "balance": 0.0}),
    "SMoRA 8 of 32": ("smora", {"rank": 32, "active": 8}),
}


def tasks(part: tuple[Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """The four tasks' images (4 N, 64) and labels, those of one picture side by side."""
    images, labels, generator = [], [], torch.Generator().manual_seed(seed)
    for turns in range(4):
        names = torch.randperm(10, generator=generator) if turns else torch.arange(10)
        images.append(part[0].view(-1, 8, 8).rot90(turns, (1, 2)).flatten(1))
        labels.append(names[part[1]])
    return torch.stack(images, 1).flatten(0, 1), torch.stack(labels, 1).flatten()


@lru_cache
def base(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    learn(model, model.parameters(), 1e-3, digits("turned", seed).source["train"], 1000, 64, seed)
    return model


def run(label: str, lr: float, seed: int, sweep: bool) -> dict[str, float]:
    method, options = CONTENDERS[label]
    test = "held out" if sweep else "test"
    data = digits("turned", seed).source
    model = copy.deepcopy(base(seed))
    torch.manual_seed(seed + 1)
    patterns = {"4": {"rank": 10}} if method == "lora" and options["rank"] > 10 else None  # the last layer has no more
    fallow.attach(model, method, "all-linear", seed=seed, patterns=patterns, **options)
    params = [param for param in model.parameters() if param.requires_grad]
    learn(model, params, lr, tasks(data["train"], seed), STEPS, 128, seed + 2)
    shown = tasks(data[test], seed)
    figures = {"accuracy": accuracy(model, shown), "trained": float(sum(param.numel() for param in params))}
    figures.update(dead=0.0, load=1.0)  # of LoRA, whose ranks serve every token
    deltas = [delta for delta in model.modules() if isinstance(delta, SMoRA)]
    for delta in deltas:
        delta.used.zero_()
        delta.train()
    if deltas:  # tokens are counted in the backward
        model(shown[0].requires_grad_()).sum().backward()
        figures["dead"] = statistics.fmean(float((delta.used == 0).float().mean()) for delta in deltas)
        figures["load"] = statistics.fmean(float(delta.used.max() / delta.used.float().mean()) for delta in deltas)
    return figures


if __name__ == "__main__":
    described = {
        label: {"method": method, "options": options, "lrs": LRS} for label, (method, options) in CONTENDERS.items()
    }
    setting = {"net": "64-64-64-10", "tasks": 4, "steps": STEPS, "batch": 128}
    table("smora", described, run, "accuracy", arguments(__doc__, 3).seeds, {"setting": setting})
