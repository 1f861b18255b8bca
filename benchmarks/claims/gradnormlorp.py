"""GradNormLoRP against LoRA and DoRA: equal quality with a third less state, and against its own parts.

python benchmarks/claims/gradnormlorp.py --seeds 5

The specification's experiment: a network 64-128-128-10 learns the digits 0 to 4, then its first two layers are adapted
to 5 to 9 with factors of rank 8 (alpha 16), whose updates are projected to rank 4, refreshed every 50 steps, for 200
steps; the head is trained plainly by AdamW at 1e-3 throughout. Every contender runs at its own best rate by held-out
digits on seeds that are not reported. `loss`: the last training losses. `state`: numbers that the optimizer keeps.
"""

from __future__ import annotations

import copy
from functools import lru_cache, partial
from typing import Any

import torch
from protocol import accuracy, arguments, cross_entropy, digits, learn, network, table
from torch import Tensor, nn

import fallow
from fallow.optim.gradnormlorp import GradNormLoRP

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
STEPS, BATCH = 200, 64
MEAN, DEVIATION = 0.305, 0.376  # of all pixels
CONTENDERS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "lora", "optimizer": "adamw", "lrs": RATES},
    "DoRA": {"method": "dora", "optimizer": "adamw", "lrs": RATES},
    "GradNormLoRP": {"method": "dora", "optimizer": "std", "lrs": RATES},
    "GradNormLoRP, two-sided": {"method": "dora", "optimizer": "two-sided", "lrs": RATES},
    "LoRA, projected": {"method": "lora", "optimizer": "std", "lrs": RATES},
    "normalized weights": {"method": "full", "optimizer": "normalized", "lrs": RATES},
    "full": {"method": "full", "optimizer": "adamw", "lrs": (1e-4, *RATES)},
}


def of_classes(data: tuple[Tensor, Tensor], low: int, high: int) -> tuple[Tensor, Tensor]:
    chosen = (data[1] >= low) & (data[1] < high)
    return (data[0][chosen] - MEAN) / DEVIATION, data[1][chosen]


@lru_cache
def pretrained(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = network("mlp")
    learn(model, model.parameters(), 1e-3, of_classes(digits("turned", seed).source["train"], 0, 5), 500, BATCH, seed)
    return model


def optimizer_of(kind: str, params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    common = {"lr": lr, "refresh_every": 50, "scale": 1.0}
    if kind == "normalized":
        return GradNormLoRP(params, rank=8, normalized=True, **common)
    return GradNormLoRP(params, rank=4, basis="gram" if kind == "std" else kind, **common)


def run(label: str, lr: float, seed: int, sweep: bool) -> dict[str, float]:
    contender, model = CONTENDERS[label], copy.deepcopy(pretrained(seed))
    torch.manual_seed(seed + 1)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:2]
    if contender["method"] == "full":
        model.requires_grad_(False)
        for name in layers:
            model.get_submodule(name).weight.requires_grad_(True)
    else:
        fallow.attach(model, contender["method"], layers, rank=8, alpha=16, seed=seed)
    optimizer = optimizer_of(contender["optimizer"], [p for p in model.parameters() if p.requires_grad], lr)
    head = model.layers[-1].requires_grad_(True)
    beside = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.0)
    x, y = of_classes(digits("turned", seed).source["train"], 5, 10)
    generator, losses = torch.Generator().manual_seed(seed + 2), []
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (BATCH,), generator=generator)
        loss = cross_entropy(model, x[chosen], y[chosen])
        loss.backward()
        optimizer.step()
        beside.step()
        fallow.step(model)
        model.zero_grad()
        losses.append(loss.item())
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    part = partial(of_classes, low=5, high=10)
    return {
        "held_out": accuracy(model.eval(), part(digits("turned", seed).source["held out"])),
        "loss": sum(losses[-20:]) / 20,
        "test": accuracy(model, part(digits("turned", seed).source["test"])),
        "state": sum(value.numel() for value in states if value.ndim),
    }


if __name__ == "__main__":
    args = arguments(__doc__)
    table("gradnormlorp", CONTENDERS, run, "held_out", args.seeds, {"steps": STEPS, "batch": BATCH})
