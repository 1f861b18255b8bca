"""Nuclear norm: pull a (masked) weight towards low rank.

SaRA (arXiv 2409.06633, section 4.2) adds lambda * sum_l ||W_l ⊙ M_l||_* to the loss, with M_l the mask of the trained
entries. The nuclear norm of X (m, n) is the sum of its singular values; with the thin SVD X = U S Vᵀ its subgradient is
the polar factor U_r V_rᵀ, r the rank (zero singular values contribute nothing):

    d||W ⊙ M||_* / dv = (U_r V_rᵀ).flat[index],      v = W.flat[index]

The polar factor comes from the Polar Express iteration ("polar": matrix products, no host sync, layers of one shape in
a batch), from plain Newton-Schulz, or, with mode="svd", exactly. At the start W ⊙ M is noise-like and the term acts as
a scale-free decay (U Vᵀ on the mask is almost parallel to W ⊙ M there); its effect on rank grows with the learned
structure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fallow.core.compact import Slot
from fallow.core.errors import ConfigError, SelectionError, nearest
from fallow.core.linalg import Polar, polar
from fallow.core.select import matrix_shape
from fallow.core.sharded import gathered, scattered

Mode = Literal["polar", "newton-schulz", "svd"]
POLAR_MODES: dict[str, Polar] = {"polar": "polar-express", "newton-schulz": "newton-schulz", "svd": "svd"}
BATCH = 1 << 24  # entries of the dense matrices that one batched polar factor may hold: 64 MiB in float32


def nuclear_norm(matrix: Tensor, mode: Mode = "svd") -> Tensor:
    """||X||_* of a matrix (m, n) or the sum over a batch (b, m, n), as a scalar loss term; differentiable once."""
    return _NuclearNorm.apply(matrix, POLAR_MODES[mode])


class _NuclearNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, mode: Polar) -> Tensor:
        factor = polar(matrix, mode=mode)
        ctx.save_for_backward(factor)
        return (matrix * factor).sum()  # <X, U Vᵀ> = trace(S): the value comes with the subgradient

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return upstream[0] * factor, None


def masked_subgradients(
    values: Sequence[Tensor], indices: Sequence[Tensor], shape: tuple[int, int], mode: Mode = "polar"
) -> list[Tensor]:
    """(U_r V_rᵀ).flat[index] for matrices of one shape given by their entries: `values` and sorted flat `indices`,
    (k,) each.
    """
    dense = values[0].new_zeros(len(values), shape[0] * shape[1])
    for row, value, index in zip(dense, values, indices, strict=True):
        row.index_copy_(0, index.long(), value)
    factors = polar(dense.view(len(values), *shape), mode=POLAR_MODES[mode]).reshape(dense.shape)
    return [row.index_select(0, index) for row, index in zip(factors, indices, strict=True)]


class NuclearNorm:
    """The term as a penalty of a selective optimizer: adds weight * subgradient to the compact gradients in each step.

    `layers`: "one" draws one layer per step, uniformly, from a generator seeded with `seed` (the official code's way;
    each layer then feels weight / number of layers on average), a number draws that many different ones, "all" takes
    all. A layer takes part if it is a matrix, its smaller side exceeds `min_side` and at least `min_selected` of its
    entries are in training: the official rule. `convs` also takes convolutions, as (C_out, C_in * kh * kw).
    """

    def __init__(
        self,
        weight: float,
        layers: int | str = "one",
        mode: Mode = "polar",
        min_side: int = 64,
        min_selected: int = 101,
        convs: bool = False,
        seed: int = 0,
    ) -> None:
        if not 0 < weight < float("inf"):
            raise ConfigError(
                f"rank_weight={weight} must be a number > 0 (0 turns the term off); the paper's best is 5e-3"
            )
        if isinstance(layers, bool) or not (layers in ("one", "all") or (isinstance(layers, int) and layers >= 1)):
            raise ConfigError(f"rank_layers={layers!r} must be 'one', 'all' or a number of layers from 1")
        if mode not in POLAR_MODES:
            raise ConfigError(f"rank_mode={mode!r} does not exist{nearest(str(mode), POLAR_MODES)}")
        self.weight, self.layers, self.mode = weight, 1 if layers == "one" else layers, mode
        self.min_side, self.min_selected, self.convs = min_side, min_selected, convs
        self.generator = torch.Generator().manual_seed(seed)

    def qualify(self, slots: Sequence[Slot]) -> list[Slot]:
        """The layers that take part now; a re-selection may leave fewer."""
        return [
            slot
            for slot in slots
            if (slot.weight.ndim == 2 or (self.convs and slot.weight.ndim > 2))
            and min(matrix_shape(slot.weight)) > self.min_side
            and slot.count >= self.min_selected
        ]

    def check(self, slots: Sequence[Slot]) -> None:
        """SelectionError when no layer takes part: the term would silently do nothing."""
        if not self.qualify(slots):
            raise SelectionError(
                f"rank_weight={self.weight} has no layer to act on: none is a matrix with both sides over "
                f"{self.min_side} and "
                f"{self.min_selected} or more selected entries; lower rank_min_side or rank_min_selected, or set "
                "rank_weight=0"
            )

    @torch.no_grad()
    def add(self, slots: Sequence[Slot]) -> None:
        """Add the term to the proxies' gradients; a layer without one counts as having task gradient zero."""
        self.add_to(self.draw(slots))

    def draw(self, slots: Sequence[Slot]) -> list[Slot]:
        """The layers that the term takes in this step."""
        return self._draw(self.qualify(slots))

    @torch.no_grad()
    def add_to(self, slots: Sequence[Slot]) -> None:
        """Add the term of these layers to their proxies' gradients."""
        for batch in self._batches(slots):
            shape = matrix_shape(batch[0].weight)
            # Of sharded weights every rank takes in all entries and makes the factor of the whole.
            held = [gathered(slot.part, slot.trained, slot.values()) for slot in batch]
            indices, values = [index for index, _ in held], [value for _, value in held]
            parts = masked_subgradients(values, indices, shape, self.mode)
            for slot, index, part in zip(batch, indices, parts, strict=True):
                part = (self.weight * scattered(slot.part, index, part)[1]).to(slot.proxy.dtype)
                slot.proxy.grad = part if slot.proxy.grad is None else slot.proxy.grad + part

    def _draw(self, slots: list[Slot]) -> list[Slot]:
        if not isinstance(self.layers, int) or not slots:
            return slots
        # On the CPU: the choice is the same on every device and rank, and needs no device sync.
        order = torch.randperm(len(slots), generator=self.generator)[: self.layers]
        return [slots[i] for i in sorted(order.tolist())]

    def _batches(self, slots: Sequence[Slot]) -> Iterator[list[Slot]]:
        """Layers of one shape, device and precision together, as many as `BATCH` entries hold."""
        groups = defaultdict(list)
        for slot in slots:
            groups[matrix_shape(slot.weight), slot.proxy.device, slot.precision].append(slot)
        for (shape, _, _), group in groups.items():
            size = max(1, BATCH // (shape[0] * shape[1]))
            for start in range(0, len(group), size):
                yield group[start : start + size]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())
