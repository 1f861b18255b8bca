"""LoRA-GGPO, LoRA-MGPO and Flat-LoRA against LoRA, on few digits that turn, a fifth of them with wrong labels.

python benchmarks/claims/lora_ggpo.py --seeds 3

150 images, rank 16, alpha 16, all layers, 150 steps of 64. `sharpness`: how much the training loss rises under fresh
noise of 0.1 of each row's norm, the mean of ten draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from protocol import Setting, arguments, table
from rules import Rule, Run, adam, run
from torch import Tensor

import fallow
from fallow.optim.pairs import find_pairs

SETTING = Setting(targets="all", steps=150, samples=150)
LORA = {"rank": 16, "alpha": 16.0, "patterns": {"layers.4": {"rank": 10, "alpha": 10.0}}}  # ten classes
LRS = (1e-3, 3e-3, 1e-2, 3e-2)


def perturbed(model: torch.nn.Module, lr: float, **options: object) -> torch.optim.Optimizer:
    optimizer = adam(model, lr)
    fallow.GGPO(model, optimizer, **options)
    return optimizer


def rules() -> dict[str, Rule]:
    flat = {"sigma": 0.1, "beta": 0.0, "ramp": "cosine", "total_steps": SETTING.steps}
    options = {
        "Flat-LoRA 0.1": flat,
        "GGPO 0.05": {"sigma": 0.05},
        "GGPO 0.1": {"sigma": 0.1},
        "GGPO 0.3": {"sigma": 0.3},
        "noise alone 0.1": {"sigma": 0.1, "beta": 0.0},
        **{
            f"MGPO {sign:+d}, rho {rho:g}{where}": {"mode": "mgpo", "rho": rho, "sign": sign, "space": space}
            for space, where in (("param", ""), ("weight", " in weights"))
            for rho, sign in ((0.05, -1), (0.2, -1), (0.05, 1), (0.2, 1))
            if space == "param" or rho == 0.2
        },
    }
    made = {"LoRA": Rule(adam, LRS, options=LORA)}
    made |= {label: Rule(partial(perturbed, **given), LRS, options=LORA) for label, given in options.items()}
    for label in list(made):
        made[f"{label} at 0.003"] = Rule(made[label].make, (3e-3,), options=LORA)
    return made


def mislabelled(y: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7)
    wrong = torch.rand(len(y), generator=generator) < 0.2
    return torch.where(wrong, torch.randint(10, (len(y),), generator=generator), y)


@torch.no_grad()
def sharpness(now: Run, seed: int) -> Mapping[str, float]:
    x, y = now.data
    pairs = find_pairs(now.model, "sharpness")
    before = torch.nn.functional.cross_entropy(now.model(x), y)
    kept = [pair.read().data.clone() for pair in pairs]
    generator, rises = torch.Generator().manual_seed(seed + 9), []
    for _ in range(10):
        for pair, weight in zip(pairs, kept, strict=True):
            whole = weight + pair.scale() * pair.b @ pair.a
            std = 0.1 * whole.norm(dim=1, keepdim=True) / whole.shape[1] ** 0.5
            pair.read().data.copy_(weight + std * torch.randn(weight.shape, generator=generator))
        rises.append(float(torch.nn.functional.cross_entropy(now.model(x), y) - before))
    for pair, weight in zip(pairs, kept, strict=True):
        pair.read().data.copy_(weight)
    return {"sharpness": sum(rises) / len(rises), "train_loss": float(before)}


if __name__ == "__main__":
    found = rules()
    table(
        "lora-ggpo", {label: rule.told() for label, rule in found.items()},
        lambda label, lr, seed, sweep: run(
            found[label], lr, seed, SETTING, relabel=mislabelled, at_end=None if sweep else sharpness
        ),
        "held_out", arguments(__doc__, 3).seeds, {"setting": vars(SETTING)},
    )  # fmt: skip
