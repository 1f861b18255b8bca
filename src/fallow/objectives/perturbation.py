"""PELA's weight perturbation: no entry of a change may leave a ball around the pretrained weight.

"PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", arXiv 2310.10700. D (out, in) = W' - W of each
of L layers:

    penalty = weight / L * sum_l (max_ij |D_ij| - eps)²              "hinge": max(0, max_ij |D_ij| - eps)²

The square, which is the official code's, also pulls a change that is too small outwards to eps; the paper says |D|_inf
<= eps, which the hinge is. The norm is the largest absolute entry. Of D = B A it is found tile by tile, without D, and
is then one row of B times one column of A: only these get a gradient. Other Deltas have their D made.

It is a mean over layers and of single entries, so it depends on neither width nor their number; but one entry a layer
and step moves, so for wide layers it takes a larger weight or many steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.core.delta import Delta, number, one_of
from fallow.core.errors import ConfigError
from fallow.core.objective import Objective, each, in_float32

TILE = 1 << 22  # entries of D that exist at one time


@dataclass
class WeightPerturbation(Objective):
    """`weight`: of the mean over layers. `eps`: the radius of the ball. `form`: "square" or "hinge", see above."""

    name: ClassVar[str] = "weight-perturbation"
    weight: float = 1.0
    eps: float = 1e-3
    form: str = "square"

    def __post_init__(self) -> None:
        number("weight", self.weight)
        number("eps", self.eps)
        one_of("form", self.form, ("square", "hinge"))

    @in_float32
    def penalty(self, deltas: Mapping[str, Delta]) -> Tensor | None:
        """ConfigError for a Delta that changes no weight."""
        if not self.weight:
            return None
        gaps = [largest_change(delta, name) - self.eps for name, delta in each(deltas)]
        together = torch.stack([gap.to(gaps[0]) for gap in gaps])
        together = together.clamp_min(0) if self.form == "hinge" else together
        return self.weight * together.square().mean()


def largest_change(delta: Delta, name: str = "") -> Tensor:
    """max_ij |W'_ij - W_ij| in float32 or wider: a scalar with a gradient for one entry."""
    if delta.exact:
        b, a = delta.factors()
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
        return largest_of_product(b.to(wide), a.to(wide))
    if not delta.mergeable:
        raise ConfigError(f"objective 'weight-perturbation' needs a new weight; '{delta.name}' of '{name}' has none")
    if delta.mode == "add":
        change = delta.delta_weight()
    else:
        w = delta.stored().to(delta.dtype)
        change = delta.transform(w) - w
    flat = change.flatten()
    return flat[flat.detach().abs().argmax()].abs()


def largest_of_product(b: Tensor, a: Tensor) -> Tensor:
    """max_ij |(B A)_ij| of B (out, r) and A (r, in), without B A; nothing is read back to the host."""
    rows = max(1, TILE // a.shape[1])
    with torch.no_grad():
        found = [(part @ a).abs().flatten().max(0) for part in b.split(rows)]
        values = torch.stack([value for value, _ in found])
        place = torch.stack([index + i * rows * a.shape[1] for i, (_, index) in enumerate(found)])[values.argmax()]
        row, column = place // a.shape[1], place % a.shape[1]
    return (b.index_select(0, row.view(1)) @ a.index_select(1, column.view(1))).abs().squeeze()
