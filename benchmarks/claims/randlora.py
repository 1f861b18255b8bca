"""RandLoRA's claim: an update of full rank for as many trained numbers as LoRA's.

`fit`: both factorizations approach a random 32 x 32 matrix by Adam. `learn`: the hidden layers of an MLP learn digits
turned by 90 degrees; `rank` is the numerical rank of the update of the second one (128 x 128).
"""

from __future__ import annotations

import statistics

import torch
from protocol import Contender, Digits, Setting, arguments, compare, table
from torch import nn

import fallow

SIDE = 32


def fit(contender: dict[str, object], lr: float, seed: int) -> dict[str, float]:
    """The squared error left, of the target's, after 3000 steps of Adam whose rate falls to 0."""
    torch.manual_seed(seed)
    target = torch.randn(SIDE, SIDE)
    layer = nn.Sequential(nn.Linear(SIDE, SIDE, bias=False))
    nn.init.zeros_(layer[0].weight)
    fallow.attach(layer, contender["method"], "all-linear", seed=seed, expect_gradients=False, **contender["options"])
    params = [param for param in layer.parameters() if param.requires_grad]
    optimizer = torch.optim.Adam(params, lr=lr)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=3000)
    for _ in range(3000):
        error = (layer(torch.eye(SIDE)).T - target).square().sum() / target.square().sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        falling.step()
    best = torch.linalg.svdvals(target)[16:].square().sum() / target.square().sum()
    return {
        "error": float(error.detach()),
        "score": -float(error.detach()),
        "bound": float(best),
        "trained": sum(map(torch.numel, params)),
    }


@torch.no_grad()
def rank(model: nn.Module, digits: Digits) -> dict[str, float]:
    values = torch.linalg.svdvals(model.layers[2].adapters["default"].delta_weight())
    return {"rank": int((values > 1e-4 * values[0]).sum())}


if __name__ == "__main__":
    seeds = arguments(__doc__, seeds=4).seeds
    official = {"rank": 1, "scaling": "official"}
    contenders = {
        "RandLoRA r=1 (1056)": {"method": "randlora", "options": official, "lrs": (1e-2, 3e-2, 1e-1, 3e-1, 1.0)},
        "LoRA r=16 (1024)": {"method": "lora", "options": {"rank": 16}, "lrs": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)},
    }
    table(
        "randlora-fit", contenders, lambda label, lr, seed, sweep: fit(contenders[label], lr, seed), "score", seeds,
        {"note": "LoRA cannot go below `bound`; at rank 1 RandLoRA reaches any matrix"},
    )  # fmt: skip
    learned = compare(
        "randlora",
        [
            Contender("RandLoRA r=32", "randlora", {"rank": 32}),
            Contender("RandLoRA r=32, sparse", "randlora", {"rank": 32, "zeros": 2 / 3}),
            Contender("RandLoRA r=32, PEFT's scale", "randlora", {"rank": 32, "scaling": "peft"}),
            Contender("LoRA r=2", "lora", {"rank": 2}),
        ],
        seeds=seeds,
        lrs=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        setting=Setting(steps=300),
        measure=rank,
        note="paper: the same accuracy or more for as many numbers, at full rank",
    )
    print({label: statistics.fmean(run["rank"] for run in row["runs"]) for label, row in learned.items()})
