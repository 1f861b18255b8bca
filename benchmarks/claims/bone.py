"""MiSS and Bat against LoRA at 512 trained numbers on the paper's toy: a curve that a small network must bend.

python benchmarks/claims/bone.py --seeds 5

An MLP 1-64-64-64-1 fits sin(2 pi x) (50 points, noise 0.05), then adapts its two 64 x 64 layers to
sin(2 pi x) + 0.3 cos(3 pi x) in 100 steps. `train` and `valid` are the errors at each contender's own rate, chosen by
training error on two other seeds; `step_10`, `step_100` the training errors at the paper's rate of 1e-3; `gradient` the
norm of the adapter's gradient at its start.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
from typing import Any

import torch
from protocol import RESULTS, Network, arguments
from torch import Tensor, nn

import fallow

LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "MiSS r=4": ("bone", {"rank": 4}),
    "Bat r=4": ("bone", {"rank": 4, "kind": "bat"}),
    "LoRA r=2": ("lora", {"rank": 2}),
}


def curve(seed: int, bent: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(50, 1, generator=generator) * 2 - 1
    clean = torch.sin(2 * math.pi * x) + (0.3 * torch.cos(3 * math.pi * x) if bent else 0.0)
    return x, clean + 0.05 * torch.randn(50, 1, generator=generator)


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> tuple[float, float]:
    """The error after the last step, and the norm of the first gradient."""
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer, first = torch.optim.Adam(params, lr), 0.0
    for step in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        if not step:
            first = float(torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm())
        optimizer.step()
    with torch.no_grad():
        return float((model(x) - y).square().mean()), first


def run(label: str, lr: float, seed: int, steps: int = 100) -> dict[str, float]:
    torch.manual_seed(seed)
    model: nn.Module = Network(
        nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    fit(model, *curve(seed, False), 250, 1e-3)
    model = copy.deepcopy(model)
    method, options = CONTENDERS[label]
    fallow.attach(model, method, ["layers.2", "layers.4"], **options)
    train, gradient = fit(model, *curve(seed + 500, True), steps, lr)
    x, y = curve(seed + 900, True)
    with torch.no_grad():
        valid = float((model(x) - y).square().mean())
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    return {"train": train, "valid": valid, "gradient": gradient, "trained": trained}


def main(seeds: int) -> None:
    torch.set_num_threads(1)
    told: dict[str, Any] = {"name": "bone", "seeds": seeds, "torch": torch.__version__, "contenders": {}}
    for label in CONTENDERS:
        sweep = {lr: statistics.fmean(run(label, lr, seed)["train"] for seed in (100, 101)) for lr in LRS}
        lr = min(LRS, key=lambda rate, sweep=sweep: sweep[rate])  # type: ignore[misc]
        runs = [
            {**run(label, lr, seed), **{f"step_{n}": run(label, 1e-3, seed, n)["train"] for n in (10, 100)}}
            for seed in range(seeds)
        ]
        told["contenders"][label] = {"lr": lr, "sweep": sweep, "at_edge": lr in (LRS[0], LRS[-1]), "runs": runs}
        shown = []
        for key in runs[0]:
            values = [one[key] for one in runs]
            shown.append(f"{key} {statistics.fmean(values):.4f} ± {statistics.stdev(values) if seeds > 1 else 0:.4f}")
        print(f"{label:10} lr {lr:g}   " + "   ".join(shown), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "claims-bone.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main(arguments(__doc__).seeds)
