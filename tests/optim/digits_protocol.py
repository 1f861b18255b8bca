"""The small experiment of GaLore's specification: an MLP on sklearn's digits, its first two weights projected."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

Make = Callable[[list[nn.Parameter], list[nn.Parameter]], torch.optim.Optimizer]


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1400 pictures and labels, standardised by one mean and deviation."""
    sklearn = pytest.importorskip("sklearn.datasets")
    images, labels = sklearn.load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:1400]
    x = torch.tensor(images / 16, dtype=torch.float32)
    return ((x - x.mean()) / x.std())[order], torch.tensor(labels)[order]


def loss_after(make: Make, seeds: int = 5, steps: int = 150) -> float:
    """The loss over all 1400 after so many batches of 64, mean over seeds; `make` takes the first two weights and the
    rest.
    """
    x, y = digits()
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        projected = [model[0].weight, model[2].weight]
        optimizer = make(projected, [p for p in model.parameters() if all(p is not one for one in projected)])
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            batch = torch.randint(0, len(x), (64,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            found.append(float(nn.functional.cross_entropy(model(x), y)))
    return sum(found) / len(found)
