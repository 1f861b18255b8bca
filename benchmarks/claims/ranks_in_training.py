"""IncreLoRA and AdaLoRA at a mean rank of 2, and DiffoRA's choice of layers, on digits that turn.

python benchmarks/claims/ranks_in_training.py --seeds 3

320 turned digits, 32 of each class, all three layers. `rank` is the mean over the layers of the ranks in use at the
end, `spread` the difference between layers, `kept` the numbers that these ranks have as a LoRA. DiffoRA and the choices
beside it keep two layers of three at rank 4: by chance (of a seed), by gates, by the size of what LoRA on all layers
has learned in the search.
"""

from __future__ import annotations

from typing import Any

import torch
from protocol import Contender, Digits, Setting, arguments, compare, cross_entropy
from torch import nn

import fallow
from fallow.report.ranks import ranks_of

LRS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
STEPS, SAMPLES = 300, 320
HALF = SAMPLES // 2


def increlora(model: nn.Module, data: Digits) -> dict[str, Any]:
    return {"budget": fallow.IncreLoRA(top=1)}


def searched(score: str) -> Any:
    def found(model: nn.Module, data: Digits) -> dict[str, Any]:
        x, y = (part[:SAMPLES] for part in data.target["train"])
        train = list(zip(x[:HALF].split(32), y[:HALF].split(32), strict=True))
        held = list(zip(x[HALF:].split(32), y[HALF:].split(32), strict=True))
        names = [f"layers.{at}" for at in (0, 2, 4)]
        options: dict[str, Any] = {
            "steps": 100,
            "rank": 4,
            "alpha": 4.0,
            "share": 0.6,
            "targets": names,
            "score": score,
        }
        return {"budget": fallow.search_modules(model, train, held, loss=lambda m, b: cross_entropy(m, *b), **options)}

    return found


def by_chance(model: nn.Module, data: Digits) -> dict[str, Any]:
    names = [f"layers.{at}" for at in (0, 2, 4)]
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in names}
    scores = dict(zip(names, torch.rand(3).tolist(), strict=True))  # after torch.manual_seed of the run
    return {"budget": fallow.DiffoRARanks(scores, shapes, share=0.6)}


CONTENDERS = [
    Contender("LoRA r=1", "lora", {"rank": 1}),
    Contender("LoRA r=2", "lora", {"rank": 2}),
    Contender("AdaLoRA's form r=2", "adalora", {"rank": 2}),
    Contender("AdaLoRA 3 to 2", "adalora", {"rank": 2, "budget": "adalora"}),
    Contender("IncreLoRA to 2", "adalora", {"rank": 2, "orthogonal": 0.1}, seen=increlora),
    Contender("IncreLoRA to 2, LoRA", "lora", {"rank": 2}, seen=increlora),
    Contender("LoRA r=4", "lora", {"rank": 4}),
    Contender("2 of 3, by chance", "lora", {"rank": 4}, seen=by_chance),
    Contender("2 of 3, DiffoRA", "lora", {"rank": 4}, seen=searched("gate")),
    Contender("2 of 3, size of change", "lora", {"rank": 4}, seen=searched("change")),
]


def ranks(model: nn.Module, digits: Digits) -> dict[str, float]:
    found = ranks_of(model)
    used = [*found.values(), *[0] * (3 - len(found))]
    sizes = {f"layers.{at}": size for at, size in ((0, 64 + 128), (2, 128 + 128), (4, 128 + 10))}
    kept = sum(rank * sizes[name] for name, rank in found.items())
    return {"rank": sum(used) / 3, "spread": float(max(used) - min(used)), "kept": float(kept)}


if __name__ == "__main__":
    setting = Setting(targets="all", steps=STEPS, samples=SAMPLES)
    compare("ranks-in-training", CONTENDERS, seeds=arguments(__doc__, 3).seeds, lrs=LRS, setting=setting, measure=ranks)
