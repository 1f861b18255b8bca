"""What accompanies the training of an adapter: SaRA's low-rank term and its re-selection, with any torch optimizer.

    before a step   g += lambda * (U Vᵀ).flat[M]      by torch's hook before `Optimizer.step`, once per optimizer step
    after a step    live &= |first + values| < theta  by `fallow.step(model)`, at the given steps

Entries that are frozen keep their place in the compact Parameter, so an optimizer's moments stay aligned: their
gradient is masked, and what momentum or weight decay still moves is put back before the next forward or save.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fallow.core import schedule
from fallow.core.compact import Slot
from fallow.core.peft_host import Site
from fallow.core.weakly import Weakly
from fallow.objectives.nuclear import NuclearNorm
from fallow.selection.peft_entries import Entries, precision

_TERMS: weakref.WeakSet[_Term] = weakref.WeakSet()


class _Part:
    """An adapter's entries in one layer as the penalty sees a slot: those that are trained now."""

    part = None  # all of the weight is here

    def __init__(self, weight: nn.Parameter, entries: Entries) -> None:
        self.weight, self.entries, self.precision = weight, entries, precision(weight)
        self.proxy, self.live = entries.values, entries.trained
        if self.live is not None:
            self.proxy = nn.Parameter(entries.values.detach().index_select(0, self.live))
            if entries.values.grad is not None:
                self.proxy.grad = entries.values.grad.index_select(0, self.live)

    @property
    def count(self) -> int:
        return self.proxy.numel()

    @property
    def trained(self) -> Tensor:
        index = self.entries.index
        return index if self.live is None else index.index_select(0, self.live)

    def values(self) -> Tensor:
        values = self.entries.first.to(self.precision) + self.entries.change()
        return values if self.live is None else values.index_select(0, self.live)

    def give_back(self) -> None:
        """The gradient of the entries trained now to the adapter's Parameter; the others have none."""
        if self.live is not None and self.proxy.grad is not None:
            grad = torch.zeros_like(self.entries.values)
            self.entries.values.grad = grad.index_copy_(0, self.live, self.proxy.grad)


class _Term:
    """Carried by the first of its entries, so that a copy of them has one of its own."""

    def __init__(self, penalty: NuclearNorm, weights: Mapping[str, nn.Parameter], made: Mapping[str, Entries]) -> None:
        self.penalty, self.weights, self.entries = penalty, Weakly(weights), Weakly(made)
        self._begin()

    def _begin(self) -> None:
        _hook_all_optimizers()
        _TERMS.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def parts(self) -> list[_Part]:
        weights = dict(self.weights.items())
        return [_Part(weights[key], entries) for key, entries in self.entries.items() if key in weights]

    def add(self, optimizer: torch.optim.Optimizer) -> None:
        trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
        parts = [part for part in self.parts() if id(part.entries.values) in trained]
        if not any(part.proxy.grad is not None for part in parts):
            return
        weight, scale = self.penalty.weight, getattr(optimizer, "grad_scale", None)
        if scale is not None:  # a fused optimizer divides by it inside its step
            self.penalty.weight = weight * float(scale)
        try:
            self.penalty.add(cast(list[Slot], parts))
        finally:
            self.penalty.weight = weight
        for part in parts:
            part.give_back()


def add_penalty(penalty: NuclearNorm, sites: Mapping[str, Site], made: Mapping[str, Entries]) -> None:
    """Add the term to the gradients of these entries before each step of whatever torch optimizer trains them."""
    term = _Term(penalty, {key: site.weight for key, site in sites.items()}, made)
    penalty.check(cast(list[Slot], term.parts()))
    next(iter(made.values())).__dict__["term"] = term


@cache
def _hook_all_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for term in list(_TERMS):
        term.add(optimizer)


class _Reselection:
    def __init__(self, made: Mapping[str, Entries], threshold: float) -> None:
        self.entries, self.threshold = Weakly(made), threshold

    def __call__(self, step: int) -> None:
        present = [entries for entries in self.entries.values() if entries.values.requires_grad]
        kept = [(e.first.to(e.values.dtype) + e.change()).abs() < self.threshold for e in present]
        if any(bool((cast(Tensor, entries.live) & mask).any()) for entries, mask in zip(present, kept, strict=True)):
            for entries, mask in zip(present, kept, strict=True):
                entries.freeze(mask)


def reselect_later(plan: schedule.Schedule, made: Mapping[str, Entries], threshold: float) -> None:
    """Let `fallow.step(model)` freeze, at the planned steps, the entries that are no longer below the threshold."""
    plan.action = _Reselection(made, threshold)
    schedule.carry(next(iter(made.values())), plan)
