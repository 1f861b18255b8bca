"""The plain reference: dense masked AdamW, written from the equations; slow and as large as full fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MaskedAdamW:
    """AdamW on the entries where mask is one; gradients and moments are dense, decay is masked."""

    def __init__(self, model: nn.Module, masks: dict[str, Tensor], lr: float, weight_decay: float = 0.0) -> None:
        self.params = {name: param for name, param in model.named_parameters() if name in masks}
        self.masks, self.lr, self.wd = masks, lr, weight_decay
        self.m = {name: torch.zeros_like(param) for name, param in self.params.items()}
        self.v = {name: torch.zeros_like(param) for name, param in self.params.items()}
        self.t = dict.fromkeys(self.params, 0)

    @torch.no_grad()
    def step(self) -> None:
        for name, w in self.params.items():
            if w.grad is None:
                continue
            mask, g = self.masks[name], w.grad * self.masks[name]
            self.t[name] += 1
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.v[name] = 0.999 * self.v[name] + 0.001 * g * g
            m = self.m[name] / (1 - 0.9 ** self.t[name])
            v = self.v[name] / (1 - 0.999 ** self.t[name])
            w.sub_(mask * (self.lr * self.wd * w + self.lr * m / (v.sqrt() + 1e-8)))

    def zero_grad(self) -> None:
        for param in self.params.values():
            param.grad = None


def smallest_masks(model: nn.Module, threshold: float) -> dict[str, Tensor]:
    return {name: (param.detach().abs() < threshold).to(param.dtype) for name, param in model.named_parameters()}
