"""SMoRA: every rank of one LoRA is an expert, and each token uses the k that its router likes best.

"Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning", arXiv 2501.15103.

    s = sigmoid(R x)              R (n, in), a router's line for each group of P ranks, n = r / P
    T = the k / P largest of s + b          b (n,), the balance; not trained
    g = (k / P) s / sum of s in T           in T, else 0: the weights of the active ranks sum to k
    y' = y + (alpha / k) B (g * A x)        A (r, in), uniform in +-1 / sqrt(in); B (out, r), zero; each g for P ranks

It depends on its input and cannot merge. P = k = r is plain LoRA; P = q, r = E q, k = m q is a mixture of E LoRAs of
rank q of which m act. On a convolution every position is a token (so is every group of channels), R being a kernel as A
is. After each step b moves by u towards the ranks that fewer tokens than the mean have used, over all processes; tokens
that `fallow.condition(model, token_mask=...)` (1 for tokens, of their shape) calls padding do not count, where it fits.

Departures from the released code: b steers the choice alone and is no part of g (`bias_in_gate=True` for theirs); it
moves once per optimizer step, by tokens counted in the backward, so that a forward run again by checkpointing chooses
the same and counts once; ranks of a group are chosen together; b is held in whole steps of 1e-8, which no cast to
bf16 rounds. Their u = 1e-5 does almost nothing in short runs: ours is 0.1 / steps, from 1e-5 to 1e-3. The router
computes in float32; under autocast in its dtype, where near ties may fall another way.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fallow.core.delta import Delta, MethodOptions, Site, fits_rank, number, one_of, whole
from fallow.core.distributed import ranks
from fallow.core.errors import ConfigError
from fallow.core.factored import down
from fallow.core.views import ConvView

QUANTUM = 1e-8


class SMoRA(Delta):
    name = "smora"
    supports = ("linear", "conv")
    any_dtype = True
    lean: Tensor
    used: Tensor

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`rank`: r, all of the experts. `active`: k, those that a token uses. `partition`: P, ranks that are chosen
        together, which divides rank and active. `alpha`: the scale is alpha / k. `dropout`: on x, for router and all.
        `gate`: "sigmoid", or the paper's "softmax" over the chosen logits, times k. `balance`: u; None for 0.1 / steps
        of the run. `bias_in_gate`: the balance counts in the gate too, as in the released code.
        """

        rank: int = 64
        active: int = 8
        partition: int = 1
        alpha: float = 16.0
        dropout: float = 0.0
        gate: str = "sigmoid"
        balance: float | None = None
        bias_in_gate: bool = False

        def check(self) -> None:
            whole("rank", self.rank)
            whole("active", self.active, most=self.rank)
            whole("partition", self.partition, most=self.active)
            for name, value in (("rank", self.rank), ("active", self.active)):
                if value % self.partition:
                    raise ConfigError(f"partition={self.partition} must divide {name}={value}; give one that does")
            number("alpha", self.alpha, open_below=True)
            number("dropout", self.dropout, most=0.99)
            one_of("gate", self.gate, ("sigmoid", "softmax"))
            if self.balance is not None:
                number("balance", self.balance, most=1.0)
            one_of("bias_in_gate", self.bias_in_gate, (False, True))

    def setup(self, site: Site) -> None:
        if site.fresh:
            fits_rank(site, self.o.active, "active")
        out, inner = site.shape
        experts = self.o.rank // self.o.partition
        self.A = nn.Parameter(torch.empty(self.o.rank, inner).uniform_(-1, 1) / math.sqrt(inner))
        self.B = nn.Parameter(torch.zeros(out, self.o.rank))
        self.router = nn.Parameter(torch.empty(experts, inner).uniform_(-1, 1) / math.sqrt(inner))
        self.register_buffer("lean", torch.zeros(experts, dtype=torch.int64))  # b in steps of QUANTUM
        self.register_buffer("used", torch.zeros(experts, dtype=torch.int64), persistent=False)

    def gates(self, logits: Tensor, dim: int, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """g of n logits along `dim`, zero outside T, float32 or more; and T."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        bias = (self.lean * QUANTUM).to(logits.dtype).view(-1, *[1] * (logits.dim() - 1 - dim))
        score = logits.sigmoid() if self.o.gate == "sigmoid" else logits
        count = self.o.active // self.o.partition
        if chosen is None:
            chosen = (score + bias).detach().topk(count, dim).indices
        weight = (score + bias if self.o.bias_in_gate else score).gather(dim, chosen)
        weight = weight / (weight.sum(dim, True) + 1e-9) if self.o.gate == "sigmoid" else weight.softmax(dim)
        return torch.zeros_like(logits).scatter(dim, chosen, count * weight), chosen

    def gated(self, both: Tensor, dim: int, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """g * A x, of r channels along `dim`, from A x and R x together; and T."""
        h, logits = both.split([self.o.rank, self.o.rank // self.o.partition], dim)
        gates, chosen = self.gates(logits, dim, chosen)
        if self.o.partition > 1:
            gates = gates.repeat_interleave(self.o.partition, dim)
        return h * gates.to(h.dtype), chosen

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = F.dropout(x, self.o.dropout, self.training)
        groups = self.view.groups if isinstance(self.view, ConvView) else 1
        channels = self.view.channels % x.dim()
        both = down(self.view, x, torch.cat([self.A, self.router])).unflatten(channels, (groups, -1))
        if torch.compiler.is_compiling():
            h, chosen = self.gated(both, channels + 1)
            if self.training and torch.is_grad_enabled():
                self.count(chosen, channels + 1, self.context.get("token_mask"))
        else:
            h = cast(Tensor, _Gated.apply(self, both, channels + 1, self.context.get("token_mask")))
        return y + (self.o.alpha / self.o.active) * self.view.up(h.flatten(channels, channels + 1), self.B)

    def count(self, chosen: Tensor, dim: int, mask: Tensor | None) -> None:
        ones = torch.ones((), dtype=torch.int64, device=chosen.device)
        if mask is not None and mask.shape == chosen.shape[: dim - 1] + chosen.shape[dim + 1 :]:
            ones = mask.to(ones).unsqueeze(dim - 1).unsqueeze(dim)
        self.used.scatter_add_(0, chosen.flatten(), ones.expand_as(chosen).flatten())

    @torch.no_grad()
    def on_step(self, step: int, total: int | None) -> None:
        u = self.o.balance
        if u is None:
            u = min(max(0.1 / (total or 1000), 1e-5), 1e-3)
        used = self.used.double()
        if ranks() > 1:
            dist.all_reduce(used)
        self.lean += round(u / QUANTUM) * (used.mean() - used).sign().long()
        self.used.zero_()

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        rank, partition = int(options.rank), int(options.partition)
        return rank * (shape[0] + shape[1]) + rank // partition * shape[1]


class _Gated(torch.autograd.Function):
    """Keeps A x, R x and T, not what is made of them. Who comes back from the backward is counted."""

    @staticmethod
    def forward(ctx: Any, delta: SMoRA, both: Tensor, dim: int, mask: Tensor | None) -> Tensor:
        h, chosen = delta.gated(both, dim)
        ctx.save_for_backward(both, chosen, mask)
        ctx.delta, ctx.dim = delta, dim
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        both, chosen, mask = ctx.saved_tensors
        if ctx.delta.training:
            ctx.delta.count(chosen, ctx.dim, mask)
        both = both.detach().requires_grad_()
        with torch.enable_grad():
            h, _ = ctx.delta.gated(both, ctx.dim, chosen)
        return None, *torch.autograd.grad(h, both, grad), None, None
