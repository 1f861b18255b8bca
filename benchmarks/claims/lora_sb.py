"""LoRA-SB against LoRA-XS, of as many numbers, and LoRA, on digits that turn.

python benchmarks/claims/lora_sb.py --seeds 3

Rank 8, all layers, 200 steps of Adam with batches of 64, each contender at its own best rate. Gradients: 8 batches of
64 of the turned digits, before the first step. There is no warm-up, so the head start is a whole step: of full
fine-tuning's rate, 1e-3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_ga import gradients
from protocol import Contender, Digits, Setting, arguments, compare
from torch import nn

import fallow
from fallow.core.delta import Site
from fallow.core.linalg import low_rank
from fallow.core.starting import Pair, Start

LRS = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RANK = {"rank": 8}


def lora_sb(lr: float = 1e-3, **options: Any) -> Callable[[nn.Module, Digits], Mapping[str, Any]]:
    """`lr`: of the head start, that of full fine-tuning; the rate of the core is another."""
    return lambda model, data: {"start": fallow.LoRASB(gradients(model, data), lr, **options)}


class Orthonormal(Start):
    """The control: the leading singular vectors of W, without its singular values, of which LoRA-XS has them in A."""

    def pair(self, site: Site, rank: int, scale: float) -> Pair:
        u, _, vt = low_rank(site.weight(), rank)
        return Pair(u, vt, kept=True)


def contenders() -> list[Contender]:
    return [
        Contender("full fine-tuning", "full", lrs=(1e-3, *LRS)),
        Contender("LoRA r=8", "lora", RANK),
        Contender("LoRA r=1", "lora", {"rank": 1}),
        Contender("LoRA-XS", "lora-xs", RANK),
        Contender("LoRA-XS, orthonormal", "lora-xs", RANK, seen=lambda model, data: {"start": Orthonormal()}),
        Contender("LoRA-SB", "lora-xs", RANK, seen=lora_sb()),
        Contender("LoRA-SB, R = 0", "lora-xs", RANK, seen=lora_sb(head_start=False)),
        Contender("LoRA-SB, surrogate SGD", "lora-xs", RANK, seen=lora_sb(surrogate="sgd", head_start=False)),
    ]


if __name__ == "__main__":
    setting = Setting(targets="all", steps=200)
    compare("lora-sb", contenders(), seeds=arguments(__doc__, 3).seeds, lrs=LRS, setting=setting)
