"""LaMDA with B frozen from the start, step by step, and never, against LoRA, on digits transposed and inverted.

python benchmarks/claims/lamda.py --seeds 5

`at_end`: trained numbers when the run ends.
"""

from __future__ import annotations

from protocol import Contender, Digits, Setting, arguments, compare
from torch import nn

NEVER = 10**6  # a step beyond the run
R16 = {"rank": 16, "dropout": 0.0}
CONTENDERS = [
    Contender("frozen from the start", "lamda", {**R16, "freeze": 0}, lrs=(1e-2, 3e-2, 1e-1, 3e-1, 1.0)),
    Contender("gradual, 0.3 of the run", "lamda", {**R16, "freeze": 0.3}),
    Contender("gradual, ascending", "lamda", {**R16, "freeze": 0.3, "order": "ascending"}),
    Contender("never frozen", "lamda", {**R16, "freeze": NEVER}),
    Contender("never frozen, random", "lamda", {**R16, "freeze": NEVER, "basis": "random"}),
    Contender("LoRA r=4", "lora", {"rank": 4}),
]


def at_end(model: nn.Module, digits: Digits) -> dict[str, float]:
    return {"at_end": sum(param.numel() for param in model.parameters() if param.requires_grad)}


if __name__ == "__main__":
    compare("lamda", CONTENDERS, seeds=arguments(__doc__).seeds, setting=Setting(change="inverted"), measure=at_end)
