"""A learning experiment of seconds that the scripts beside it share: digits that turn.

A small network learns scikit-learn's 8 x 8 digits upright, then adapts to changed ones (turned by 90 degrees, or
transposed and inverted) with a method in its layers. `compare` gives every contender its own learning rate, the best
on three seeds by held-out digits, and runs it at that rate on several other seeds:

    from protocol import Contender, Setting, arguments, compare

    compare("my-claim", [
        Contender("LoRA r=4", "lora", {"rank": 4}),
        Contender("SoRA", "sora", {"rank": 8}, lr_factors={"gate": 10.0}),
        Contender("full", "full"),
    ], seeds=5, setting=Setting(change="turned", steps=300))

Reported, as mean and standard deviation over the seeds: `target`, test accuracy on the changed digits; `forgotten`,
test accuracy on upright digits lost meanwhile; `trained` numbers; `seconds` of processor time in training; and what
`measure(model, digits)` of the caller adds. A rate at the edge of those tried is marked in the table: widen `lrs` then.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fallow
from fallow.core import schedule

RESULTS = Path(__file__).parents[1] / "results"
LRS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SWEEP_SEEDS = (1000, 1001, 1002)  # none of those that are reported
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
SAMPLES, HELD_OUT = 1000, 300  # the rest, 497, is the test

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": lambda x: x.rot90(1, (1, 2)),
    "inverted": lambda x: 1 - x.mT,
}


@dataclass(frozen=True)
class Setting:
    """`change`: of the digits, a name in CHANGES. `net`: "mlp" 64-128-128-10, "deep" or "conv". `targets`: which of its
    layers are adapted, "hidden" (all but the last) or "all". `samples`: changed digits to learn from, None for 1000.
    """

    change: str = "turned"
    net: str = "mlp"
    targets: str = "hidden"
    steps: int = 300
    batch: int = 64
    samples: int | None = None


@dataclass(frozen=True)
class Contender:
    """`method`: a Delta's name with its options, or "full" (every weight). `lr_factors`: {last part of a parameter's
    name: factor}. `lrs`: its own rates to try. `patterns`: as of `fallow.attach`. `loss(model, x, y)`: None for the
    cross entropy. `seen(model, digits)`: options that the pretrained network and its data decide, `start` or `budget`.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    lrs: Sequence[float] | None = None
    patterns: Mapping[str, Mapping[str, Any]] | None = None
    loss: Loss | None = None
    seen: Callable[[nn.Module, Digits], Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Digits:
    """Images (N, 64) in [0, 1] with their labels (N,): upright and changed ones, in three parts."""

    source: dict[str, tuple[Tensor, Tensor]]
    target: dict[str, tuple[Tensor, Tensor]]


@lru_cache
def digits(change: str, seed: int) -> Digits:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, 8, 8), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = dict(zip(("train", "held out", "test"), order.tensor_split((SAMPLES, SAMPLES + HELD_OUT)), strict=True))
    return Digits(
        *({name: (function(x[part]).flatten(1), y[part]) for name, part in parts.items()}
          for function in (lambda x: x, CHANGES[change]))
    )  # fmt: skip


