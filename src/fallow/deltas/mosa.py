"""MoSA: while it trains, a LoRA is split entry by entry into experts that take turns; after, their mean is one LoRA.

"Split & Merge: Unlocking the Potential of Visual Adapters via Sparse Training" (first: "MoSA: Mixture of Sparse
Adapters for Visual Efficient Tuning"), arXiv 2312.02923, in its form for LoRA ("MoSL").

    training  W' = W + s B_j A     B_j = M_j * Theta (out, r), j drawn from 1..E for each forward; A (r, in)
    else      W' = W + s B A       B = mean of all B_j = Theta / E

The masks M_j (out, r) are a fixed random partition: each entry of Theta has one owner. A is shared and trained in full
(`share="down"`), or split in the same way around its frozen start, A_j = A_0 + M_j * Theta_A. A is uniform in
+-1 / sqrt(in), Theta zero. Two passes with draws of their own should agree (gamma = 1 in the paper):

    with fallow.condition(model, passes=2): first, second = model(torch.cat([x, x])).chunk(2)
    loss = cross_entropy(first, labels) + gamma * symmetric_kl(first, second)

One Theta and one byte an entry take the place of the official E dense copies with their states. An expert that had no
turn is not stepped: what an optimizer does to its entries, of which the official code does more or less with torch's
version, is undone right after the step, in the optimizer's states too; only the step's number is common to all experts.
The draws come from torch's generator: checkpointed forwards repeat them; ranks that are seeded alike draw alike.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fallow.core.delta import Delta, MethodOptions, Site, fits_rank, number, one_of, whole
from fallow.core.errors import ConfigError
from fallow.core.factored import through


class MoSA(Delta):
    name = "mosa"

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`rank`: r. `alpha`: None for the rank; s = alpha / rank, the paper's is 1. `dropout`: on the layer's input.
        `experts`: E, which take turns. `share`: the projection that is trained whole, "down" (A), "up" (B) or "none".
        `partition`: entries are dealt out over "all" of the matrix, or evenly within each "row" or "column".
        `dense_adam`: let optimizers step experts that had no turn.
        """

        rank: int = 16
        alpha: float | None = None
        dropout: float = 0.0
        experts: int = 4
        share: str = "down"
        partition: str = "all"
        dense_adam: bool = False

        def check(self) -> None:
            whole("rank", self.rank)
            if self.alpha is not None:
                number("alpha", self.alpha, open_below=True)
            number("dropout", self.dropout, most=0.99)
            whole("experts", self.experts, most=256)
            one_of("share", self.share, ("down", "up", "none"))
            one_of("partition", self.partition, ("all", "row", "column"))
            one_of("dense_adam", self.dense_adam, (True, False))

    def setup(self, site: Site) -> None:
        rank, (out, inner) = self.o.rank, self.view.shape
        fits_rank(site, rank)
        self.split = {"down": ("B",), "up": ("A",), "none": ("A", "B")}[self.o.share]
        bound = 1.0 if self.view.kind == "embedding" else 1 / math.sqrt(inner)  # a look-up reads one entry of a row
        self.B = nn.Parameter(torch.zeros(out, rank))
        if "A" in self.split:
            start = torch.empty(rank, inner).uniform_(-bound, bound, generator=site.generator("A"))
            self.register_buffer("A_start", start, persistent=False)
            self.A = nn.Parameter(torch.zeros(rank, inner))
        else:
            self.A = nn.Parameter(torch.empty(rank, inner).uniform_(-bound, bound))
        for name in self.split:
            shape, kind = (out, rank) if name == "B" else (rank, inner), self.o.partition
            room = {"all": shape[0] * shape[1], "row": shape[1], "column": shape[0]}[kind]
            if self.o.experts > room:
                raise ConfigError(
                    f"experts={self.o.experts} get nothing of some {kind} of '{site.name}', where {name} has {shape}: "
                    f"give at most {room}, or another partition="
                )
            owner = partition(shape, self.o.experts, kind, site.generator(f"owner of {name}"))
            self.register_buffer(f"{name}_owner", owner, persistent=False)
        self._watched()

    def _layout(self) -> None:
        super()._layout()
        self.any_dtype = True  # `through` casts x itself

    def _watched(self) -> None:
        if not self.o.dense_adam and self.o.experts > 1:
            _TAKING_TURNS.add(self)
            _watch_optimizers()

    def __setstate__(self, state: Any) -> None:
        """Copies take turns too."""
        super().__setstate__(state)
        self._watched()

    def _matrix(self, name: str, expert: Tensor | None) -> Tensor:
        """A or B of an expert (a scalar, from 0), or of the mean of all."""
        theta: Tensor = getattr(self, name)
        if name not in self.split:
            return theta
        if expert is None:
            part = theta / self.o.experts
        else:
            part = torch.where(getattr(self, f"{name}_owner") == expert, theta, 0.0)
        return self.A_start + part if name == "A" else part

    def _expert(self) -> tuple[Tensor, Tensor]:
        """Factors of experts drawn now, one for each split matrix."""
        b, a = (self._matrix(name, self._draw() if name in self.split else None) for name in ("B", "A"))
        return self._scaled(b), a

    def _draw(self) -> Tensor:
        return torch.randint(self.o.experts, (), device=self.B.device)

    def _scaled(self, b: Tensor) -> Tensor:
        return b if self.o.alpha is None else b * (self.o.alpha / self.o.rank)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Of the mean of the experts."""
        return self._scaled(self._matrix("B", None)), self._matrix("A", None)

    def delta_weight(self) -> Tensor:
        """Of experts drawn now where it is trained, as a parameter's module needs it; else of their mean."""
        drawn = self.view.kind == "parameter" and self.training and torch.is_grad_enabled()
        b, a = self._expert() if drawn else self.factors()
        return b @ a

    def delta_forward(self, x: Tensor) -> Tensor:
        if not self.training:
            b, a = self.factors()
            return through(self.view, x, a, b)
        passes = self.context.get("passes", 1)
        whole("passes", passes)
        if x.shape[0] % passes:
            raise ConfigError(f"passes={passes} do not divide the {x.shape[0]} samples that '{self.site_name}' sees")
        parts = []
        for part in x.chunk(passes) if passes > 1 else (x,):
            b, a = self._expert()
            parts.append(through(self.view, part, a, b))
        return torch.cat(parts) if passes > 1 else parts[0]

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        return int(options.rank) * (shape[0] + shape[1])


