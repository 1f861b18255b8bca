"""LoRA-GA and the starts that the weight alone decides, on LoRA, on digits that turn.

python benchmarks/claims/lora_ga.py --seeds 3

The paper's claim at the scale of seconds: rank 4, alpha 8, all layers, 60 steps of Adam with batches of 64. Each
contender at its own best rate, then those of the claim at the rates of full fine-tuning, 1e-3 and 3e-3. Gradients: the
mean over 8 batches of 64 of the turned digits, before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from protocol import Contender, Digits, Setting, arguments, compare, cross_entropy
from torch import Tensor, nn

import fallow

SETTING = Setting(targets="all", steps=60)
LORA = {"rank": 4, "alpha": 8.0}
RSLORA = {**LORA, "scaling": "rslora"}
LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def batches(data: Digits) -> Iterator[tuple[Tensor, Tensor]]:
    x, y = data.target["train"]
    return zip(x[:512].split(64), y[:512].split(64), strict=True)


def gradients(model: nn.Module, data: Digits) -> fallow.Statistics:
    return fallow.probe(model, list(batches(data)), want={"gradient"}, loss=lambda m, batch: cross_entropy(m, *batch))


def lora_ga(**options: Any) -> Callable[[nn.Module, Digits], Mapping[str, Any]]:
    return lambda model, data: {"start": fallow.LoRAGA(gradients(model, data), **options)}


def contenders() -> list[Contender]:
    gentle = lora_ga(gamma=64.0)
    claim = [
        ("full fine-tuning", "full", {}, None),
        ("LoRA", "lora", LORA, None),
        ("rsLoRA", "lora", RSLORA, None),
        ("rsLoRA, LoRA-GA gamma 64", "lora", RSLORA, gentle),
    ]
    others = [
        ("rsLoRA, LoRA-GA gamma 16", "lora", RSLORA, lora_ga()),
        ("LoRA, LoRA-GA gamma 64", "lora", LORA, gentle),
        ("rsLoRA, A and B alike", "lora", RSLORA, lambda m, d: {"start": Alike(gradients(m, d))}),
        *((f"LoRA, {name}", "lora", {**LORA, "start": name}, None) for name in WEIGHTS),
        ("DoRA", "dora", LORA, None),
        ("DoRA, LoRA-GA gamma 64", "dora", LORA, gentle),
    ]
    at_rates = [
        Contender(f"{label} at {lr:g}", method, options, seen=seen, lrs=(lr,))
        for lr in (1e-3, 3e-3)
        for label, method, options, seen in claim
    ]
    swept = [Contender(label, method, options, seen=seen) for label, method, options, seen in (*claim, *others)]
    return [*swept, *at_rates]


WEIGHTS = ("gaussian", "orthogonal", "pissa", "milora", "olora")


class Alike(fallow.LoRAGA):
    """The control: both factors of gamma 64 take the first r directions, so that the first step has rank r."""

    name = ""

    def __init__(self, statistics: fallow.Statistics) -> None:
        super().__init__(statistics, gamma=64.0)

    def split(self, site: Any, rank: int) -> tuple[list[int], list[int]]:
        return list(range(rank)), list(range(rank))


if __name__ == "__main__":
    compare("lora-ga", contenders(), seeds=arguments(__doc__, 3).seeds, lrs=LRS, setting=SETTING)
