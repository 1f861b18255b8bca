"""The update in the backward pass: a weight moves as soon as its gradient is complete, and the gradient is gone.

    one pass a step        hook of W:  G arrives, W moves, G is dropped: one weight's gradient is alive at a time
    accumulate=k passes    of rules that look at R alone (residual="drop"), R += Pᵀ G in each pass and G is dropped: r/d
                           of the gradients stay between passes, and G itself in steps that choose a basis. Of rules
                           that look at G, and of plain tensors, G stays until the k-th pass, as everywhere.

All gradients are never there at once, so clipping by their norm has two ways. `max_norm` alone scales by the norm of
the step before (none in the first one), which costs nothing. A pass within `measuring()` before the one that trains
gives the norm of this very step, at the price of that pass. Where R is summed, the norm is that of R. Loss scaling and
DistributedDataParallel come after the hooks and are refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fallow.core.distributed import ranks
from fallow.core.errors import ConfigError
from fallow.core.sharded import is_dtensor
from fallow.optim import refresh, updating
from fallow.optim.site import Site

if TYPE_CHECKING:
    from fallow.optim.lowrank import LowRank

NORM = "last_norm"  # where the first group keeps the norm of the step before, so that it is saved


class InBackward:
    """The hooks of one optimizer."""

    def __init__(self, optimizer: LowRank, accumulate: int, max_norm: float | None) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.accumulate, self.max_norm = accumulate, max_norm
        self.passes: dict[Tensor, int] = {}
        self.folded: dict[Tensor, Tensor] = {}
        self.squares: list[Tensor] = []  # of what has arrived in this step
        self.measured: Tensor | None = None
        self.quiet = False
        self.handles: dict[Tensor, Any] = {}
        self._finalizer = weakref.finalize(optimizer, _remove, self.handles)

    def attach(self, params: list[Tensor]) -> None:
        """Watch these parameters too."""
        own = weakref.ref(self)

        def arrived(param: Tensor) -> None:
            if (one := own()) is not None:
                one.arrived(param)

        for param in params:
            if param not in self.handles:
                self.handles[param] = param.register_post_accumulate_grad_hook(arrived)

    def close(self) -> None:
        """Take the hooks away."""
        self._finalizer()

    @torch.no_grad()
    def arrived(self, param: Tensor) -> None:
        """A pass has added its gradient of this parameter."""
        optimizer = self._optimizer()
        if optimizer is None or param.grad is None:
            return
        if ranks() > 1 and not is_dtensor(param):
            raise ConfigError(
                f"mode='in_backward' uses each gradient before the {ranks()} processes could take its mean; give "
                "mode='step', or shard the model with fully_shard"
            )
        if self.quiet:
            self.squares.append(_square(param.grad))
            param.grad = None
            return
        self.passes[param] = self.passes.get(param, 0) + 1
        if self.passes[param] > self.accumulate:
            raise ConfigError(
                f"a parameter {tuple(param.shape)} got the gradient of pass {self.passes[param]} before step(), and "
                f"accumulate={self.accumulate}; give the passes of a step as accumulate, and use_reentrant=False "
                "to gradient checkpointing"
            )
        site = optimizer.site_of(param)
        last = self.passes[param] == self.accumulate
        if self._folds(site):
            self._fold(site, last)
        elif last:
            self._clip(param.grad)
            optimizer.update([site])
            param.grad = None

    def _folds(self, site: Site) -> bool:
        """Whether R is all that is needed of this site's gradient in this step."""
        rule, state = site.group["residual"], site.state
        begun = site.active and bool(state) and state["chosen"] and not refresh.due(site, site.group["steps"])
        return begun and self.accumulate > 1 and not rule.looks

    def _fold(self, site: Site, last: bool) -> None:
        param = site.param
        r = updating.project([site], {site.index: site.gradient()})[site.index]
        param.grad = None
        r = self.folded.pop(param).add_(r) if param in self.folded else r
        if not last:
            self.folded[param] = r
            return
        self._clip(r)
        updating.move([site], {}, {site.index: r}, site.group)

    def _clip(self, gradient: Tensor) -> None:
        """Scale it, in place, as `max_norm` says; its own norm counts for the next step. No wait for the device."""
        optimizer = self._optimizer()
        if self.max_norm is None or optimizer is None:
            return
        self.squares.append(_square(gradient))
        norm = self.measured if self.measured is not None else optimizer.param_groups[0].get(NORM)
        if norm is not None:
            gradient.mul_((self.max_norm / (norm.to(gradient.device) + 1e-6)).clamp(max=1.0))

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within the block a backward pass only measures the norm of all gradients, and drops them."""
        if self.accumulate > 1:
            raise ConfigError(
                f"measuring() takes the norm of one pass, and accumulate={self.accumulate} passes make a gradient; "
                "give max_norm alone, which takes that of the step before"
            )
        self.quiet = True
        try:
            yield
            self.measured = _norm(self.squares)
        finally:
            self.quiet = False
            self.squares.clear()

    def finish(self, scaled: bool) -> None:
        """The step: be ready for the next gradients. ConfigError where some are not complete, or were scaled."""
        if scaled:
            raise ConfigError(
                "mode='in_backward' has used the scaled gradients before GradScaler could unscale them; train in "
                "bfloat16 without loss scaling, or give mode='step'"
            )
        early = [count for count in self.passes.values() if count < self.accumulate]
        if early:
            raise ConfigError(
                f"step() after {early[0]} of accumulate={self.accumulate} backward passes; call it after the last one"
            )
        optimizer = self._optimizer()
        if optimizer is not None and self.squares:
            optimizer.param_groups[0][NORM] = _norm(self.squares)
        self.squares.clear()
        self.passes.clear()
        self.measured = None


def _square(tensor: Tensor) -> Tensor:
    kind = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(tensor, dtype=kind).square()


def _norm(squares: list[Tensor]) -> Tensor:
    """0-dim"""
    return torch.stack([one.to(squares[0].device) for one in squares]).sum().sqrt() if squares else torch.zeros(())


def _remove(handles: dict[Tensor, Any]) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()
