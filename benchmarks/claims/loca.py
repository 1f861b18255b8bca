"""LoCA with learned places against as many random ones: on a target of smooth spectrum, and on digits that turn.

python benchmarks/claims/loca.py --seeds 5

The target (64, 64) has a Gaussian of width 6 at (20, 14) as its spectrum, or the same with random signs; `left` is the
share of its energy that 60 components leave after 1200 steps of Adam, with places learned in the first 600.
"""

from __future__ import annotations

import json
import statistics

import torch
from protocol import RESULTS, Contender, Setting, arguments, compare
from torch import Tensor, nn

from fallow.core.delta import Site
from fallow.core.transforms import idct2
from fallow.core.views import view_of
from fallow.deltas.loca import LoCA

LRS = (1e-2, 3e-2, 5e-2, 1e-1)
RATES = (0.03, 0.1, 0.3)  # of places, to that of coefficients
SWEEP_SEED = 1000


def target(signs: bool, seed: int) -> Tensor:
    i = torch.arange(64.0)
    blob = torch.exp(-((i[:, None] - 20) ** 2 + (i - 14) ** 2) / 72)
    if signs:
        blob = blob * torch.randint(2, (64, 64), generator=torch.Generator().manual_seed(seed)).mul(2).sub(1)
    return idct2(blob)


def left(signs: bool, until: int, lr: float, rate: float, seed: int, steps: int = 1200) -> float:
    wanted, layer = target(signs, seed), nn.Linear(64, 64, bias=False)
    site = Site("layer", view_of(layer), lambda: layer.weight, nn.Module(), seed=seed)
    delta = LoCA(site, components=60, location_until=until, rate=rate)
    optimizer = torch.optim.Adam(delta.parameters(), lr=lr)
    for step in range(steps):
        ((delta.delta_weight() - wanted).square().sum() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        delta.on_step(step + 1, steps)
    return float((delta.delta_weight() - wanted).square().sum().detach() / wanted.square().sum())


def spectra(seeds: int) -> None:
    rows = []
    for signs in (False, True):
        for until in (0, 600):
            tried = {(lr, rate): left(signs, until, lr, rate, SWEEP_SEED) for lr in LRS for rate in RATES[: until or 1]}
            lr, rate = min(tried, key=lambda pair: tried[pair])
            found = [left(signs, until, lr, rate, seed) for seed in range(seeds)]
            row = {"random signs": signs, "places": "learned" if until else "random", "lr": lr, "rate": rate,
                   "left": statistics.fmean(found), "deviation": statistics.stdev(found), "runs": found}  # fmt: skip
            rows.append(row)
            print({key: value for key, value in row.items() if key != "runs"}, flush=True)
    (RESULTS / "claims-loca-spectrum.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    seeds = arguments(__doc__).seeds
    torch.set_num_threads(1)
    spectra(seeds)
    contenders = [
        Contender(f"{'learned ' + str(rate) if rate else 'random'} n={n}", "loca",
                  {"components": n, "location_until": 200 if rate else 0, "rate": rate or 0.02})
        for n in (100, 300) for rate in (None, 0.1, 0.02, 0.005)
    ]  # fmt: skip
    compare("loca", contenders, seeds=seeds, lrs=(3e-2, 1e-1, 3e-1, 1.0), setting=Setting(steps=600))
