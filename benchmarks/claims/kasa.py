"""KaSA, its parts and LoRA at rank 4, on 300 digits transposed and inverted; and what the truncation costs at first.

python benchmarks/claims/kasa.py --seeds 5

`cleaned` is the accuracy on upright digits of the truncated network without any update, less that of the base. "plain"
is LoRA on the truncated weight: KaSA with its values fixed to 1.
"""

from __future__ import annotations

import torch
from protocol import Contender, Digits, Setting, accuracy, arguments, compare
from torch import nn

import fallow
from fallow.core.delta import Site
from fallow.deltas.kasa import KaSA


class Plain(KaSA):
    name = "kasa-plain"

    def setup(self, site: Site) -> None:
        super().setup(site)
        values = torch.ones_like(self.d)
        del self.d
        self.register_buffer("d", values)


@torch.no_grad()
def cleaned(model: nn.Module, digits: Digits) -> dict[str, float]:
    if not any(isinstance(module, KaSA) for module in model.modules()):
        return {"cleaned": 0.0}
    with fallow.disabled(model):
        base = accuracy(model, digits.source["test"])
    with fallow.condition(model, truncated_only=True):
        return {"cleaned": accuracy(model, digits.source["test"]) - base}


NONE = {"rank": 4, "beta": 0.0, "gamma": 0.0}
CONTENDERS = [
    Contender("LoRA r=4, alpha=8", "lora", {"rank": 4, "alpha": 8.0}),
    Contender("truncated, plain", "kasa-plain", NONE),
    Contender("not truncated, SVD form", "kasa", {**NONE, "trunc_rank": 0}),
    Contender("truncated, SVD form", "kasa", NONE),
    Contender("KaSA 1e-4, 1e-3", "kasa", {"rank": 4, "reduction": "sum"}),
    Contender("KaSA 1e-4, 0", "kasa", {"rank": 4, "reduction": "sum", "gamma": 0.0}),
    Contender("KaSA 1e-2, 1e-2", "kasa", {"rank": 4, "reduction": "sum", "beta": 1e-2, "gamma": 1e-2}),
    Contender("KaSA 1e-4, 1e-1", "kasa", {"rank": 4, "reduction": "sum", "gamma": 1e-1}),
]

if __name__ == "__main__":
    seeds = arguments(__doc__).seeds
    compare("kasa", CONTENDERS, seeds=seeds, setting=Setting(change="inverted", samples=300), measure=cleaned)
