"""One tensor of a low-rank optimizer, and how it is seen: as a matrix whose *projected* side comes first.

    W (out, in), out <  in     as it is           d = out, n = in      P (d, r) acts from the left
    W (out, in), out >= in     transposed view    d = in, n = out      P (d, r) acts from the right

So every part knows one case: G (d, n), P (d, r) with r < d, R = Pᵀ G (r, n), W <- W - lr P N. A square matrix goes
right, as in GaLore's code. A convolution's weight (out, in, *kernel) is the matrix (out, in * prod(kernel)), and so
is any other tensor of more dimensions, such as a stack of experts (experts, out * in).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fallow.core.errors import ConfigError
from fallow.core.sharded import Part, local, part_of, summed

SIDES = ("short", "long", "left", "right")


class Site:
    """One tensor, its group's options, its state, and its place among all tensors of the optimizer.

    `rank`: columns of its basis, 0 where it has none but is projected all the same (FRUGAL at density 0), None where
    it takes the inner rule plainly. `flipped`: whether the matrix is the transposed view.
    """

    __slots__ = (
        "d",
        "flipped",
        "fresh",
        "group",
        "index",
        "n",
        "name",
        "order",
        "param",
        "part",
        "peers",
        "place",
        "rank",
        "shared",
        "start",
        "states",
        "whole_n",
    )  # fmt: skip

    def __init__(
        self, param: Tensor, group: dict[str, Any], states: dict[Tensor, dict[str, Any]], index: int, name: str
    ) -> None:
        self.param, self.group, self.states, self.index, self.name = param, group, states, index, name
        self.rank: int | None = None
        self.d = self.n = self.place = self.peers = 0
        self.flipped, self.order = False, tuple(range(param.ndim))
        self.shared: Tensor | None = None  # what the basis holds for all sites of this size
        self.fresh: Tensor | None = None  # R, where choosing the basis has made it
        self.part = part_of(param)
        self.whole_n = self.start = 0
        if param.ndim < 2 or not param.numel() or group["rank"] is None:
            return
        strides = param.stride()
        # the dimensions within a row in the order of memory, so that channels_last weights too are seen, not copied
        self.order = (0, *sorted(range(1, param.ndim), key=lambda dim: (-strides[dim], dim)))
        out, inner = param.shape[0], param.numel() // param.shape[0]
        if max(out, inner) > (group["largest_side"] or out * inner):
            return
        self.flipped = {"short": out >= inner, "long": out < inner, "left": False, "right": True}[group["side"]]
        self.d, self.n = (inner, out) if self.flipped else (out, inner)
        self.whole_n = self.n
        if self.part is not None:
            self._shared(self.part)
        rank = group["basis"].width(group["rank"], self.d, self.n)
        self.rank = None if rank >= group["basis"].most(self.d, self.n) else rank

    def _shared(self, part: Part) -> None:
        """Where ranks hold slices of the weight, the sliced side is not projected: all but the choice stays local."""
        out, inner = part.shape[0], math.prod(part.shape[1:])
        self.flipped = part.dim == 0
        self.d, self.whole_n = (inner, out) if self.flipped else (out, inner)
        each = 1 if self.flipped else inner // part.shape[part.dim]
        self.n, self.start = part.length * each, part.offset * each
        if self.group["side"] in ("left", "right") and self.flipped != (self.group["side"] == "right"):
            raise ConfigError(
                f"side='{self.group['side']}' projects the side of {self.name} that is sharded; give side='short'"
            )
        if not self.flipped and self.order != tuple(range(len(part.shape))):
            raise ConfigError(f"{self.name} is sharded along dimension {part.dim} and not contiguous; make it so")

    @property
    def data(self) -> Tensor:
        """What this rank holds of the parameter, the very memory."""
        return local(self.param)

    @property
    def grad(self) -> Tensor:
        """What this rank holds of its gradient. ConfigError for a sparse one."""
        grad = self.param.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise ConfigError(
                f"{self.name} has a {grad.layout} gradient; give sparse=False, or another optimizer for it"
            )
        return local(grad).detach()

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks that hold slices, in place; the tensor itself where one holds all."""
        return tensor if self.part is None else summed(tensor.contiguous(), self.part.group)

    @property
    def state(self) -> dict[str, Any]:
        """What the optimizer keeps for it, empty before the first step."""
        return self.states[self.param]

    @property
    def inner(self) -> Any:
        """The inner rule; AdamW for a tensor that is no matrix, where the rule is one of matrices."""
        rule = (self.rank is None and self.group["plain_inner"]) or self.group["inner"]
        return rule if rule.fits(self.param) else rule.other()

    @property
    def active(self) -> bool:
        """Whether some of it is projected and has states of its own; not with a rank of 0, or outside a block."""
        return bool(self.rank) and not self.group["basis"].whole

    @property
    def plain(self) -> bool:
        """Whether it takes the inner rule as it is, in this step."""
        return self.rank is None or bool(self.group["basis"].whole and self.state.get("active"))

    @property
    def shape(self) -> tuple[int, ...]:
        """(r, n) of what the inner rule sees; the tensor's own shape where nothing is projected."""
        basis = self.group["basis"]
        if self.rank is None or basis.whole:
            return tuple(self.data.shape)
        return basis.seen(self.rank, self.d, self.n)

    @property
    def work(self) -> torch.dtype:
        """What is computed in: float32, or float64 for such tensors."""
        return torch.float64 if self.param.dtype == torch.float64 else torch.float32

    @property
    def products(self) -> torch.dtype:
        """What products with a dense basis are taken in: as the group says, where float32 is computed in."""
        return torch.bfloat16 if self.work == torch.float32 and self.group["products"] == "bf16" else self.work

    def matrix(self, tensor: Tensor) -> Tensor:
        """(d, n) a tensor of the parameter's shape, as a view wherever its memory allows."""
        if tensor.ndim > 2:
            tensor = tensor.permute(self.order).flatten(1)
        return tensor.mT if self.flipped else tensor

    def weight(self) -> Tensor:
        """(d, n) the parameter itself. ConfigError where its memory cannot be seen as a matrix."""
        seen = self.matrix(self.data)
        if seen.data_ptr() != self.data.data_ptr():
            raise ConfigError(
                f"{self.name} {tuple(self.param.shape)} with strides {self.param.stride()} cannot be seen as a matrix "
                "without a copy; make it contiguous, or give its group rank=None"
            )
        return seen

    def gradient(self) -> Tensor:
        """(d, n) its gradient in the dtype that is computed in; a view where it has that dtype."""
        return self.matrix(self.grad).to(self.work)


def sites_of(groups: Sequence[dict[str, Any]], states: dict[Tensor, dict[str, Any]]) -> list[Site]:
    """All tensors of an optimizer's groups in order, each with its place among the projected ones of its group."""
    found = list[Site]()
    for group in groups:
        first = len(found)
        names = group.get("param_names") or [f"parameter {first + i}" for i in range(len(group["params"]))]
        made = [
            Site(param, group, states, first + i, name)
            for i, (name, param) in enumerate(zip(names, group["params"], strict=True))
        ]
        projected = [site for site in made if site.rank is not None]
        for place, site in enumerate(projected):
            site.place, site.peers = place, len(projected)
        found += made
    return found
