"""PETALface's two branches and their gate against single LoRAs, on sharp and blurred digits at once.

python benchmarks/claims/petalface.py --seeds 5

The network of `protocol` has learned upright digits; it adapts to 300 sharp ones (transposed and inverted) and 300
blurred ones (mirrored, pooled by 2 and enlarged again), whose quality is the energy of their fine detail. `target` is
the mean accuracy on unseen ones of both kinds; `source` the accuracy on upright digits afterwards, `base` before.
"shuffled" permutes the qualities, in training and in the test; branches have no dropout here.
"""

from __future__ import annotations

import copy
import json
import statistics

import torch
import torch.nn.functional as F
from protocol import RESULTS, SWEEP_SEEDS, arguments, digits, pretrained
from torch import Tensor, nn

import fallow
from fallow.deltas.petalface import calibrated

LRS = (3e-3, 1e-2, 3e-2, 1e-1)
STEPS, EACH, BATCH = 400, 300, 64
FORMS = ("calibrated gate", "raw gate", "constant gate", "shuffled gate", "LoRA r=2", "LoRA r=4", "full")


def kinds(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sharp and the blurred form of upright digits (n, 64)."""
    images = x.view(-1, 1, 8, 8)
    small = F.avg_pool2d(images.flip(-1), 2)
    return 1 - images.mT.flatten(1), F.interpolate(small, scale_factor=2, mode="bilinear").flatten(1)


def quality(x: Tensor) -> Tensor:
    """(n,): the energy of what a 3 x 3 mean takes away."""
    images = x.view(-1, 1, 8, 8)
    return (images - F.avg_pool2d(F.pad(images, [1] * 4, mode="replicate"), 3, 1)).square().mean((1, 2, 3))


def run(form: str, lr: float, seed: int) -> dict[str, float]:
    data = digits("inverted", seed)
    parts = {}
    for name, (x, y) in data.source.items():
        sharp, blurred = kinds(x)
        count = EACH if name == "train" else len(x)
        parts[name] = (sharp[:count], y[:count]), (blurred[-count:], y[-count:])
    (sharp, one), (blurred, other) = parts["train"]
    x, y = torch.cat([sharp, blurred]), torch.cat([one, other])
    model = copy.deepcopy(pretrained("mlp", "inverted", seed))
    torch.manual_seed(seed + 1)
    if "LoRA" in form:
        fallow.attach(model, "lora", ["layers.0", "layers.2"], rank=int(form[-1]), seed=seed)
    elif form != "full":
        gate = calibrated(quality(x))
        if form == "raw gate":
            gate = {"threshold": gate["threshold"], "slope": 1.0, "clamp": False}
        fallow.attach(model, "petalface", ["layers.0", "layers.2"], rank=2, branch_dropout=0.0, seed=seed, **gate)
    middle = float(quality(x).mean())
    generator = torch.Generator().manual_seed(seed + 2)

    def forward(x: Tensor) -> Tensor:
        if form == "full" or "LoRA" in form:
            return model(x)
        q = quality(x)
        if form == "constant gate":
            q = torch.full_like(q, middle)
        if form == "shuffled gate":
            q = q[torch.randperm(len(q), generator=generator)]
        with fallow.condition(model, quality=q):
            return model(x)

    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (BATCH,), generator=generator)
        F.cross_entropy(forward(x[chosen]), y[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

    @torch.no_grad()
    def accuracy(x: Tensor, y: Tensor) -> float:
        together = torch.randperm(len(x), generator=generator)
        return float((forward(x[together]).argmax(1) == y[together]).float().mean())

    @torch.no_grad()
    def both(name: str) -> float:  # in one batch, so that shuffling mixes the two kinds
        (a, b), (c, d) = parts[name]
        return accuracy(torch.cat([a, c]), torch.cat([b, d]))

    return {
        "target": both("test"),
        "held_out": both("held out"),
        "source": accuracy(*data.source["test"]),
        "base": base_accuracy(pretrained("mlp", "inverted", seed), *data.source["test"]),
        "trained": sum(param.numel() for param in trained),
    }


@torch.no_grad()
def base_accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    told = arguments(__doc__)
    torch.set_num_threads(1)
    rows = {}
    for form in FORMS:
        sweep = {lr: statistics.fmean(run(form, lr, seed)["held_out"] for seed in SWEEP_SEEDS) for lr in LRS}
        lr = max(sweep, key=lambda rate: sweep[rate])
        runs = [run(form, lr, seed) for seed in range(told.seeds)]
        rows[form] = {"lr": lr, "at_edge": lr in (LRS[0], LRS[-1]), "sweep": sweep, "runs": runs}
        shown = ""
        for key in ("target", "source", "base"):
            values = [figures[key] for figures in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            shown += f"  {key} {statistics.fmean(values):.3f} ± {spread:.3f}"
        mark = "*" if rows[form]["at_edge"] else " "
        print(f"{form:16} lr {lr:<6g}{mark}{shown}  trained {runs[0]['trained']}", flush=True)
    (RESULTS / "claims-petalface.json").write_text(
        json.dumps({"name": "petalface", "torch": torch.__version__, "forms": rows}, indent=1) + "\n"
    )
