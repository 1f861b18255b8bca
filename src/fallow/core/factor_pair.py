"""Deltas whose change is s B A of two thin Parameters, which a start may fill.

D = s (B A - B0 A0)      A (r, in), B (out, r); B0, A0: what a start took out of the weight, frozen, beside it
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fallow.core.delta import Delta, MethodOptions, whole
from fallow.core.errors import ConfigError

if TYPE_CHECKING:
    from fallow.core.starting import Pair


@dataclasses.dataclass(kw_only=True)
class PairOptions(MethodOptions):
    """`offset`: how many ranks of a start's factors are kept and subtracted, so that the output is unchanged at first;
    filled in by `start=`.
    """

    offset: int = 0

    def check(self) -> None:
        whole("offset", self.offset, 0)


class FactorPair(Delta):
    """Has `self.A` (r, in) and `self.B` (out, r). Call `keep_pair(a, b)` in setup, and `with_start(b, a)` in factors.

    `start_A` (q, in), `start_B` (out, q): buffers where q = `self.o.offset` is not 0: A0, and B0 without the scale.
    """

    A: nn.Parameter
    B: nn.Parameter
    start_A: Tensor
    start_B: Tensor

    def keep_pair(self, a: Tensor, b: Tensor) -> None:
        """Make these the Parameters, and zeros what is subtracted, where something is."""
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)
        self.keep_start()

    def keep_start(self) -> None:
        """Make room for what is subtracted, where something is."""
        if count := self.o.offset:
            out, inner = self.view.shape
            self._subtract(torch.zeros(count, inner), torch.zeros(out, count))

    def _subtract(self, a: Tensor, b: Tensor) -> None:
        self.register_buffer("start_A", a)
        self.register_buffer("start_B", b)
        self.o = dataclasses.replace(self.o, offset=a.shape[0])

    def with_start(self, b: Tensor, a: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """B (out, r), its scale s within, and A, with the start subtracted: [B, -s B0] and [A; A0]."""
        if not self.o.offset:
            return b, a
        return torch.cat([b, self.start_B * -scale], 1), torch.cat([a, self.start_A])

    def pair_form(self) -> tuple[int, float]:
        return self.A.shape[0], float(getattr(self, "scaling", 1.0))

    @torch.no_grad()
    def take(self, pair: Pair) -> None:
        if pair.core is not None:
            raise ConfigError(f"'{self.name}' has no core between its factors, which this start is for; use 'lora-xs'")
        self.A.copy_(pair.a)
        self.B.zero_() if pair.b is None else self.B.copy_(pair.b)
        if pair.b is not None and not pair.kept:
            self._subtract(self.A.detach().clone(), self.B.detach().clone())

    def learned(self, b: Tensor | None = None, a: Tensor | None = None) -> Tensor:
        """(r,): |B_k A_k - B0_k A0_k|, what each rank has learned, where as many are subtracted; without the scale.

        `b` (out, r), `a` (r, in): in the place of B and A, where something stands between them or they are in pieces.
        """
        b, a = (self.B if b is None else b).detach(), (self.A if a is None else a).detach()
        if not self.o.offset:
            return b.norm(dim=0) * a.norm(dim=1)
        more_b, more_a = b - self.start_B, a - self.start_A  # B A - B0 A0 = (B - B0) A + B0 (A - A0)
        square = (more_b.norm(dim=0) * a.norm(dim=1)) ** 2 + (self.start_B.norm(dim=0) * more_a.norm(dim=1)) ** 2
        both = (more_b * self.start_B).sum(0) * (more_a * a).sum(1)
        return (square + 2 * both).clamp_min(0).sqrt()

    def used_ranks(self) -> int:
        """All where a start was taken out: a rank that is worth nothing then is so to rounding alone."""
        return int(self.o.rank) if self.o.offset else super().used_ranks()

    @torch.no_grad()
    def resize_pair(self, keep: Tensor, a: Tensor, b: Tensor, factor: float = 1.0, cut: bool = True) -> None:
        """Keep these ranks, B times `factor`, and add fresh ones. `cut`: what is subtracted goes with its rank, so that
        a rank that has learned nothing goes without any change; else it stays.
        """
        trained, old_a, old_b = self.A.requires_grad, self.A, self.B
        a, b = a.to(old_a), b.to(old_b)
        self.A = nn.Parameter(torch.cat([old_a[keep], a]), trained)
        self.B = nn.Parameter(torch.cat([old_b[:, keep] * factor, b], 1), trained)
        if self.o.offset and cut:
            self._subtract(
                torch.cat([self.start_A[keep], torch.zeros_like(a)]),
                torch.cat([self.start_B[:, keep] * factor, torch.zeros_like(b)], 1),
            )
