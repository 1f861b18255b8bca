"""DyLoRA at each rank, against a LoRA of rank 8 that is cut, and LoRAs trained for their rank, on digits that turn.

python benchmarks/claims/dylora.py --seeds 3

`at b` is test accuracy at rank b. The LoRA of rank 8 is cut twice: to its leading ranks, as the paper does, and to the
best approximation of each rank, by singular values, which is what a careful user would do.
"""

from __future__ import annotations

import torch
from protocol import Contender, Digits, Setting, accuracy, arguments, compare
from torch import nn

import fallow
from fallow.deltas.dylora import DyLoRA
from fallow.deltas.lora import LoRA

RANKS = (1, 2, 3, 4, 6, 8)
CONTENDERS = [
    Contender("DyLoRA frozen", "dylora", {"rank": 8, "alpha": 8.0}),
    Contender("DyLoRA full", "dylora", {"rank": 8, "alpha": 8.0, "update": "full"}),
    Contender("LoRA r=8", "lora", {"rank": 8, "alpha": 8.0}),
    *(Contender(f"LoRA r={rank}", "lora", {"rank": rank, "alpha": 8.0}) for rank in (1, 2, 4)),
]


@torch.no_grad()
def by_rank(model: nn.Module, digits: Digits) -> dict[str, float]:
    test = digits.target["test"]
    deltas = [delta for delta in model.modules() if isinstance(delta, LoRA)]
    found: dict[str, float] = {}
    if isinstance(deltas[0], DyLoRA):
        for rank in RANKS:
            with fallow.condition(model, rank=rank):
                found[f"at {rank}"] = accuracy(model, test)
        return found
    if len(deltas[0].A) < 8:
        return found
    whole = [(delta.A.clone(), delta.B.clone()) for delta in deltas]
    for how in ("at", "svd"):
        for rank in RANKS:
            for delta, (a, b) in zip(deltas, whole, strict=True):
                if how == "svd":
                    u, s, vt = torch.linalg.svd(b @ a, full_matrices=False)
                    a, b = vt[:8], u[:, :8] * s[:8]
                delta.A.copy_(a)
                delta.B.copy_(b * (torch.arange(8) < rank))
            found[f"{how} {rank}"] = accuracy(model, test)
    return found


if __name__ == "__main__":
    compare("dylora", CONTENDERS, seeds=arguments(__doc__, 3).seeds, setting=Setting(steps=1000), measure=by_rank)
