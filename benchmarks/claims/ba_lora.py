"""BA-LoRA's three terms beside PiSSA and LoRA, on few shifted digits of which two fifths have a wrong label.

python benchmarks/claims/ba_lora.py --seeds 5

An MLP 64-128-128-10 that knows upright digits learns ones shifted by a pixel, 200 images, 120 steps of 64, rank 4 in
all layers, from PiSSA; the teacher is the upright network. Rates are chosen by held-out shifted digits with true
labels; a second table has all of them at 3e-3. `target`: accuracy on shifted test digits; `kept`: on upright ones. Of
the logits of shifted test digits, `kl`: from the teacher's; `covariance`: L_DR; `share`: of the five largest singular
values.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from protocol import Network, accuracy, arguments, digits, learn, pretrained, table
from torch import Tensor, nn

import fallow
from fallow.objectives.output_terms import divergence, off_diagonal_covariance, spectral_share

SAMPLES, STEPS, BATCH, WRONG = 200, 120, 64, 0.4
ONE_RATE = (3e-3,)
LRS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TERMS = ("consistency", "diversity", "spectral")
WEIGHTS = {
    "LoRA": (0.0, 0.0, 0.0),
    "PiSSA": (0.0, 0.0, 0.0),
    "consistency 0.15": (0.15, 0.0, 0.0),
    "diversity 0.03": (0.0, 0.03, 0.0),
    "spectral 1": (0.0, 0.0, 1.0),
    "0.15, 0.03, 0.03 (paper)": (0.15, 0.03, 0.03),
    "v1: 1e-4, 3e-4, 1e-4": (1e-4, 3e-4, 1e-4),
}


def shifted(x: Tensor) -> Tensor:
    """One pixel to the right, (n, 64)."""
    return x.view(-1, 8, 8).roll(1, 2).index_fill(2, torch.tensor([0]), 0.0).flatten(1)


def run(label: str, lr: float, seed: int, sweep: bool) -> dict[str, float]:
    data, original = digits("turned", seed).source, pretrained("mlp", "turned", seed)
    model: Network = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(seed + 7)
    x, y = shifted(data["train"][0][:SAMPLES]), data["train"][1][:SAMPLES].clone()
    wrong = torch.rand(SAMPLES, generator=generator) < WRONG
    y[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)
    torch.manual_seed(seed + 1)
    fallow.attach(model, "lora", ["0", "2", "4"], rank=4, start=None if label == "LoRA" else "pissa")
    given = dict(zip(TERMS, WEIGHTS[label], strict=True))
    objective = fallow.BALoRA("nlu", **given, variant="v1" if label.startswith("v1") else "final")

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        return nn.functional.cross_entropy(logits, y) + objective(model, x, logits)

    learn(model, [p for p in model.parameters() if p.requires_grad], lr, (x, y), STEPS, BATCH, seed + 2, loss)
    part = "held out" if sweep else "test"
    images, labels = data[part]
    moved = shifted(images)
    with torch.no_grad():
        logits, before = model(moved), original(moved)
        return {
            "target": accuracy(model, (moved, labels)),
            "kept": accuracy(model, (images, labels)),
            "kl": float(divergence(logits, before) / len(moved)),
            "covariance": float(off_diagonal_covariance(logits)),
            "share": float(spectral_share(logits, 5)),
        }


if __name__ == "__main__":
    seeds = arguments(__doc__).seeds
    told = {"note": "shifted digits, 40% wrong labels", "samples": SAMPLES, "steps": STEPS, "batch": BATCH}
    for name, lrs in (("ba-lora", LRS), ("ba-lora-one-rate", ONE_RATE)):
        described: dict[str, dict[str, Any]] = {label: {"weights": w, "lrs": lrs} for label, w in WEIGHTS.items()}
        table(name, described, run, "target", seeds, told)
