"""Largest: train the entries of the existing weights whose magnitude is largest.

The counterpart of SaRA in its ablation (arXiv 2409.06633, table 6): it fits the new domain about as well and forgets
the most, since the large entries carry what the network knows. A baseline, and the selector that SHiRA's "wm" uses per
layer.

    M = 1[|W0| >= theta];  everything else as in SaRA
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from fallow.core.select import Amount, Patterns, Selection, Target, choose, magnitude
from fallow.selection.rules import Rule
from fallow.selection.selective import Selective


def largest(targets: Sequence[Target], amount: Amount) -> Selection:
    """Select the entries with the largest |W|, compared in float32; a threshold selects |W| >= threshold."""
    return choose(targets, magnitude, amount, largest=True)


class Largest(Selective):
    """Trains the largest entries: `threshold` (|W| >= threshold), `fraction` (0.05 by default) or `budget`.

    `lr`: 5e-4, which is SaRA's at the paper's main threshold. The other arguments are those of `SaRA`.
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float | None = None,
        fraction: float | None = None,
        budget: int | None = None,
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
    ) -> None:
        if threshold is None and fraction is None and budget is None:
            fraction = 0.05
        super().__init__(
            model, largest, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, threshold=threshold,
            fraction=fraction, budget=budget, include=include, exclude=exclude, rule=rule,
            row_chunk=row_chunk, in_backward=in_backward, state_bits=state_bits,
            metadata={"method": "largest"},
        )  # fmt: skip
