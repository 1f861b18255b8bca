"""Averages over a training run of the weights that adapters make, not of their factors.

    average of W + s B A, step by step:   D <- D + w (s B A - D)      a mean of products is no product of means

`Averaged` holds one dense change for each adapted weight, which is what the average is, and the mean of whatever else
is trained. `Valley` is SWAD (arXiv 2102.08604): the mean of all steps from where the validation loss stops falling to
where it rises again.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fallow.core.delta import Delta
from fallow.core.errors import ConfigError
from fallow.core.host import disabled
from fallow.core.host.holder import root_of
from fallow.core.host.layer import sites, weight_at
from fallow.core.views import View


class Averaged:
    """The average of a network's changes and of its other trained parameters, from now on. `decay`: of a moving
    average, with the warm-up min(decay, (1 + t) / (10 + t)); None for the mean of all.

    ConfigError for adapters that act on inputs and outputs, which no weight stands for.
    """

    def __init__(self, network: nn.Module, decay: float | None = None) -> None:
        self.network, self.decay, self.count = network, decay, 0
        self.adapted = list(_adapted(network))
        within = {id(param) for _, _, delta in self.adapted for param in delta.all_parameters()}
        self.plain = [p for p in network.parameters() if p.requires_grad and id(p) not in within]
        self.changes: list[Tensor] = []
        self.values: list[Tensor] = []

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights, after a step."""
        weight = 1 / (self.count + 1)
        if self.decay is not None and self.count:
            weight = 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        if not self.count:
            self.changes = [torch.zeros(delta.view.shape, device=p.device) for p, _, delta in self.adapted]
            self.values = [param.detach().float().clone() for param in self.plain]
        for change, (param, view, delta) in zip(self.changes, self.adapted, strict=True):
            if delta.exact:
                b, a = delta.factors()
                change.mul_(1 - weight).addmm_(b.to(change), a.to(change), alpha=weight)
            else:
                base = view.read(param.detach()).float()
                change.lerp_(delta.new_weight(base) - base, weight)
        for value, param in zip(self.values, self.plain, strict=True):
            value.lerp_(param.detach().float(), weight)
        self.count += 1

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """What was averaged since the last time, on the CPU; the next begins anew."""
        kept = [t.cpu() for t in self.changes], [t.cpu() for t in self.values]
        self.count = 0
        return kept

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within the block the network is the averaged one; afterwards its own, bit for bit."""
        if not self.count:
            raise ConfigError("nothing was averaged yet; call update() after a step")
        own = [(param, param.detach().clone()) for param in (*(p for p, _, _ in self.adapted), *self.plain)]
        try:
            with torch.no_grad():
                for change, (param, view, _) in zip(self.changes, self.adapted, strict=True):
                    param.copy_(view.write(view.read(param).float() + change.to(param.device), param))
                for value, param in zip(self.values, self.plain, strict=True):
                    param.copy_(value)
            if root_of(self.network) is None:
                yield
            else:
                with disabled(self.network):
                    yield
        finally:
            with torch.no_grad():
                for param, before in own:
                    param.copy_(before)


def _adapted(network: nn.Module) -> Iterator[tuple[Tensor, View, Delta]]:
    for module, site in sites(network):
        for delta, _ in site.acting:
            if not delta.mergeable:
                raise ConfigError(
                    f"'{delta.name}' at '{site.key}' acts on the layer's input and output: there are no merged weights "
                    "to average; leave the average out, or take another method"
                )
            yield weight_at(module, site), site.view, delta


@dataclasses.dataclass
class Stretch:
    """The mean of the steps between two looks at the validation loss, and that loss."""

    mean: tuple[list[Tensor], list[Tensor]]
    loss: float


class Valley:
    """Which stretches SWAD averages. It starts with the first whose loss is the least of the `patience` from it on, and
    ends before `tolerance` stretches in a row are above `ratio` times the mean loss of that start.

    The paper's N_s = 3, N_e = 6, r = 1.3. Where no valley was found before the end, the stretches from the least loss
    of the last ones on are averaged.
    """

    def __init__(self, patience: int = 3, tolerance: int = 6, ratio: float = 1.3) -> None:
        self.patience, self.tolerance, self.ratio = patience, tolerance, ratio
        self.waiting: deque[Stretch] = deque()
        self.limit: float | None = None  # of the loss, within the valley
        self.ended = False
        self.mean: tuple[list[Tensor], list[Tensor]] | None = None
        self.taken = 0

    def add(self, stretch: Stretch) -> None:
        """Tell of the next stretch."""
        if self.ended:
            return
        self.waiting.append(stretch)
        if self.limit is None:
            if len(self.waiting) < self.patience:
                return
            losses = [one.loss for one in self.waiting]
            if losses[0] > min(losses):
                self.waiting.popleft()
                return
            self.limit = self.ratio * sum(losses) / len(losses)
            self._take(1)
            return
        if len(self.waiting) >= self.tolerance:
            if min(one.loss for one in self.waiting) > self.limit:
                self.ended = True
                self.waiting.clear()
            else:
                self._take(1)

    def finish(self) -> tuple[list[Tensor], list[Tensor]]:
        """The average. ConfigError where no stretch was told."""
        if self.limit is None and self.waiting:
            losses = [one.loss for one in self.waiting]
            for _ in range(losses.index(min(losses))):
                self.waiting.popleft()
        self._take(len(self.waiting))
        if self.mean is None:
            raise ConfigError("SWAD has seen no stretch of the run; look at the validation loss at least once")
        return self.mean

    def _take(self, number: int) -> None:
        for _ in range(number):
            stretch = self.waiting.popleft()
            self.taken += 1
            if self.mean is None:
                self.mean = stretch.mean
                continue
            for mine, others in zip(self.mean, stretch.mean, strict=True):
                for average, value in zip(mine, others, strict=True):
                    average.lerp_(value, 1 / self.taken)


def put(averaged: Averaged, mean: tuple[list[Tensor], list[Tensor]]) -> None:
    """Let `shown` show this mean, such as `Valley.finish()`'s."""
    averaged.changes, averaged.values = mean
    averaged.count = max(1, averaged.count)
