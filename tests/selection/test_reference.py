"""All parts of SaRA together against the equations in dense float64, over random combinations of its options."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn

import fallow


class DenseSaRA:
    """Every equation of the specification on dense tensors: mask, clip, low-rank term, AdamW, re-selection."""

    def __init__(self, model: nn.Module, threshold: float, lr: float, decay: float, rank_weight: float) -> None:
        self.params, self.threshold, self.lr = dict(model.named_parameters()), threshold, lr
        self.decay, self.rank_weight = decay, rank_weight
        self.mask = {name: (p.detach().abs() < threshold).double() for name, p in self.params.items()}
        self.restart()

    def restart(self) -> None:
        self.m = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.t = 0

    @torch.no_grad()
    def step(self, clip: float | None) -> None:
        grads = {name: p.grad * self.mask[name] for name, p in self.params.items()}
        if clip is not None:
            norm = torch.stack([g.norm() for g in grads.values()]).norm()
            grads = {name: g * min(1.0, clip / (norm.item() + 1e-6)) for name, g in grads.items()}
        self.t += 1
        for name, w in self.params.items():
            mask, g = self.mask[name], grads[name]
            if self.rank_weight and w.ndim == 2 and min(w.shape) > 10 and mask.sum() >= 3:
                g = g + self.rank_weight * self.polar(w * mask) * mask
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.v[name] = 0.999 * self.v[name] + 0.001 * g * g
            change = (self.m[name] / (1 - 0.9**self.t)) / ((self.v[name] / (1 - 0.999**self.t)).sqrt() + 1e-8)
            w.sub_(mask * self.lr * (self.decay * w + change))
            w.grad = None

    @staticmethod
    def polar(x: Tensor) -> Tensor:
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        return (u * (s > 1e-6 * s[0])) @ vt

    @torch.no_grad()
    def reselect(self, reset: bool) -> None:
        self.mask = {name: self.mask[name] * (p.abs() < self.threshold) for name, p in self.params.items()}
        if reset:
            self.restart()
        for moment in (self.m, self.v):
            for name in moment:
                moment[name] *= self.mask[name]


@pytest.mark.parametrize("trial", range(16))
def test_every_combination_of_options_follows_the_dense_equations(trial):
    draw = random.Random(trial)
    torch.manual_seed(trial)
    steps, accumulate = draw.randint(4, 10), draw.choice([1, 3])
    threshold, lr, decay = draw.choice([0.02, 0.05, 0.1]), draw.choice([1e-2, 3e-3]), draw.choice([0.0, 0.1])
    rank_weight, clip, reset = draw.choice([0.0, 0.05]), draw.choice([None, 0.1]), draw.choice([False, True])
    reselect_at = draw.choice([[], [steps // 2], [2, steps - 1]])
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 30), nn.LayerNorm(30), nn.Linear(30, 5)).double()
    reference = copy.deepcopy(model)
    dense = DenseSaRA(reference, threshold, lr, decay, rank_weight)
    optimizer = fallow.SaRA(
        model, threshold=threshold, lr=lr, weight_decay=decay, rank_weight=rank_weight, rank_layers="all",
        rank_mode="svd", rank_min_side=10, rank_min_selected=3, reselect_at=reselect_at, reset_state=reset,
    )  # fmt: skip
    for step in range(1, steps + 1):
        for _ in range(accumulate):
            x, y = torch.randn(6, 20).double(), torch.randint(0, 5, (6,))
            for net in (model, reference):
                nn.functional.cross_entropy(net(x), y).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(optimizer.trainable(), clip)
        optimizer.step()
        optimizer.zero_grad()
        dense.step(clip)
        if step in reselect_at:
            dense.reselect(reset)
    assert optimizer.live_parameters == int(sum(mask.sum() for mask in dense.mask.values()))
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11, msg=name)
