"""PEGO on turned digits: learn at 0, 20 and 40 degrees, judge at 90 to 270, where only the base has been.

python benchmarks/claims/pego.py --seeds 3

The base, an MLP 64-128-128-128, knows ten digits at all angles. The task, label mod 3, has 300 samples at three angles
and a new classifier. `unseen`: accuracy at 90, 140, 180, 230 and 270 degrees; `seen`: at the three, on other digits;
`overlap`: the sum of |W dWᵀ| over the layers. Rates are chosen by `seen` on held-out digits, two other seeds.
"""

from __future__ import annotations

import copy
import json
import statistics
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from protocol import RESULTS, SWEEP_SEEDS, Network, accuracy, arguments, digits
from torch import Tensor, nn

import fallow

LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEEN, UNSEEN = (0, 20, 40), (90, 140, 180, 230, 270)
GROUP = {"rank": 4, "group": 4}
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "classifier alone": ("", {}),
    "LoRA r=4": ("lora", {"rank": 4}),
    "group 4 x 4, no penalty": ("pego", {**GROUP, "orthogonality": 0.0}),
    "PEGO, penalty 1e-4": ("pego", {**GROUP, "orthogonality": 1e-4}),
    "PEGO, penalty 1e-3": ("pego", {**GROUP, "orthogonality": 1e-3}),
}


def turned(x: Tensor, degrees: Tensor) -> Tensor:
    """Digits (N, 64) turned, each by its own angle."""
    angle = torch.deg2rad(degrees.float())
    rows = torch.stack([angle.cos(), -angle.sin(), 0 * angle, angle.sin(), angle.cos(), 0 * angle], 1).view(-1, 2, 3)
    images = x.view(-1, 1, 8, 8)
    return F.grid_sample(images, F.affine_grid(rows, list(images.shape), False), align_corners=False).flatten(1)


def learn(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float, seed: int, angles: Tensor) -> None:
    """Adam on random batches of 64 at random ones of the angles."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,), generator=generator)
        at = angles[torch.randint(len(angles), (64,), generator=generator)]
        optimizer.zero_grad()
        F.cross_entropy(model(turned(x[chosen], at)), y[chosen]).backward()
        optimizer.step()  # adds the gradient of the penalty


@lru_cache
def base(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = Network(
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    x, y = digits("turned", seed).source["train"]
    learn(model, x, y, 2500, 1e-3, seed, torch.arange(360))
    return model


def run(label: str, lr: float, seed: int, part: str) -> dict[str, float]:
    model: Any = copy.deepcopy(base(seed))
    data = digits("turned", seed).source
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 2}
    torch.manual_seed(seed + 1)
    method, options = CONTENDERS[label]
    hidden = ["layers.0", "layers.2", "layers.4"]
    if method != "full":
        model.requires_grad_(False)
    if method not in ("", "full"):
        fallow.attach(model, method, hidden, seed=seed, **options)
    model.layers[6] = nn.Linear(128, 3)
    x, y = data["train"]
    learn(model, x[:300], y[:300] % 3, 400, lr, seed + 2, torch.tensor(SEEN))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if method not in ("", "full"):
        fallow.merge(model)
    x, y = data[part]

    def at(angles: tuple[int, ...]) -> float:
        return statistics.fmean(accuracy(model, (turned(x, torch.full((len(x),), a)), y % 3)) for a in angles)

    weights = dict(model.named_parameters())
    changes = [(w, weights[name].detach() - w) for name, w in before.items() if name.rsplit(".", 1)[0] in hidden]
    overlap = sum(float((w @ change.T).abs().sum()) for w, change in changes)
    return {"seen": at(SEEN), "unseen": at(UNSEEN), "overlap": overlap, "trained": trained}


def main(seeds: int) -> None:
    torch.set_num_threads(1)
    told: dict[str, Any] = {"name": "pego", "seeds": seeds, "torch": torch.__version__, "contenders": {}}
    for label in CONTENDERS:
        sweep = {lr: statistics.fmean(run(label, lr, s, "held out")["seen"] for s in SWEEP_SEEDS) for lr in LRS}
        lr = max(LRS, key=lambda rate, sweep=sweep: sweep[rate])  # type: ignore[misc]
        runs = [run(label, lr, seed, "test") for seed in range(seeds)]
        told["contenders"][label] = {"lr": lr, "sweep": sweep, "at_edge": lr in (LRS[0], LRS[-1]), "runs": runs}
        shown = []
        for key in runs[0]:
            values = [one[key] for one in runs]
            shown.append(f"{key} {statistics.fmean(values):.3f} ± {statistics.stdev(values) if seeds > 1 else 0:.3f}")
        print(f"{label:24} lr {lr:g}   " + "   ".join(shown), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "claims-pego.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main(arguments(__doc__).seeds)
