"""LoRA-Pro against LoRA, its baselines and full fine-tuning, on digits that turn.

python benchmarks/claims/lora_pro.py --seeds 3

Rank 4, alpha 8, all layers of the network, 60 steps of 64. Each at its own best rate; then all at the rates of full
fine-tuning, 1e-3 and 3e-3 of Adam, and with plain SGD.
"""

from __future__ import annotations

from functools import partial

import torch
from protocol import Setting, arguments, table
from rules import Rule, adam, run, sgd

import fallow

SETTING = Setting(targets="all", steps=60)
LORA = {"rank": 4, "alpha": 8.0}
LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SGD_LRS = (0.01, 0.03, 0.1, 0.3, 1.0)


def pro(model: torch.nn.Module, lr: float, **options: object) -> torch.optim.Optimizer:
    return fallow.LoRAPro(model, lr=lr, **options)


def rules() -> dict[str, Rule]:
    full = partial(pro, mode="full")
    adams = {
        "full fine-tuning": Rule(adam, LRS, None),
        "LoRA": Rule(adam, LRS, options=LORA),
        "LoRA+": Rule(lambda m, lr: fallow.LoRAPlus(m, lr=lr), LRS, options=LORA),
        "Riemannian": Rule(lambda m, lr: fallow.Riemannian(m, lr=lr), LRS, options=LORA),
        "LoRA-Pro full": Rule(full, LRS, options=LORA),
        "LoRA-Pro full, X=0": Rule(partial(full, balance="zero"), LRS, options=LORA),
        "LoRA-Pro full, symmetry": Rule(partial(full, balance="symmetry"), LRS, options=LORA),
        "LoRA-Pro full, factored": Rule(partial(full, factored=True), LRS, options=LORA),
        "LoRA-Pro efficient": Rule(partial(pro, mode="efficient"), LRS, options=LORA),
    }
    plain = {
        "full, SGD": Rule(sgd, SGD_LRS, None),
        "LoRA, SGD": Rule(sgd, SGD_LRS, options=LORA),
        "Riemannian, SGD": Rule(lambda m, lr: fallow.Riemannian(m, lr=lr, rule="sgd"), SGD_LRS, options=LORA),
        "LoRA-Pro, SGD": Rule(partial(pro, mode="sgd"), SGD_LRS, options=LORA),
    }
    made = {**adams, **plain}
    for label in ("full fine-tuning", "LoRA", "LoRA-Pro full", "LoRA-Pro efficient"):
        for lr in (1e-3, 3e-3):
            made[f"{label} at {lr:g}"] = Rule(adams[label].make, (lr,), adams[label].method, adams[label].options)
    return made


if __name__ == "__main__":
    found = rules()
    table(
        "lora-pro", {label: rule.told() for label, rule in found.items()},
        lambda label, lr, seed, sweep: run(found[label], lr, seed, SETTING),
        "held_out", arguments(__doc__, 3).seeds, {"setting": vars(SETTING)},
    )  # fmt: skip
