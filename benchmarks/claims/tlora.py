"""TLoRA against LoRA where the wanted weight is a transformed one plus a rank: W T + u v, W (48, 64).

python benchmarks/claims/tlora.py --seeds 5

T is a tensor ring of cores of (4, 4, 4), R_T = 1 or 2, disturbed from the identity by 0.3. `error`: the distance from
the wanted weight, of its distance from W, after 1500 steps of Adam with a cosine schedule. LoRA's is the best there is,
from the singular values.
"""

from __future__ import annotations

import json
import statistics

import torch
from protocol import RESULTS, arguments
from torch import Tensor, nn

from fallow.core.delta import Site
from fallow.core.tensor_ring import ring_matrix
from fallow.core.views import view_of
from fallow.deltas.tlora import TLoRA

LRS = (1e-2, 3e-2)
SWEEP_SEED = 1000
CONTENDERS = {
    "R_T=1": {"transform_rank": 1},
    "R_T=2 paper": {"transform_rank": 2, "start": "paper"},
    "R_T=2 bonds": {"transform_rank": 2, "start": "bonds"},
    "R_T=2 noise": {"transform_rank": 2, "start": "noise"},
}


def problem(rank: int, seed: int) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(seed)
    layer = nn.Linear(64, 48, bias=False)
    nn.init.normal_(layer.weight)
    eye = torch.eye(4)[:, :, None, None] / rank
    cores = [eye + 0.3 / rank * torch.randn(4, 4, rank, rank) for _ in range(3)]
    wanted = layer.weight.detach() @ ring_matrix(cores) + torch.randn(48, 1) @ torch.randn(1, 64)
    return layer.requires_grad_(False), wanted


def error(options: dict, rank: int, lr: float, seed: int, steps: int = 1500) -> float:
    layer, wanted = problem(rank, seed)
    site = Site("layer", view_of(layer), lambda: layer.weight, nn.Module(), seed=seed)
    delta = TLoRA(site, rank=1, **options)
    optimizer = torch.optim.Adam(delta.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (delta.transform(layer.weight) - wanted).square().mean().backward()
        optimizer.step()
        schedule.step()
    return float((delta.transform(layer.weight) - wanted).detach().norm() / (wanted - layer.weight).norm())


def best_lora(rank: int, kept: int, seed: int) -> float:
    layer, wanted = problem(rank, seed)
    values = torch.linalg.svdvals(wanted - layer.weight)
    return float(values[kept:].norm() / values.norm())


if __name__ == "__main__":
    seeds = arguments(__doc__).seeds
    torch.set_num_threads(1)
    rows = []
    for rank in (1, 2):
        found: dict[str, tuple[int, float | None, list[float]]] = {
            f"LoRA r={kept}": (112 * kept, None, [best_lora(rank, kept, seed) for seed in range(seeds)])
            for kept in (2, 8)
        }
        for name, options in CONTENDERS.items():
            lr = min(LRS, key=lambda lr: error(options, rank, lr, SWEEP_SEED))
            count = TLoRA.parameter_count((48, 64), TLoRA.Options(rank=1, **options))
            found[name] = count, lr, [error(options, rank, lr, seed) for seed in range(seeds)]
        for name, (count, lr, errors) in found.items():
            row = {"target R_T": rank, "contender": name, "trained": count, "lr": lr,
                   "error": statistics.median(errors), "least": min(errors), "most": max(errors)}  # fmt: skip
            rows.append({**row, "runs": errors})
            print(row, flush=True)
    (RESULTS / "claims-tlora.json").write_text(json.dumps(rows, indent=1) + "\n")
