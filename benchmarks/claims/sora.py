"""SoRA, whose ranks fall away, against LoRA of rank 1, 3 and 8, on digits that turn.

python benchmarks/claims/sora.py --seeds 5

`rank` is the mean over the layers of the ranks left at the end, `spread` the difference between the layers; `kept` the
numbers of what is exported. The learning rate is constant here, so the threshold is too.
"""

from __future__ import annotations

import torch
from protocol import Contender, Digits, Setting, arguments, compare
from torch import nn

from fallow.deltas.lora import LoRA
from fallow.deltas.sora import SoRA

LRS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
CONTENDERS = [
    *(Contender(f"LoRA r={rank}", "lora", {"rank": rank, "alpha": 2.0 * rank}) for rank in (8, 3, 1)),
    *(
        Contender(f"SoRA {init} {threshold:g}", "sora",
                  {"rank": 8, "threshold": threshold, "threshold_mode": "constant", "gate_init": init})
        for init in ("normal", "ones") for threshold in (1e-3, 2e-3, 4e-3, 8e-3)
    ),
]  # fmt: skip


@torch.no_grad()
def ranks(model: nn.Module, digits: Digits) -> dict[str, float]:
    deltas = [delta for delta in model.modules() if isinstance(delta, LoRA)]
    left = [int((d.gate != 0).sum()) if isinstance(d, SoRA) else len(d.A) for d in deltas]
    sizes = [rank * sum(delta.view.shape) for rank, delta in zip(left, deltas, strict=True)]
    return {"rank": sum(left) / len(left), "spread": float(max(left) - min(left)), "kept": float(sum(sizes))}


if __name__ == "__main__":
    setting = Setting(targets="all", steps=500)
    compare("sora", CONTENDERS, seeds=arguments(__doc__).seeds, lrs=LRS, setting=setting, measure=ranks)
