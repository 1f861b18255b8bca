"""LoRA-SB: the frozen factors of LoRA-XS span the first full update, and its core starts with that update taken.

"Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning", arXiv
2411.19557.

    D = -lr sign(G) (out, in), the first step of Adam, or -lr G, of SGD;  G = dL/dW, lr of the first step
    D ~ U S Vᵀ, r triples        B = U (out, r)        R0 = diag(S) / s        A = Vᵀ (r, in)

For `lora-xs`, which trains R (r, r): W' = W + s B R A. With orthonormal factors and s = 1 the gradient of R is the best
one: it moves W by the part of -lr G that the factors reach, B Bᵀ G Aᵀ A. W is not changed, so that the model starts one
(small) step ahead of the base; head_start=False starts as the base, R = 0.

sign(G) has a flat spectrum, so the randomised decomposition of large layers takes max(16, r / 2) columns more than the
rank and 4 iterations; the factors stay float32. The official code has bfloat16 ones, r columns, and an lr that is off
by the steps of accumulation. A zero gradient gives LoRA-XS's own factors, with R = 0 and a warning.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from fallow.core.delta import Site, number, one_of
from fallow.core.errors import ConfigError
from fallow.core.linalg import Triples, low_rank
from fallow.core.start_factors import check_statistics
from fallow.core.starting import Pair, Start
from fallow.core.statistics import Statistics

LONGEST = 100_000  # steps in which a schedule has to leave zero


@dataclass(frozen=True)
class LoRASB(Start):
    """`statistics`: of `fallow.probe(model, batches, want={"gradient"})`. `lr`: of the first step that moves, see
    `first_lr`. `surrogate`: "adam", the sign, or "sgd", the gradient itself, whose leading directions tell more where
    few examples were seen. `head_start`: start with that step taken. `exact`: decompose large layers too.
    """

    name: ClassVar[str] = "lora-sb"
    needs: ClassVar[str] = "statistics with the gradient, start=fallow.LoRASB(statistics, lr=...)"

    statistics: Statistics
    lr: float
    surrogate: str = "adam"
    head_start: bool = True
    exact: bool = False

    def __post_init__(self) -> None:
        check_statistics("statistics", self.statistics, "gradient")
        number("lr", self.lr, open_below=True)
        one_of("surrogate", self.surrogate, ("adam", "sgd"))
        one_of("head_start", self.head_start, (True, False))
        one_of("exact", self.exact, (True, False))

    def pair(self, site: Site, rank: int, scale: float) -> Pair:
        gradient = self.gradient(site)
        if not bool(gradient.any()):
            warnings.warn(f"the gradient of '{site.name}' is zero, so it starts as LoRA-XS does", stacklevel=2)
            u, s, vt = self.triples(site.weight(), rank, site)
            return Pair(u, s.unsqueeze(1) * vt, torch.zeros(rank, rank, dtype=u.dtype), kept=True)
        step = gradient.sign_() if self.surrogate == "adam" else gradient
        u, s, vt = self.triples(step.mul_(-self.lr), rank, site)
        core = torch.diag(s / scale) if self.head_start else torch.zeros(rank, rank, dtype=u.dtype)
        return Pair(u, vt, core, kept=True)

    def gradient(self, site: Site) -> Tensor:
        """(out, in), a copy on the layer's device. ConfigError where there is but a sketch, which has no signs."""
        found = self.statistics.at(site, "gradient").gradient
        if found is None:
            raise ConfigError(f"start='{self.name}' needs every entry of a gradient; gather it without a sketch")
        return found.to(site.device, site.dtype, copy=True)

    def triples(self, matrix: Tensor, rank: int, site: Site) -> Triples:
        more, generator = max(16, rank // 2), site.generator(self.name)
        return low_rank(matrix, rank, oversampling=more, steps=4, generator=generator, exact=self.exact)


def first_lr(schedule: LRScheduler | Callable[[torch.optim.Optimizer], LRScheduler], lr: float | None = None) -> float:
    """The learning rate of the first step that is not zero (the largest of the groups'), for `LoRASB(lr=...)`.

    `schedule`: a scheduler of torch's as it will be used, which stays as it is; or the function that makes it of an
    optimizer, with the optimizer's `lr`, since there is no optimizer yet before there is an adapter:
    first_lr(lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 100, 1000), lr=1e-3). Steps are the
    scheduler's, whatever is accumulated between them. ConfigError where the rate stays zero, or lr is lacking.
    """
    own, running = _beside(schedule, lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a scheduler that steps before its optimizer
        for _ in range(LONGEST):
            if rate := max(float(group["lr"]) for group in own.param_groups):
                return rate
            running.step()
    raise ConfigError(f"the schedule's learning rate is still zero after {LONGEST:,} steps; give one that rises")


def _beside(schedule: Any, lr: float | None) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """An optimizer of nothing, and a copy of the schedule that moves its rates."""
    schedule = getattr(schedule, "scheduler", schedule)  # Accelerate wraps it
    if isinstance(schedule, LRScheduler):
        told = [{k: v for k, v in group.items() if k != "params"} for group in schedule.optimizer.param_groups]
        own = torch.optim.SGD([{"params": [torch.zeros(1)], **copy.deepcopy(group)} for group in told], lr=1.0)
        return own, copy.deepcopy(schedule, {id(schedule.optimizer): own})  # with no parameter of the model
    if not callable(schedule):
        raise ConfigError(f"schedule={schedule!r} is no scheduler of torch's and no function that makes one")
    if lr is None:
        raise ConfigError("lr=None: a function that makes a schedule wants the optimizer's rate too; give lr=1e-3")
    number("lr", lr, open_below=True)
    own = torch.optim.SGD([torch.zeros(1)], lr=lr)
    return own, schedule(own)
