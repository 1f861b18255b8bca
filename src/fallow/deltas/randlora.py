"""RandLoRA: an update of full rank, made of fixed random bases with trained diagonal scalings.

Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", arXiv 2502.00987.

    G = scale * sum_i B_i diag(lambda_i) A diag(gamma_i) = B U (M, m)        W' = W + (G or Gᵀ, whichever is (out, in))
    U[(i, k), j] = scale * lambda[i, k] A[k, j] gamma[i, j] (n r, m)

    m = min(out, in)    M = max(out, in)    n = ceil(m / r)
    frozen, of all layers together: A (r, m), B = [B_1 ... B_n] (M, n r)      trained: lambda (n, r), gamma (n, m)

lambda starts at 0 and gamma at 1 / max(n, m). At the first step only lambda moves, so that after it the rank is r; from
the second on it is full. The last base is whole where r does not divide m.

A and B are drawn from the seed and sliced by each layer; the file holds lambda and gamma only (PEFT's holds the bases
too). An entry of them depends on the seed and its place alone, and is scaled by the standard deviation of its
distribution, not of the tensor. Kept for the backward: the input at the smaller of the layer's two sides, lambda and
gamma; neither U nor x U is. PEFT multiplies column i r + k of B with row k n + i of U, the same in distribution; here
both are the equation's, unless `pairing` says otherwise, for PEFT's files.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from math import ceil, prod
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fallow.core import noise
from fallow.core.delta import Delta, MethodOptions, Site, fits_rank, number, one_of, whole
from fallow.core.errors import ConfigError
from fallow.deltas.randlora_linear import BasesLinear


class RandLoRA(Delta):
    """`dropout` acts on x."""

    name = "randlora"

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`rank`: of one base; a smaller one has more trained numbers. `alpha`: None for 2 r with "official", 20 r with
        "peft". `scaling`: "official" is alpha / (r sqrt(n)), "peft" alpha / r. `zeros`: the share of zeros in bases of
        -1, 0 and 1 (the paper's sparse ones: 2/3, very sparse ones: 1 - 1/sqrt(m)); 0 for uniform bases. `dropout`: on
        the layer's input. `form`: "added", beside the layer, or "rewritten", which runs the layer with W + G in the
        place of W: faster for many tokens, and takes no dropout. `pairing`: how the columns of B are dealt out, as in
        the "equation", or in the order of "peft", at the price of a copy of B and with A and B in the file, as
        `fallow.from_peft` needs it.
        """

        rank: int = 32
        alpha: float | None = None
        scaling: Literal["official", "peft"] = "official"
        zeros: float = 0.0
        dropout: float = 0.0
        form: Literal["added", "rewritten"] = "added"
        pairing: Literal["equation", "peft"] = "equation"

        def check(self) -> None:
            whole("rank", self.rank)
            one_of("scaling", self.scaling, ("official", "peft"))
            number("zeros", self.zeros, 0.0, 0.999)
            number("dropout", self.dropout, 0.0, 0.99)
            if self.alpha is not None:
                number("alpha", self.alpha, open_below=True)
            one_of("form", self.form, ("added", "rewritten"))
            one_of("pairing", self.pairing, ("equation", "peft"))
            if self.dropout and self.form == "rewritten":
                raise ConfigError(f"dropout={self.dropout} acts on the input of what is added; give form='added' or 0")

    def setup(self, site: Site) -> None:
        fits_rank(site, self.o.rank)
        if self.o.form == "rewritten":
            self.mode = "weight"  # type: ignore[misc]
        self.small, self.large = min(site.shape), max(site.shape)
        self.bases = ceil(self.small / self.o.rank)
        self.columns = self.bases * self.o.rank
        official = self.o.scaling == "official"
        alpha = self.o.alpha or (2 if official else 20) * self.o.rank
        self.scale = alpha / self.o.rank / (self.bases**0.5 if official else 1.0)
        saved = self.o.pairing == "peft"
        sort = f"{self.o.zeros:g}".replace(".", "_") + ("_peft" if saved else "")
        self.names = f"bases_a_{sort}", f"bases_b_{sort}"
        shapes = (self.o.rank, self.small), (self.large, self.columns)
        for name, shape in zip(self.names, shapes, strict=True):
            draw = partial(noise.matrix, site.key(name[:7], shared=True), zeros=self.o.zeros)
            self.share_matrix(name, site, shape, draw, saved)
        self.lambda_ = nn.Parameter(torch.zeros(self.bases, self.o.rank))
        self.gamma = nn.Parameter(torch.full((self.bases, self.small), 1 / max(self.bases, self.small)))

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Options) -> int:
        return ceil(min(shape) / options.rank) * (options.rank + min(shape))

    def sliced(self) -> tuple[Tensor, Tensor]:
        """This layer's A (r, m) and B (M, n r): views of the shared ones, but for PEFT's pairing."""
        a, b = map(self.shared, self.names)
        a, b = a[: self.o.rank, : self.small], b[: self.large, : self.columns]
        return a, b if self.o.pairing == "equation" else reordered(b, self.o.rank, self.bases)

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = self.sliced()
        u = cast(Tensor, _Scaled.apply(a, self.lambda_ * self.scale, self.gamma))
        return (b, u) if self.view.shape[0] == self.large else (u.T, b.T)

    def _layout(self) -> None:
        super()._layout()
        self.any_dtype = self.view.kind == "linear"  # so that x is kept as it came

    def delta_forward(self, x: Tensor) -> Tensor:
        kind = self.view.kind
        if kind == "linear":
            a, b = self.sliced()
            tall = self.view.shape[0] == self.large
            dtype = self.dtype
            if torch.is_autocast_enabled(x.device.type):
                dtype = torch.get_autocast_dtype(x.device.type)
            lambda_ = self.lambda_ * self.scale
            return cast(Tensor, _Linear.apply(x, a, b, lambda_, self.gamma, tall, self._dense(x), dtype))
        if kind == "conv" and self._dense(x):
            return self.view.op(x, self.delta_weight())
        return super().delta_forward(x)

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        (a, b), lambda_ = self.sliced(), self.lambda_ * self.scale
        tall = self.view.shape[0] == self.large
        return cast(Tensor, BasesLinear.apply(x, w, bias, b, tall, _scaled, _in_place, a, lambda_, self.gamma))

    def _dense(self, x: Tensor) -> bool:
        """Whether forming D once costs less than taking every row of x through n r channels, both ways."""
        rows = x.numel() // x.shape[self.view.channels]
        if self.view.kind == "conv":
            rows //= prod(cast(Any, self.view).stride)
        return rows * (3 * self.small - self.large) > 3 * self.large * self.small


