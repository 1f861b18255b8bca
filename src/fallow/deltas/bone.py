"""Bone: one zero matrix for each layer, shared by all shards of the input (MiSS), or an affine map of W's blocks (Bat).

"MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", first named Bone, then DiSHA
(arXiv 2409.15371). W (out, in); the shard width r is the rank:

    miss   D (r, out)            dW[a, c] = D[c mod r, a]:     y = x Wᵀ + b + S D, S = sum of the shards of x, r wide
    mini   D (r, q)              dW[a, c] = D[c mod r, a mod q]
    bat    B (out / r, r, r)     W'_jm = W_jm (I + B_j) + B_j of blocks (r, r); `group="in"`: B_m (in / r, r, r)

The last shard is cut where r does not divide the inputs (miss, mini); r above the inputs is the inputs. A convolution's
inputs are its patch, flattened; where r is a multiple of the kernel's size, channels are summed before one convolution.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fallow.core.delta import Delta, MethodOptions, Mode, Site, number, one_of, whole
from fallow.core.errors import ConfigError
from fallow.core.factored import through
from fallow.core.low_rank_linear import low_rank_linear
from fallow.core.views import ConvView, EmbeddingView


class Bone(Delta):
    """Shard-sharing updates of zero start; exact rank at most r in miss and mini, any rank in bat."""

    name = "bone"
    mode: ClassVar[Mode] = "add"  # of miss and mini; a layer's own is "weight" in bat
    exact: ClassVar[bool] = True
    any_dtype = True  # S is summed in the dtype of D: no float32 copy of a half-precision x, and no overflow of S

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`rank`: r, the width of a shard; above the inputs it is the inputs. `kind`: "miss", "mini" or "bat", see
        above. `mini_rank`: q of "mini", which divides the outputs. `group`: of "bat": blocks of the same outputs
        ("out") or of the same inputs ("in") share one B. `dropout`: on the layer's input; "bat" takes none.
        """

        rank: int = 64
        kind: Literal["miss", "mini", "bat"] = "miss"
        mini_rank: int = 64
        group: Literal["out", "in"] = "out"
        dropout: float = 0.0

        def check(self) -> None:
            whole("rank", self.rank)
            whole("mini_rank", self.mini_rank)
            one_of("kind", self.kind, ("miss", "mini", "bat"))
            one_of("group", self.group, ("out", "in"))
            number("dropout", self.dropout, 0.0, 0.999)
            if self.kind == "bat" and self.dropout:
                raise ConfigError(f"dropout={self.dropout} has no place in kind='bat', which has no input of its own")

    def setup(self, site: Site) -> None:
        out, width = site.shape
        r, q = self.o.rank, self.o.mini_rank
        if self.o.kind == "bat":
            if out % r or width % r:
                raise ConfigError(f"rank={r} must divide both sides of '{site.name}' {site.shape} for kind='bat'")
            self.mode, self.exact = "weight", False  # type: ignore[misc]
            self.blocks = nn.Parameter(torch.zeros((out if self.o.group == "out" else width) // r, r, r))
            return
        if self.o.kind == "mini" and out % q:
            raise ConfigError(f"mini_rank={q} must divide the {out} outputs of '{site.name}' for kind='mini'")
        self.shared_block = nn.Parameter(torch.zeros(min(r, width), q if self.o.kind == "mini" else out))

    # -- miss and mini ------------------------------------------------------------------------------------------------

    def _block(self) -> Tensor:
        """D (r, out)"""
        return self.shared_block.repeat(1, self.view.shape[0] // self.shared_block.shape[1])

    def factors(self) -> tuple[Tensor, Tensor]:
        """Dᵀ (out, r) and the 0/1 matrix (r, in) that sums the shards. ConfigError in bat."""
        if self.o.kind == "bat":
            return super().factors()
        return self._block().T, self._tiled(torch.eye(self.shared_block.shape[0]).to(self.shared_block))

    def delta_weight(self) -> Tensor:
        return self._tiled(self._block().T)

    def _tiled(self, block: Tensor) -> Tensor:
        """(n, r) side by side until it is as wide as the layer, (n, in)."""
        width = self.view.shape[1]
        return block.repeat(1, -(-width // block.shape[1]))[:, :width]

    def delta_forward(self, x: Tensor) -> Tensor:
        if isinstance(self.view, EmbeddingView):
            return self._rows(x, self.view.padding_idx)
        if isinstance(self.view, ConvView):
            return self._convolved(x, self.view)
        r, q = self.shared_block.shape
        change = _shard_sum(x, r, -1, self.shared_block.dtype) @ self.shared_block
        return change if q == self.view.shape[0] else change.repeat(*[1] * (x.dim() - 1), self.view.shape[0] // q)

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if self.o.kind == "mini":
            return (F.linear(x, w, bias) + self.delta_forward(x)).to(x.dtype)
        return low_rank_linear(x, w, bias, self.shared_block.T, _Shards(self.shared_block.shape[0]))

    def _rows(self, x: Tensor, padding: int | None) -> Tensor:
        rows = F.embedding(x % self.shared_block.shape[0], self._block())
        # the row of the padding is read but gets no gradient, as in the layer itself
        return rows if padding is None else torch.where((x == padding)[..., None], rows.detach(), rows)

    def _convolved(self, x: Tensor, view: ConvView) -> Tensor:
        block, taps = self._block(), view.kernel[1:].numel()
        if block.shape[0] % taps:
            b, a = self.factors()
            return through(view, x, a, b)
        narrow, channels = copy.copy(view), block.shape[0] // taps
        narrow.kernel = torch.Size((channels, *view.kernel[1:]))
        groups = x.unflatten(1, (view.groups, -1))
        return narrow.op(_shard_sum(groups, channels, 2, block.dtype).flatten(1, 2), block.T)

    # -- bat ----------------------------------------------------------------------------------------------------------

    def transform(self, w: Tensor) -> Tensor:
        if self.o.kind != "bat":
            return super().transform(w)
        return cast(Tensor, _Affine.apply(w, self.blocks.to(w.dtype), self.o.group == "out"))

    def inverse(self, w: Tensor) -> Tensor:
        """W of W'; of bat by W_jm = (W'_jm - B_j) (I + B_j)^-1, in float32: a B with the eigenvalue -1 has none."""
        if self.o.kind != "bat":
            return w - self.delta_weight().to(w.dtype)
        b, r = self.blocks.to(w.dtype), self.o.rank
        group = 1 if self.o.group == "out" else 2
        tiles = w.reshape(w.shape[0] // r, r, -1, r).transpose(1, 2)  # (out / r, in / r, r, r)
        b = b.unsqueeze(group if group == 1 else 0)
        solved = torch.linalg.solve(b + torch.eye(r).to(b), tiles - b, left=False)
        return solved.transpose(1, 2).reshape(w.shape)

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        """r out (miss; bat by outputs), r in (bat by inputs), r q (mini)."""
        out, width = shape
        if options.kind == "bat":
            return options.rank * (out if options.group == "out" else width)
        return min(options.rank, width) * (options.mini_rank if options.kind == "mini" else out)


def _shard_sum(x: Tensor, r: int, dim: int, dtype: torch.dtype) -> Tensor:
    """The sum of the shards of r features each along `dim`, the last of which may be shorter; no padded copy of x."""
    width = x.shape[dim]
    if width == r:
        return x.to(dtype)
    dim = dim % x.dim()
    whole_shards = x.narrow(dim, 0, width - width % r).unflatten(dim, (-1, r)).sum(dim, dtype=dtype)
    if width % r == 0:
        return whole_shards
    rest = x.narrow(dim, width - width % r, width % r).to(dtype)
    return whole_shards + F.pad(rest, [0, 0] * (x.dim() - 1 - dim) + [0, r - width % r])


@dataclasses.dataclass(frozen=True)
class _Shards:
    """The 0/1 matrix that sums the shards of `width` features each, as `low_rank_linear` takes it."""

    width: int

    def down(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return _shard_sum(rows, self.width, -1, dtype).T

    def back(self, rows: Tensor, h: Tensor) -> None:
        h, rest = h.T.contiguous(), rows.shape[1] % self.width
        rows[:, : rows.shape[1] - rest].unflatten(1, (-1, self.width)).add_(h.unsqueeze(1))
        if rest:
            rows[:, -rest:] += h[:, :rest]

    def plain(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return _shard_sum(x, self.width, -1, dtype)


class _Affine(torch.autograd.Function):
    """W (I + B_j) + B_j for all blocks; the backward needs W alone: dB_j = sum over m of (W_jm + I)ᵀ G_jm."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, b: Tensor, by_outputs: bool) -> Tensor:
        ctx.save_for_backward(w, b)
        ctx.by_outputs = by_outputs
        # W + W B, not W (I + B): exact at B = 0 in every precision of the product
        rows = _rows_of(w, b, by_outputs)
        changed = torch.baddbmm(rows, rows, b)
        if by_outputs:
            changed.view(b.shape[0], b.shape[1], -1, b.shape[1]).add_(b.unsqueeze(2))
            return changed.view(w.shape)
        changed.view(b.shape[0], -1, *b.shape[1:]).add_(b.unsqueeze(1))
        return _undone(changed, w.shape, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        w, b = ctx.saved_tensors
        by_outputs, r = ctx.by_outputs, b.shape[1]
        rows, upstream = _rows_of(w, b, by_outputs), _rows_of(grad, b, by_outputs)
        tiles = upstream.reshape(b.shape[0], r, -1, r).sum(2) if by_outputs else upstream.unflatten(1, (-1, r)).sum(1)
        into = grad + _undone(upstream @ b.mT, w.shape, by_outputs) if ctx.needs_input_grad[0] else None
        return into, torch.baddbmm(tiles, rows.mT, upstream), None


def _rows_of(w: Tensor, b: Tensor, by_outputs: bool) -> Tensor:
    """W (out, in) as (blocks, rows, r), so that all that one B maps stands in one matrix; a view."""
    return w.reshape(b.shape[0], -1, b.shape[1]) if by_outputs else w.unflatten(1, b.shape[:2]).transpose(0, 1)


def _undone(rows: Tensor, shape: torch.Size, by_outputs: bool) -> Tensor:
    return (rows if by_outputs else rows.transpose(0, 1)).reshape(shape)
