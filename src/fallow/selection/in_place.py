"""Runs a module on its base weight with the chosen entries of the active adapters written into it, in place.

The forward is the module's own, with the weight swapped for an alias that leads autograd to the compact values. Writes
do not concern autograd: before the backward of a forward that ran with other adapters, those are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fallow.core.compact import gather, scatter
from fallow.core.errors import AdapterError, ModelError
from fallow.core.peft_host import Active, FallowLayer

if TYPE_CHECKING:
    from fallow.selection.peft_entries import Entries

Shown = tuple[tuple[Any, float], ...]


class InPlace:
    """How the `Entries` of a layer act: in the base weight itself. `shown`: those that it holds at the moment."""

    def __init__(self, layer: FallowLayer) -> None:
        self.layer = layer
        self.shown: Shown = ()
        self.versions: tuple[int, ...] = ()
        self.stale = False  # whether values may have been changed in ways that leave their version as it was
        self.union: tuple[list[Tensor], Tensor, Tensor, list[Tensor]] | None = None

    @property
    def name(self) -> str:
        return f"a {type(self.layer.get_base_layer()).__name__} of {tuple(self.layer.parameter.shape)}"

    @torch.no_grad()
    def settle(self, active: Active, rewrite: bool = False) -> None:
        """Let the weight hold these; `rewrite` also where nothing seems to have changed.

        Optimizers outside torch and averages of weights write through `param.data`, unseen by version counters; so in
        training the values are written in each forward, k of them.
        """
        weight = self.layer.parameter
        if not active and not self.shown:
            return
        if weight.is_meta:
            raise ModelError(f"{self.name} was offloaded, so that nothing can be written into it; keep it on a device")
        if not all(delta.bound for delta, _ in active):
            self._restore(weight)
            for delta, _ in active:
                if not delta.bound:
                    delta.bind(weight, self.name)
        versions = tuple(delta.values._version for delta, _ in active)
        if tuple(active) == self.shown:
            if rewrite or self.stale or versions != self.versions:
                self._write(weight.data, active)  # .data: the same state goes on, of which autograd need not know
        else:
            self._restore(weight)
            self.shown = tuple(active)
            self._write(weight, active)
        self.versions, self.stale = versions, rewrite

    def _restore(self, weight: Tensor) -> None:
        for delta, _ in self.shown:
            scatter(weight, delta.index, delta.first)
        self.shown = ()

    def _write(self, weight: Tensor, active: Active) -> None:
        if len(active) == 1:
            ((delta, scale),) = active
            scatter(weight, delta.index, delta.first.to(delta.values.dtype) + delta.change(scale))
        elif active:
            index, first, places = self._united([delta for delta, _ in active])
            total = first.to(active[0][0].values.dtype)
            for (delta, scale), place in zip(active, places, strict=True):
                total = total.index_add(0, place, delta.change(scale).to(total.dtype))
            scatter(weight, index, total)

    def _united(self, deltas: Sequence[Entries]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """All their indices, the base's values there, and the places of each among them; kept while they stay."""
        indices = [delta.index for delta in deltas]
        if (
            self.union is None
            or len(self.union[0]) != len(indices)
            or any(one is not other for one, other in zip(self.union[0], indices, strict=True))
        ):
            index = torch.cat(indices).unique()
            places = [torch.searchsorted(index, one) for one in indices]
            first = torch.empty(index.numel(), dtype=deltas[0].first.dtype, device=index.device)
            for delta, place in zip(deltas, places, strict=True):
                first[place] = delta.first
            self.union = (indices, index, first, places)
        return self.union[1:]

    # -- what the layer calls -----------------------------------------------------------------------------------------

    def forward(self, layer: FallowLayer, active: Active, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        grad = torch.is_grad_enabled()
        self.settle(active, rewrite=grad and any(delta.values.requires_grad for delta, _ in active))
        if not grad:
            return call(*args, **kwargs)
        held: dict[str, Any] = layer.get_base_layer()._parameters
        base = held[layer.tensor]
        held[layer.tensor] = _edge(base if base.requires_grad else base.data, active)  # as functional_call does it
        try:
            out = call(*args, **kwargs)
        finally:
            held[layer.tensor] = base
        recall = partial(self._recall, self.shown, self.versions)
        for part in out if isinstance(out, tuple) else (out,):
            if isinstance(part, Tensor) and part.grad_fn is not None:
                part.register_hook(recall)
        return out

    def _recall(self, shown: Shown, versions: tuple[int, ...], grad: Tensor) -> None:
        """Before the backward of a forward: the weight as that forward saw it, whatever was shown since."""
        if self.shown is not shown:
            self.settle(shown)
        if self.versions != versions:
            raise ModelError(f"the adapter's values in {self.name} were changed between its forward and its backward")

    def weight(self, active: Active) -> Tensor:
        grad = torch.is_grad_enabled()
        self.settle(active, rewrite=grad and any(delta.values.requires_grad for delta, _ in active))
        # Not .data: autograd then refuses a backward for which other adapters have been put in place meanwhile.
        return _edge(self.layer.parameter.detach(), active) if grad and active else self.layer.parameter

    def check(self, active: Active) -> None:
        for delta, _ in active:
            if not bool(torch.isfinite(delta.values).all()):
                raise AdapterError(f"the adapter holds NaN or infinite values in {self.name}; it cannot be merged")

    def change(self, delta: Entries, scale: float) -> Tensor:
        weight = self.layer.parameter
        dense = torch.zeros(weight.shape, dtype=delta.values.dtype, device=weight.device)
        scatter(dense, delta.index, delta.change(scale))
        return dense

    def suspect(self) -> None:
        self.stale = True

    def loaded(self) -> None:
        if self.shown or self.layer.parameter.is_meta:
            return
        for delta in cast("list[Entries]", self.layer.fallow_delta.values()):
            if type(delta).kind is InPlace and not delta.index.is_meta:
                delta.unbind()
                if delta.index.numel() and int(delta.index[0]) >= 0:
                    delta.bind(self.layer.parameter, self.name)


class _Gather(torch.autograd.Function):
    """The weight as it is; backwards, the chosen entries of its dense gradient, which ends here."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, active: Sequence[tuple[Tensor, Tensor | None, float]], *values: Tensor
    ) -> Tensor:
        ctx.active, ctx.dtypes = active, [value.dtype for value in values]
        return weight.detach()  # a view would lose the memory format of some weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts: list[Tensor | None] = []
        for (index, live, scale), dtype, needed in zip(ctx.active, ctx.dtypes, ctx.needs_input_grad[2:], strict=True):
            part = gather(grads[0], index).to(dtype) if needed else None
            if part is not None and scale != 1:
                part = part * scale
            parts.append(part * live if part is not None and live is not None else part)
        return grads[0] if ctx.needs_input_grad[0] else None, None, *parts


def _edge(weight: Tensor, active: Active) -> Tensor:
    trained = [(delta, scale) for delta, scale in active if delta.values.requires_grad]
    if not trained:
        return weight
    return _Gather.apply(weight, [(d.index, d.live, scale) for d, scale in trained], *[d.values for d, _ in trained])