def reordered(b: Tensor, rows: int, columns: int) -> Tensor:
    """B (M, rows * columns) with column k * columns + i in the place i * rows + k."""
    return b.unflatten(1, (rows, columns)).transpose(1, 2).flatten(1)


def _scaled(a: Tensor, lambda_: Tensor, gamma: Tensor) -> Tensor:
    """U (n r, m)"""
    return (lambda_[:, :, None] * a).mul_(gamma[:, None]).flatten(0, 1)


def _diagonals(grad: Tensor, a: Tensor, lambda_: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of lambda and gamma, of U's (n r, m)."""
    return _in_place(grad.to(a.dtype, copy=True), a, lambda_, gamma)


def _in_place(grad: Tensor, a: Tensor, lambda_: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    product = grad.view(*lambda_.shape, -1).mul_(a)
    return (product @ gamma[:, :, None])[..., 0], (lambda_[:, None] @ product)[:, 0]


class _Scaled(torch.autograd.Function):
    """U, of which nothing of its size is kept."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, lambda_: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(a, lambda_, gamma)
        return _scaled(a, lambda_, gamma)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_diagonals(grad, *ctx.saved_tensors)


class _Linear(torch.autograd.Function):
    """x Gᵀ or x G without a copy of U, or of G if it is formed, between forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, lambda_: Tensor, gamma: Tensor,
        tall: bool, dense: bool, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.tall, ctx.dense, ctx.dtypes = tall, dense, (x.dtype, dtype)
        kept, u, b_ = x, _scaled(a, lambda_, gamma).to(dtype), b.to(dtype)
        x = x.to(dtype)
        if dense:
            g = b_ @ u
            y = F.linear(x, g if tall else g.T)
        elif tall:
            y = F.linear(F.linear(x, u), b_)
        else:
            kept = x @ b_
            y = kept @ u
        ctx.save_for_backward(kept, a, b, lambda_, gamma)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, a, b, lambda_, gamma = ctx.saved_tensors
        (x_dtype, dtype), tall = ctx.dtypes, ctx.tall
        u, b, grad, kept = _scaled(a, lambda_, gamma).to(dtype), b.to(dtype), grad.to(dtype), kept.to(dtype)
        rows, kept_rows = grad.reshape(-1, grad.shape[-1]), kept.reshape(-1, kept.shape[-1])
        if ctx.dense:
            grad_g = rows.T @ kept_rows if tall else kept_rows.T @ rows
            grad_u = b.T @ grad_g
            g = b @ u
            grad_x = grad @ (g if tall else g.T) if ctx.needs_input_grad[0] else None
        elif tall:
            grad_h = rows @ b
            grad_u = grad_h.T @ kept_rows
            grad_x = (grad_h @ u).view(kept.shape) if ctx.needs_input_grad[0] else None
        else:
            grad_u = kept_rows.T @ rows
            grad_x = (grad @ u.T) @ b.T if ctx.needs_input_grad[0] else None
        found = _diagonals(grad_u, a, lambda_, gamma)
        return None if grad_x is None else grad_x.to(x_dtype), None, None, *found, None, None, None
