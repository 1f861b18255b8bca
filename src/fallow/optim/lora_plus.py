"""LoRA+: B learns `ratio` times as fast as A.

"LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354: lr_B = ratio lr_A. B starts at zero and has to
move by more than A for both to count alike in wide layers; a choice of rates is all there is to it. Embeddings, whose A
starts at zero in its place, get one rate for both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fallow.core.delta import number
from fallow.optim.paired import check_rates
from fallow.optim.pairs import find_pairs


def lora_plus(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """Param groups for any optimizer: everything in training at `lr`, the B factors of LoRAs at `ratio * lr`.

    ConfigError where there is no LoRA or a value cannot be.
    """
    check_rates("LoRAPlus", {"lr": lr})
    number("ratio", ratio, open_below=True)
    faster = {id(pair.b) for pair in find_pairs(model, "LoRAPlus") if pair.view.kind != "embedding"}
    trained = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [param for param in trained if id(param) not in faster], "lr": lr},
        {"params": [param for param in trained if id(param) in faster], "lr": ratio * lr},
    ]
    return [group for group in groups if group["params"]]


class LoRAPlus(torch.optim.AdamW):
    """AdamW over what `model` trains, with the B factors of its LoRAs, ours or PEFT's, at `ratio` times the rate.

    `options`: AdamW's own. For another optimizer: `optimizer(fallow.optim.lora_plus.lora_plus(model, lr))`.
    """

    def __init__(
        self, model: nn.Module, lr: float = 1e-4, ratio: float = 16.0, *, weight_decay: float = 0.0, **options: Any
    ) -> None:
        super().__init__(lora_plus(model, lr, ratio), lr=lr, weight_decay=weight_decay, **options)
