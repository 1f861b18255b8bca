"""MoSA's experts that take turns, against LoRA of the same rank, on few digits that turn.

python benchmarks/claims/mosa.py --seeds 5

160 turned digits, 16 of each class or so. `gap` is the accuracy on those minus the one on unseen ones. "agree" adds the
paper's second pass: the symmetric KL between two draws of the experts, in one batch of twice the size.
"""

from __future__ import annotations

import torch
from protocol import Contender, Digits, Setting, accuracy, arguments, compare
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fallow
from fallow.deltas.mosa import symmetric_kl

SETTING = Setting(samples=160, steps=1000, batch=32)


def agreeing(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with fallow.condition(model, passes=2):
        first, second = model(torch.cat([x, x])).chunk(2)
    return cross_entropy(first, y) + symmetric_kl(first, second)


CONTENDERS = [
    Contender("LoRA r=8", "lora", {"rank": 8}),
    Contender("LoRA r=8, dropout 0.2", "lora", {"rank": 8, "dropout": 0.2}),
    Contender("MoSA E=4", "mosa", {"rank": 8}),
    Contender("MoSA E=4, agree", "mosa", {"rank": 8}, loss=agreeing),
    Contender("MoSA E=16, agree", "mosa", {"rank": 8, "experts": 16}, loss=agreeing),
    Contender("MoSA E=4, agree, dense", "mosa", {"rank": 8, "dense_adam": True}, loss=agreeing),
]


def gap(model: nn.Module, digits: Digits) -> dict[str, float]:
    x, y = digits.target["train"]
    seen = accuracy(model, (x[: SETTING.samples], y[: SETTING.samples]))
    return {"gap": seen - accuracy(model, digits.target["test"])}


if __name__ == "__main__":
    compare(
        "mosa", CONTENDERS, seeds=arguments(__doc__).seeds, lrs=(3e-3, 1e-2, 3e-2, 1e-1), setting=SETTING, measure=gap
    )
