"""SoRA: LoRA whose ranks have gates that fall to exact zero in training, and may return; the survivors are the rank.

"Sparse Low-rank Adaptation of Pre-trained Language Models", arXiv 2311.11696.

    W' = W + s B diag(g) A      A (r, in); B (out, r), zero; g (r,), normal; s = alpha / r of the first rank, for ever
    each step                   g <- T(g, xi)      T(x, xi) = sign(x) max(|x| - xi, 0)

The second line is the proximal step of an L1 penalty on g; it comes after the optimizer's own step, in `on_step`. At
zero a gate still has a gradient, so it leaves zero where one step exceeds xi; meanwhile its row of A and its column of
B have none. Give gates no weight decay and, where wished, a rate of their own: they are the parameters called `gate`.

The paper's sparsifying schedule, a path from dense to sparse at which quality can be read off, is a loop:

    for xi in stages(0.0, 7e-4, 7):
        begin_stage(model, xi, total=1000)      # then train, with a fresh schedule of the learning rate, and evaluate

To cut: `resize((importance() > 0).sum())`; a layer without survivors keeps one rank that does nothing, or loses its
adapter. `factors()` holds the gates, so that what is exported is a plain LoRA.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core import schedule
from fallow.core.delta import MethodOptions, Site, number, one_of, whole
from fallow.core.errors import ConfigError
from fallow.core.starting import Pair
from fallow.deltas.lora import LoRA


def soft_threshold(x: Tensor, xi: float, compat_2xi: bool = False) -> Tensor:
    """sign(x) max(|x| - xi, 0). `compat_2xi`: as the official codes of SoRA and CoDyRA have it, which shrink first and
    zero then: all below 2 xi becomes 0, and exactly +-xi stays.
    """
    shrunk = x - x.clamp(-xi, xi)
    if not compat_2xi:
        return shrunk
    return torch.where(x.abs() == xi, x, torch.where(shrunk.abs() < xi, 0.0, shrunk))


class SoRA(LoRA):
    name = "sora"

    @dataclasses.dataclass(kw_only=True)
    class Options(LoRA.Options):
        """`rank`: r at the start. `alpha`: s = alpha / rank of the start; None for the rank. `threshold`: xi of a step
        at the highest learning rate. `threshold_mode`: "lr", xi falls with the rate, as in the theory; "constant", as
        in the official code, where xi outgrows the gates' own steps in the end and every gate falls. `gate_init`:
        "normal", where chance decides who falls first, or "ones". `l1`: weight of the sum of |g| as a term of the loss
        besides. `compat_2xi`: the official code's threshold, which zeroes all below 2 xi.

        The share of the highest rate that "lr" needs is `fallow.condition(model, lr_share=...)` around the step; unless
        that is given, it falls linearly to zero over the run, as in the paper.
        """

        alpha: float | None = 16.0
        threshold: float = 3e-4
        threshold_mode: str = "lr"
        gate_init: str = "normal"
        l1: float = 0.0
        compat_2xi: bool = False

        def check(self) -> None:
            super().check()
            number("threshold", self.threshold)
            number("l1", self.l1)
            check_gates(self)

    def setup(self, site: Site) -> None:
        super().setup(site)
        self.gate = nn.Parameter(self.fresh_gates(self.o.rank))

    def fresh_gates(self, rank: int) -> Tensor:
        return torch.ones(rank) if self.o.gate_init == "ones" else torch.randn(rank)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.with_start(self.B * (self.scaling * self.gate), self.A, self.scaling)

    @torch.no_grad()
    def take(self, pair: Pair) -> None:
        """Gates are 1 where a start fills the factors."""
        super().take(pair)
        self.gate.fill_(1.0)

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        return int(options.rank) * (shape[0] + shape[1] + 1)

    def loss(self) -> Tensor | None:
        return self.o.l1 * self.gate.abs().sum() if self.o.l1 else None

    def xi(self, step: int, total: int | None) -> float:
        """The threshold of step `step`, from 1."""
        return float(self.o.threshold * self.lr_share(step, total))

    def lr_share(self, step: int, total: int | None) -> float:
        if self.o.threshold_mode == "constant":
            return 1.0
        falling = 1.0 if total is None else max(0.0, 1 - (step - 1) / total)
        return float(self.context.get("lr_share", falling))

    @torch.no_grad()
    def on_step(self, step: int, total: int | None) -> None:
        xi = self.xi(step, total)
        if not xi:
            return
        if self.gate.dtype in (torch.bfloat16, torch.float16):
            raise ConfigError(
                f"the gates of '{self.site_name}' are {self.gate.dtype}, where a step of {xi:.1e} is lost beside 1; "
                "keep the adapter in float32"
            )
        self.gate.copy_(soft_threshold(self.gate, xi, self.o.compat_2xi))

    def importance(self) -> Tensor:
        """|g|: exact zeros can be cut without any change."""
        return self.gate.detach().abs()

    @torch.no_grad()
    def resize(self, rank: int) -> None:
        """Keep the largest gates. s stays, and alpha with the new rank says so."""
        whole("rank", rank)
        keep = self.importance().topk(min(rank, len(self.gate))).indices.sort().values
        more = max(0, rank - len(keep))
        s, old = self.scaling, self.gate
        self.o = self.resized_options(rank, s)
        self.resize_pair(keep, *self.start(more), cut=False)  # a gate at zero is a change, where a start is subtracted
        self.gate = nn.Parameter(torch.cat([old[keep], self.fresh_gates(more).to(old)]), old.requires_grad)

    def resized_options(self, rank: int, s: float) -> MethodOptions:
        changed: MethodOptions = dataclasses.replace(self.o, rank=rank, alpha=s * rank, scaling="standard")
        return changed


def stages(first: float, last: float, count: int, shape: str = "linear") -> list[float]:
    """The thresholds of the paper's sparsifying schedule: `count` of them, `first` of the first full training.

    `shape`: "linear", evenly spaced; "log_linear", logarithms of evenly spaced powers of e; "exp_linear", of one ratio,
    which needs a `first` above 0. ConfigError for what cannot be.
    """
    number("first", first, open_below=shape == "exp_linear")
    number("last", last, least=first)
    whole("count", count, 2)
    one_of("shape", shape, ("linear", "log_linear", "exp_linear"))
    shares = [i / (count - 1) for i in range(count)]
    if shape == "linear":
        return [first + share * (last - first) for share in shares]
    if shape == "exp_linear":
        return [first * (last / first) ** share for share in shares]
    return [first + math.log1p(share * math.expm1(last - first)) for share in shares]


def begin_stage(model: nn.Module, threshold: float, total: int) -> None:
    """Go on from the weights as they are, at another threshold, with steps that count from 1 to `total` again.

    Give the optimizer a fresh schedule of its rate too: with one that has run out nothing but the gates would move.
    ConfigError where the model has no SoRA.
    """
    number("threshold", threshold)
    deltas = [delta for delta in model.modules() if isinstance(delta, SoRA) and hasattr(delta.o, "threshold")]
    if not deltas:
        raise ConfigError(f"{type(model).__name__} has no SoRA; fallow.attach(model, 'sora') adds one")
    schedule.resume(model, 0)
    schedule.resolve(model, total)
    for delta in deltas:
        delta.o = dataclasses.replace(delta.o, threshold=threshold)


def check_gates(options: Any) -> None:
    """ConfigError for what the options of all gated methods cannot be."""
    one_of("threshold_mode", options.threshold_mode, ("lr", "constant"))
    one_of("gate_init", options.gate_init, ("normal", "ones"))
    one_of("compat_2xi", options.compat_2xi, (False, True))
