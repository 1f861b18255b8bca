"""How much noise each row of a layer gets: LoRA-GGPO's rule, and Flat-LoRA's.

    variance   std_i = sigma / sqrt(in) sqrt(|W'_i|² + beta |G_i|²)
    kohya      std_i = (sigma |W'_i| + beta |G_i|²) / sqrt(out)

`ramp`: "cosine" lets sigma rise from 0 at the first step to its value after `total` steps, sigma / 2 (1 - cos(pi t /
T)).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from fallow.core.delta import number, one_of, whole
from fallow.optim.perturbed import Layer

Combine = Literal["variance", "kohya"]
Ramp = Literal["cosine"] | None


class RowNoise:
    """`rows`: |G_i|² (out,) of the layers, by name; none at first. ConfigError for values that cannot be."""

    def __init__(self, sigma: float, beta: float, ramp: Ramp, total: int | None, combine: Combine, seed: int) -> None:
        number("sigma", sigma)
        one_of("ramp", ramp, (None, "cosine"))
        one_of("combine", combine, get_args(Combine))
        whole("seed", seed, least=0)
        if ramp is not None:
            whole("total_steps", total)
        self.sigma, self.beta, self.ramp, self.total, self.combine, self.seed = sigma, beta, ramp, total, combine, seed
        self.rows: dict[str, Tensor] = {}

    def sigma_at(self, steps: int) -> float:
        """After so many steps."""
        if self.ramp is None or self.total is None:
            return self.sigma
        return self.sigma * 0.5 * (1 - math.cos(math.pi * min(steps, self.total) / self.total))

    @torch.no_grad()
    def deviations(self, layer: Layer, steps: int) -> Tensor:
        """std (out,) after so many steps."""
        sigma, rows, (out, inner) = self.sigma_at(steps), layer.row_norms_squared(), layer.view.shape
        guide = self.beta * self.rows.get(layer.name, torch.zeros_like(rows))
        if self.combine == "kohya":
            return (sigma * rows.sqrt() + guide) / math.sqrt(out)
        return sigma / math.sqrt(inner) * (rows + guide).sqrt()

    def change(self, layer: Layer, x: Tensor, steps: int) -> Tensor | None:
        """E x, the same E in all passes of a step; None where there is no noise."""
        if self.sigma_at(steps) == 0:
            return None
        if layer.drawn is None:
            layer.drawn = self.deviations(layer, steps)
        return layer.noisy(x, layer.drawn, (self.seed * 1_000_003 + steps) * 10_007 + layer.index)