class Network(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


def network(net: str) -> Network:
    if net == "mlp":
        return Network(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    if net == "deep":  # layers of four shapes
        sides = [64, 128, 96, 96, 64, 32, 10]
        layers = [layer for a, b in pairwise(sides) for layer in (nn.Linear(a, b), nn.ReLU())]
        return Network(*layers[:-1])
    return Network(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def learn(
    model: nn.Module, groups: Any, lr: float, data: tuple[Tensor, Tensor], steps: int, batch: int, seed: int,
    loss: Loss = cross_entropy,
) -> None:  # fmt: skip
    """Adam with the loss of random batches; Deltas are told of each step, and their loss() counts."""
    optimizer = torch.optim.Adam(groups, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    schedule.resolve(model, steps)
    model.train()
    x, y = data
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch,), generator=generator)
        loss(model, x[chosen], y[chosen]).backward()
        optimizer.step()
        fallow.step(model)
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return float((model(data[0]).argmax(1) == data[1]).float().mean())


@lru_cache
def pretrained(net: str, change: str, seed: int) -> nn.Module:
    """A network that has learned the upright digits, 1000 steps of Adam at 1e-3. Copy it before use."""
    torch.manual_seed(seed)
    model = network(net)
    learn(model, model.parameters(), 1e-3, digits(change, seed).source["train"], 1000, 64, seed)
    return model


def adapt(contender: Contender, lr: float, seed: int, setting: Setting) -> tuple[nn.Module, dict[str, float]]:
    """The adapted network and its figures."""
    data = digits(setting.change, seed)
    model = copy.deepcopy(pretrained(setting.net, setting.change, seed))
    before = accuracy(model, data.source["test"])
    torch.manual_seed(seed + 1)
    if contender.method != "full":
        layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        targets = layers if setting.targets == "all" else layers[:-1]
        options = {**contender.options, **(contender.seen(model, data) if contender.seen else {})}
        fallow.attach(model, contender.method, targets, seed=seed, patterns=contender.patterns, **options)
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    factors = contender.lr_factors
    groups = [{"params": [p], "lr": lr * factors.get(name.split(".")[-1], 1.0)} for name, p in params.items()]
    x, y = data.target["train"]
    start = time.process_time()
    samples = x[: setting.samples], y[: setting.samples]
    learn(model, groups, lr, samples, setting.steps, setting.batch, seed + 2, contender.loss or cross_entropy)
    return model, {
        "target": accuracy(model, data.target["test"]),
        "held_out": accuracy(model, data.target["held out"]),
        "forgotten": before - accuracy(model, data.source["test"]),
        "trained": sum(param.numel() for param in params.values()),
        "seconds": time.process_time() - start,
    }


def compare(
    name: str,
    contenders: Sequence[Contender],
    *,
    seeds: int = 5,
    lrs: Sequence[float] = LRS,
    setting: Setting | None = None,
    measure: Callable[[nn.Module, Digits], Mapping[str, float]] | None = None,
    note: str = "",
) -> dict[str, dict[str, Any]]:
    """{label: figures}, also printed and written to benchmarks/results/claims-<name>.json."""
    setting = setting or Setting()
    named = {contender.label: contender for contender in contenders}

    def run(label: str, lr: float, seed: int, sweep: bool) -> dict[str, float]:
        model, figures = adapt(named[label], lr, seed, setting)
        return {**figures, **(measure(model, digits(setting.change, seed)) if measure and not sweep else {})}

    told = {"note": note, "setting": asdict(setting)}
    described = {
        label: {"method": one.method, "options": dict(one.options), "lrs": tuple(one.lrs or lrs)}
        for label, one in named.items()
    }
    return table(name, described, run, "held_out", seeds, told)


def table(
    name: str,
    contenders: Mapping[str, Mapping[str, Any]],
    run: Callable[[str, float, int, bool], dict[str, float]],
    score: str,
    seeds: int,
    told: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """For experiments of their own: the figures of `run(label, lr, seed, sweep)` at each contender's best of its `lrs`.

    `score`: the figure that decides, of runs with sweep=True, which measure held-out data. `told`: kept in the file.
    """
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    for label, described in contenders.items():
        tried = described["lrs"]
        sweep = {lr: statistics.fmean(run(label, lr, seed, True)[score] for seed in SWEEP_SEEDS) for lr in tried}
        lr = max(tried, key=lambda rate: sweep[rate])
        runs = [run(label, lr, seed, False) for seed in range(seeds)]
        spread = {
            key: {
                "mean": statistics.fmean(run[key] for run in runs),
                "deviation": statistics.stdev(run[key] for run in runs) if seeds > 1 else 0.0,
            }
            for key in runs[0]
        }
        rows[label] = {
            **{key: value for key, value in described.items() if key != "lrs"}, "lr": lr, "sweep": sweep,
            "at_edge": len(tried) > 1 and lr in (min(tried), max(tried)), "figures": spread, "runs": runs,
        }  # fmt: skip
        if len(rows) == 1:
            print(head(spread), flush=True)
        print(line(label, rows[label]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    known = {"name": name, **told, "seeds": seeds, "sweep_seeds": SWEEP_SEEDS, "torch": torch.__version__}
    (RESULTS / f"claims-{name}.json").write_text(json.dumps({**known, "contenders": rows}, indent=1) + "\n")
    return rows


def head(spread: Mapping[str, Any]) -> str:
    return f"{'':28}{'lr':>9} " + "".join(f"{key:>18}" for key in spread)


def line(label: str, row: Mapping[str, Any]) -> str:
    cells = ""
    for key, value in row["figures"].items():
        shown = f"{value['mean']:.0f}" if key == "trained" else f"{value['mean']:.3f} ± {value['deviation']:.3f}"
        cells += f"{shown:>18}"
    return f"{label:28}{row['lr']:>9g}{'*' if row['at_edge'] else ' '}{cells}"


def arguments(description: str | None, seeds: int = 5) -> argparse.Namespace:
    """`--seeds` of a script, told by the first line of its description."""
    parser = argparse.ArgumentParser(description=(description or "").strip().split("\n")[0])
    parser.add_argument("--seeds", type=int, default=seeds, help="how many runs each contender gets at its best rate")
    return parser.parse_args()
