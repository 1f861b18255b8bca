"""What the experiments on rules of update share: digits that turn, learned by a given optimizer.

A rule is `make(model, lr)`, which returns the optimizer; a contender is a rule with the adapter that it trains (None
for every weight). `protocol.table` gives each its own best rate, or the one rate that it lists.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from protocol import Setting, accuracy, digits, pretrained
from torch import Tensor, nn

import fallow

DIVERGED = 100.0  # stands for figures that are larger or no numbers
Make = Callable[[nn.Module, float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Rule:
    """`method`: a weight parameterization's name, None for every weight. `lrs`: the rates that are tried."""

    make: Make
    lrs: Sequence[float]
    method: str | None = "lora"
    options: Mapping[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        return {"method": self.method or "full", "options": dict(self.options), "lrs": tuple(self.lrs)}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(trained(model), lr=lr)


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(model), lr=lr)


@dataclass
class Run:
    """A network in training, for measures of a script's own."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: tuple[Tensor, Tensor]


def run(
    rule: Rule,
    lr: float,
    seed: int,
    setting: Setting,
    *,
    relabel: Callable[[Tensor, int], Tensor] | None = None,
    each_step: Callable[[Run, int], Mapping[str, float] | None] | None = None,
    at_end: Callable[[Run, int], Mapping[str, float]] | None = None,
) -> dict[str, float]:
    """The figures of one run. `relabel(y, seed)`: the labels that are learned from. `each_step(run, step)`: figures
    after that step, from 1; `at_end(run, seed)`: others at the end.
    """
    torch.set_num_threads(1)
    data = digits(setting.change, seed)
    model = copy.deepcopy(pretrained(setting.net, setting.change, seed))
    torch.manual_seed(seed + 1)
    if rule.method is not None:
        layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        fallow.attach(
            model, rule.method, layers if setting.targets == "all" else layers[:-1], seed=seed, **rule.options
        )
    optimizer = rule.make(model, lr)
    x, y = (part[: setting.samples] for part in data.target["train"])
    y = y if relabel is None else relabel(y, seed)
    now, figures = Run(model, optimizer, (x, y)), dict[str, float]()
    generator, start = torch.Generator().manual_seed(seed + 2), time.process_time()
    model.train()
    loss = torch.tensor(DIVERGED)
    with suppress(fallow.TrainingError):  # which some optimizers raise when values are no numbers any more
        for step in range(1, setting.steps + 1):
            chosen = torch.randint(len(x), (setting.batch,), generator=generator)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
            loss.backward()
            optimizer.step()
            figures |= (each_step(now, step) if each_step else None) or {}
    seconds = time.process_time() - start
    model.eval()
    figures |= at_end(now, seed) if at_end else {}
    held_out = accuracy(model, data.target["held out"])
    found = {
        "target": accuracy(model, data.target["test"]),
        "held_out": held_out if loss.isfinite() else 0.0,
        "loss": float(loss.detach()),
        "seconds": seconds,
        **figures,
    }
    return {key: min(value, DIVERGED) if math.isfinite(value) else DIVERGED for key, value in found.items()}