def partition(shape: tuple[int, int], experts: int, kind: str, generator: torch.Generator) -> Tensor:
    """uint8 (shape): the owner of each entry, dealt out evenly over all entries, or within each row or column."""
    if kind == "column":
        return partition((shape[1], shape[0]), experts, "row", generator).T.contiguous()
    keys = torch.rand(shape if kind == "row" else (1, shape[0] * shape[1]), generator=generator)
    return (keys.argsort(1).argsort(1) % experts).to(torch.uint8).view(shape)


def symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """1/2 [KL(sg(q) || p) + KL(sg(p) || q)] of logits (..., classes), the mean over rows; sg stops the gradient."""
    p, q = (logits.flatten(0, -2).log_softmax(-1) for logits in (first, second))
    one = F.kl_div(p, q.detach(), reduction="batchmean", log_target=True)
    other = F.kl_div(q, p.detach(), reduction="batchmean", log_target=True)
    return (one + other) / 2


# -- experts that had no turn are not stepped -------------------------------------------------------------------------

_TAKING_TURNS: weakref.WeakSet[MoSA] = weakref.WeakSet()
_HELD: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[Any]] = weakref.WeakKeyDictionary()


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


@torch.no_grad()
def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    stepped = {id(param) for group in optimizer.param_groups for param in group["params"] if param.grad is not None}
    held = _HELD[optimizer] = []
    for delta in list(_TAKING_TURNS):
        for name in delta.split:
            theta = getattr(delta, name)
            if id(theta) in stepped:
                owner = getattr(delta, f"{name}_owner").int()
                turns = torch.zeros(delta.o.experts, device=theta.device)
                turns.index_add_(0, owner.flatten(), (theta.grad != 0).flatten().float())
                states = optimizer.state.get(theta, {}).items()
                kept = {k: v.clone() for k, v in states if isinstance(v, Tensor) and v.shape == theta.shape}
                held.append((theta, (turns == 0)[owner], theta.clone(), kept))


@torch.no_grad()
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for theta, idle, before, kept in _HELD.pop(optimizer, []):
        theta.copy_(torch.where(idle, before, theta))
        for key, state in kept.items():
            optimizer.state[theta][key].copy_(torch.where(idle, state, optimizer.state[theta][key]))
