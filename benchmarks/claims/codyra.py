"""CoDyRA against LoRA of fixed rank on a sequence of tasks, each merged before the next: learned and forgotten.

python benchmarks/claims/codyra.py --seeds 3

A network that knows upright digits learns them turned by 90, 180 and 270 degrees, one task after another. `new` is the
mean test accuracy of each task right after it, `last` of all three at the end, `source` of the upright digits at the
end; `rank` the mean of the ranks merged, `spread` the difference between layers; `chance` (CoDyRA) the correlation
between the size of a gate's random start and its survival. Rates are chosen by `new` on held-out digits.
"""

from __future__ import annotations

import copy
import statistics

import torch
from protocol import accuracy, arguments, digits, learn, pretrained, table
from torch import Tensor

import fallow
from fallow.deltas.lora import LoRA
from fallow.deltas.sora import SoRA

STEPS, LRS = 300, (3e-3, 1e-2, 3e-2, 1e-1)
CONTENDERS = {  # method, options, factor of the gates' learning rate
    "LoRA r=1": ("lora", {"rank": 1}, 1.0),
    "LoRA r=16": ("lora", {"rank": 16}, 1.0),
    "CoDyRA official": ("codyra", {}, 1.0),
    "CoDyRA normal, 1.5e-2": ("codyra", {"max_kappa": 1.5e-2}, 10.0),
    "CoDyRA ones, 1.5e-2": ("codyra", {"max_kappa": 1.5e-2, "gate_init": "ones"}, 10.0),
    "CoDyRA ones, 3e-2": ("codyra", {"max_kappa": 3e-2, "gate_init": "ones"}, 10.0),
}


def turned(part: tuple[Tensor, Tensor], turns: int) -> tuple[Tensor, Tensor]:
    return part[0].view(-1, 8, 8).rot90(turns, (1, 2)).flatten(1), part[1]


def run(label: str, lr: float, seed: int, sweep: bool) -> dict[str, float]:
    method, options, factor = CONTENDERS[label]
    test = "held out" if sweep else "test"
    data = digits("turned", seed).source
    model = copy.deepcopy(pretrained("mlp", "turned", seed))
    new, ranks, starts, survived, spread = [], [], [], [], []
    for turns in (1, 2, 3):
        torch.manual_seed(100 * seed + turns)
        last = {"layers.4": {"rank": min(10, options.get("rank", 16))}}  # has no more
        fallow.attach(model, method, "all-linear", seed=seed, patterns=last, **options)
        deltas = [delta for delta in model.modules() if isinstance(delta, LoRA)]
        starts += [delta.gate.detach().abs().clone() for delta in deltas if isinstance(delta, SoRA)]
        groups = [
            {"params": [param], "lr": lr * (factor if name.endswith("gate") else 1.0)}
            for name, param in model.named_parameters() if param.requires_grad
        ]  # fmt: skip
        learn(model, groups, lr, turned(data["train"], turns), STEPS, 64, 10 * seed + turns)
        new.append(accuracy(model, turned(data[test], turns)))
        survived += [(delta.gate.detach() != 0).float() for delta in deltas if isinstance(delta, SoRA)]
        left = [int((d.gate != 0).sum()) if isinstance(d, SoRA) else len(d.A) for d in deltas]
        ranks.append(statistics.fmean(left))
        spread.append(max(left) - min(left))
        fallow.merge(model)
        fallow.detach(model)
    figures = {
        "new": statistics.fmean(new),
        "last": statistics.fmean(accuracy(model, turned(data[test], turns)) for turns in (1, 2, 3)),
        "source": accuracy(model, data[test]),
        "rank": statistics.fmean(ranks),
        "spread": statistics.fmean(spread),
        "chance": 0.0,
    }
    if survived and 0 < float(torch.cat(survived).mean()) < 1 and float(torch.cat(starts).std()) > 0:
        figures["chance"] = float(torch.corrcoef(torch.stack([torch.cat(starts), torch.cat(survived)]))[0, 1])
    return figures


if __name__ == "__main__":
    described = {
        label: {"method": method, "options": options, "gate_rate": factor, "lrs": LRS}
        for label, (method, options, factor) in CONTENDERS.items()
    }
    setting = {"net": "mlp", "tasks": 3, "steps": STEPS, "batch": 64}
    table("codyra", described, run, "new", arguments(__doc__, 3).seeds, {"setting": setting})
