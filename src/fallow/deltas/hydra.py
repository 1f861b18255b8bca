"""Hydra: two low-rank heads on one layer, a parallel one on its input and a sequential one on its output.

"Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning" (arXiv 2309.06922). W (out, in), ranks r, q:

    W' = W + s (B A + C E W)      A (r, in), B (out, r);  E (q, out), C (out, q): new mixtures of what W computes
    y' = y + s (B (A x) + C (E (y - b)))      the same without any W': the forward; of a Linear in training, (E W) x

In the paper E sees the bias b of the layer too, whose merged form needs another bias, b + s C E b. Hosts merge weights
alone, for which E must see W x: the default here. `sees_bias=True` is the paper's form, `adapter_bias=True` that of its
vision code, with biases in both heads; these act on the output, no host merges them, and `new_bias` gives the constant.
Grouped convolutions combine the rows of W itself: across groups they are no operation on the output.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fallow.core.delta import Delta, MethodOptions, Mode, Site, fits_rank, number, whole
from fallow.core.errors import ConfigError
from fallow.core.factored import down
from fallow.core.low_rank_linear import low_rank_linear, pieces
from fallow.core.views import ConvView, View

PLAIN = View(0, 0)  # any product with the last dimension


class Hydra(Delta):
    """Best on layers that feed the residual stream: attention's output projection, the second layer of an MLP."""

    name = "hydra"
    mode: ClassVar[Mode] = "weight"  # a layer's own is "output" where biases are involved
    any_dtype = True

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`rank`: r, of the parallel head; 0 for none. `sequential_rank`: q; 0 for none. `scale`: s, not divided by a
        rank. `dropout`: between the projections of each head. `sees_bias`: the sequential head sees the layer's bias
        too, as in the paper; hosts cannot merge it. `adapter_bias`: biases in both projections of each head; implies
        `sees_bias`.
        """

        rank: int = 2
        sequential_rank: int = 2
        scale: float = 1.0
        dropout: float = 0.0
        sees_bias: bool = False
        adapter_bias: bool = False

        def check(self) -> None:
            whole("rank", self.rank, 0)
            whole("sequential_rank", self.sequential_rank, 0)
            number("scale", self.scale, open_below=True)
            number("dropout", self.dropout, 0.0, 0.999)
            if not self.rank + self.sequential_rank:
                raise ConfigError("rank=0 and sequential_rank=0 leave no head; give one of them")

    def setup(self, site: Site) -> None:
        (out, width), o = site.shape, self.o
        fits_rank(site, o.rank)
        if o.sequential_rank > out:
            raise ConfigError(f"sequential_rank={o.sequential_rank} is above the {out} outputs of '{site.name}'")
        grouped = isinstance(site.view, ConvView) and site.view.groups > 1
        by_weight = site.view.kind == "parameter" or (grouped and o.sequential_rank > 0)
        if by_weight and o.dropout:
            raise ConfigError(
                f"dropout={o.dropout} has no place in '{site.name}', which runs with W' itself; leave it out"
            )
        if o.sees_bias or o.adapter_bias:
            if grouped or site.view.kind == "parameter":
                raise ConfigError(
                    f"sees_bias and adapter_bias act on an output, which '{site.name}' does not allow; leave both"
                )
            self.mode = "output"  # type: ignore[misc]
        elif by_weight:
            self.output = None  # type: ignore[method-assign, assignment]
        # kept apart by head, so that each is plain LoRA where the other has rank 0
        for name, rank, inner in (("parallel", o.rank, width), ("sequential", o.sequential_rank, out)):
            if rank:
                first = nn.Parameter(torch.empty(rank, inner))
                nn.init.kaiming_uniform_(first, math.sqrt(5))
                self.register_parameter(f"{name}_down", first)
                self.register_parameter(f"{name}_up", nn.Parameter(torch.zeros(out, rank)))
                if o.adapter_bias:
                    self.register_parameter(f"{name}_down_bias", nn.Parameter(torch.zeros(rank)))
                    self.register_parameter(f"{name}_up_bias", nn.Parameter(torch.zeros(out)))

    def transform(self, w: Tensor) -> Tensor:
        new = w
        for name in self._heads():
            up, first = self._pair(name)
            right = first.to(w.dtype) if name == "parallel" else first.to(w.dtype) @ w
            new = torch.addmm(new, up.to(w.dtype), right, alpha=self.o.scale)
        return new

    def output(self, x: Tensor, y: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return y + self._change(x, y, bias)

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """In training the sequential head is C (E W), which needs no output kept for the gradient of E."""
        if not torch.is_grad_enabled() or (self.o.dropout and self.training):
            y = F.linear(x, w, bias)
            return self.output(x, y, w, bias).to(y.dtype)
        ups, downs = zip(*map(self._pair, self._heads()), strict=True)
        if self.o.sequential_rank:
            downs = (*downs[:-1], _RowsThrough.apply(downs[-1], w) if w.dtype != downs[-1].dtype else downs[-1] @ w)
        b, a = (ups[0], downs[0]) if len(ups) == 1 else (torch.cat(ups, 1), torch.cat(downs))
        return low_rank_linear(x, w, bias, b if self.o.scale == 1.0 else self.o.scale * b, a)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Of the paper's form; y is that of the base alone, unless other adapters of this layer come before."""
        return y + self._change(x, y, None)

    def _change(self, x: Tensor, y: Tensor, unseen: Tensor | None) -> Tensor:
        """s (B (A x) + C (E (y - unseen))): one product for both ups; y - b is never made."""
        view, hidden, ups = self.view, [], []
        constant: Tensor | None = None
        for name in self._heads():
            up, first = self._pair(name)
            shift: Tensor | None = self._parameters.get(f"{name}_down_bias")
            if name == "parallel":
                h = down(view, x, first)
            else:
                h = self._of_outputs(y, first)
                if unseen is not None:
                    shift = -(first @ unseen.to(first.dtype))
            hidden.append(h if shift is None else h + self._along(shift, h))
            ups.append(up)
            if self.o.adapter_bias:
                more: Tensor = getattr(self, f"{name}_up_bias")
                constant = more if constant is None else constant + more
        h = torch.cat(hidden, view.channels) if len(hidden) > 1 else hidden[0]
        if self.o.dropout and self.training:
            h = F.dropout(h, self.o.dropout)
        b = torch.cat(ups, 1) if len(ups) > 1 else ups[0]
        change = view.up(h, b if self.o.scale == 1.0 else self.o.scale * b)
        return change if constant is None else change + self._along(self.o.scale * constant, change)

    def _of_outputs(self, y: Tensor, e: Tensor) -> Tensor:
        if self.view.channels == -1:
            return down(PLAIN, y, e)
        return self.view.mix(y if torch.is_autocast_enabled(y.device.type) else y.to(e.dtype), e)

    def _along(self, vector: Tensor, like: Tensor) -> Tensor:
        """(n,) along the channels of a result."""
        return vector if self.view.channels == -1 else vector.view(-1, *[1] * (like.dim() - 2))

    def new_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias (out,) beside `transform(W)` that gives y': another than the layer's in the paper's form only."""
        if self.mode != "output":
            return bias
        old = torch.zeros(self.view.shape[0]).to(next(self.parameters())) if bias is None else bias
        new = old
        for name in self._heads():
            up, first = self._pair(name)
            h = first @ old.to(first) if name == "sequential" else torch.zeros_like(first[:, 0])
            if self.o.adapter_bias:
                h = h + getattr(self, f"{name}_down_bias")
                new = new + self.o.scale * getattr(self, f"{name}_up_bias")
            new = new + self.o.scale * (up @ h)
        return new

    def _heads(self) -> list[str]:
        ranks = {"parallel": self.o.rank, "sequential": self.o.sequential_rank}
        return [name for name, rank in ranks.items() if rank]

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        """The up and the down projection of a head."""
        return getattr(self, f"{name}_up"), getattr(self, f"{name}_down")

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        """r (in + out) + 2 q out; with biases r + q + out for each head more."""
        (out, width), r, q = shape, options.rank, options.sequential_rank
        biases = r + q + out * ((r > 0) + (q > 0)) if options.adapter_bias else 0
        return int(r * (width + out) + 2 * q * out + biases)


class _RowsThrough(torch.autograd.Function):
    """E W (q, in) in the dtype of E (q, out), of a frozen W (out, in) of another, cast some rows at a time."""

    @staticmethod
    def forward(ctx: Any, e: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        total = torch.zeros(e.shape[0], w.shape[1], dtype=e.dtype, device=e.device)
        for part in pieces(w, w.shape[1]):
            total.addmm_(e[:, part], w[part].to(e.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        return torch.cat([grad @ w[part].to(grad.dtype).T for part in pieces(w, w.shape[1])], 1), None
