"""Random: train entries of the existing weights that were drawn uniformly.

The baseline of every selective method, and an ablation of SaRA (arXiv 2409.06633, table 6). Positions are drawn without
replacement over all eligible entries, from a generator of its own for each weight: seeded by (seed, name), so they
are the same on every machine and do not depend on which other weights are trained with a `density`.

    M uniform with exactly K ones;  everything else as in SaRA
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fallow.core.select import Patterns, Selector, Target, choose, seeded
from fallow.selection.rules import Rule
from fallow.selection.selective import Selective


def random(seed: int = 0) -> Selector:
    """A selector of entries by chance; by threshold, each entry is taken with that probability."""

    def chance(target: Target) -> Tensor:
        return torch.rand(target.weight.shape, generator=seeded(seed, target.name)).to(target.weight.device)

    return lambda targets, amount: choose(targets, chance, amount)


class Random(Selective):
    """Trains entries chosen by chance: a `fraction` (0.05 by default), a `budget`, or a `density` of each weight.

    `lr`: 5e-4, which is SaRA's at the paper's main threshold. `seed`: of the draw. The other arguments are those of
    `SaRA`.
    """

    def __init__(
        self,
        model: nn.Module,
        fraction: float | None = None,
        budget: int | None = None,
        density: float | None = None,
        lr: float = 5e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        include: Patterns = None,
        exclude: Patterns = None,
        rule: Rule | None = None,
        row_chunk: int | str | None = None,
        in_backward: bool = False,
        state_bits: Literal[8, 32] = 32,
        seed: int = 0,
    ) -> None:
        if fraction is None and budget is None and density is None:
            fraction = 0.05
        super().__init__(
            model, random(seed), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fraction=fraction,
            budget=budget, density=density, include=include, exclude=exclude, rule=rule,
            row_chunk=row_chunk, in_backward=in_backward, state_bits=state_bits,
            metadata={"method": "random", "seed": seed},
        )  # fmt: skip
