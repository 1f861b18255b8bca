"""ALLoRA against LoRA of scale 1 and 2, under SGD and under Adam, on digits that turn.

python benchmarks/claims/allora.py --seeds 3

Rank 4, all layers of the network, 60 steps of 64, eta 2. `rows`: the mean norm of the rows of s B A after five steps,
how fast the adapter leaves zero. Each at its own best rate, and with SGD all at 0.03 and at 0.1 too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial

import torch
from protocol import Setting, arguments, table
from rules import Rule, Run, adam, run, sgd

import fallow
from fallow.optim.pairs import find_pairs, row_norms_squared

SETTING = Setting(targets="all", steps=60)
ONE, TWO = {"rank": 4}, {"rank": 4, "alpha": 8.0}
SGD_LRS = (0.01, 0.03, 0.1, 0.3, 1.0)
ADAM_LRS = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)


def allora(base: object, model: torch.nn.Module, lr: float, **options: object) -> torch.optim.Optimizer:
    optimizer = base(model, lr)
    fallow.ALLoRA(model, optimizer, eta=2.0, **options)
    return optimizer


def rules() -> dict[str, Rule]:
    made = {
        "LoRA, SGD": Rule(sgd, SGD_LRS, options=ONE),
        "LoRA scale 2, SGD": Rule(sgd, SGD_LRS, options=TWO),
        "ALLoRA, SGD": Rule(partial(allora, sgd), SGD_LRS, options=ONE),
        "ALLoRA-OD, SGD": Rule(partial(allora, sgd, by="outputs"), SGD_LRS, options=ONE),
        "LoRA, Adam": Rule(adam, ADAM_LRS, options=ONE),
        "LoRA scale 2, Adam": Rule(adam, ADAM_LRS, options=TWO),
        "ALLoRA on gradients, Adam": Rule(partial(allora, adam), ADAM_LRS, options=ONE),
        "ALLoRA on updates, Adam": Rule(partial(allora, adam, where="update"), ADAM_LRS, options=ONE),
    }
    for label in list(made):
        for lr in (0.03, 0.1) if "SGD" in label else (1e-3,):
            made[f"{label} at {lr:g}"] = Rule(made[label].make, (lr,), options=made[label].options)
    return made


@torch.no_grad()
def rows(now: Run, step: int) -> Mapping[str, float] | None:
    if step != 5:
        return None
    norms = [pair.scale() * row_norms_squared(pair.a, pair.b).sqrt() for pair in find_pairs(now.model, "rows")]
    return {"rows": float(torch.cat(norms).mean())}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "ALLoRA")  # that Adam undoes it is what is shown
    found = rules()
    table(
        "allora", {label: rule.told() for label, rule in found.items()},
        lambda label, lr, seed, sweep: run(found[label], lr, seed, SETTING, each_step=rows),
        "held_out", arguments(__doc__, 3).seeds, {"setting": vars(SETTING)},
    )  # fmt: skip
