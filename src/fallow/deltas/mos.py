"""MoS: all layers of a type build their low-rank vectors from one pool of shards.

Wang et al., "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards", arXiv 2410.00938.

    W' = W + (alpha / r) B A    A = [P_A[I_A].reshape(r - p, in); private (p, in)]    Bᵀ = likewise, of (r, out)
    pools of a type, of L layers: P_A (n, in / l), P_B (n, out / l), n = (e - p) L l
    I_A, I_B: (r - p) l different rows of a pool, drawn from the seed for each layer and for each factor, frozen

e is the rank whose numbers are trained, r the rank that acts, l the shards of a vector, p the private rank: vectors
that one layer has for itself. e = p = r is LoRA. A starts uniform in ±1 / sqrt(in), B at zero; for an embedding A at
zero and B normal, as LoRA's. A layer's rows depend on the seed, its name and L: nothing of them is in the file.

The paper needs r - p <= (e - p) L. Smaller groups, such as a model's only head, act with the rank p + (e - p) L that
their pool has. The paper keeps private shards in the pool too, and its code writes r (in + out) numbers a layer to the
file; here a private vector is the layer's own tensor, and the file has what is trained.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Literal

import torch
from torch import Tensor, nn

from fallow.core import noise
from fallow.core.delta import Delta, MethodOptions, Site, fits_rank, number, one_of, whole
from fallow.core.errors import ConfigError


class MoS(Delta):
    """The trained tensors of a group are the parameters of its layers together."""

    name = "mos"

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`rank`: r, which acts. `equivalent_rank`: e, which is paid for. `shards`: l; in a layer the largest divisor
        of it that divides in and out. `private_rank`: p, the layer's own. `alpha`: the scale is alpha / r. `dropout`:
        on the layer's input. `group_by`: layers share a pool that have the same shape and the same last part of their
        names ("type"), or the same shape ("shape"); layers with other options have a pool of their own.
        """

        rank: int = 8
        equivalent_rank: int = 2
        shards: int = 4
        private_rank: int = 1
        alpha: float = 16.0
        dropout: float = 0.1
        group_by: Literal["type", "shape"] = "type"

        def check(self) -> None:
            whole("rank", self.rank)
            whole("equivalent_rank", self.equivalent_rank, most=self.rank)
            whole("shards", self.shards)
            whole("private_rank", self.private_rank, 0, self.equivalent_rank)
            if self.private_rank == self.equivalent_rank != self.rank:
                raise ConfigError(
                    f"private_rank={self.private_rank} leaves nothing to share of equivalent_rank={self.private_rank}, "
                    f"so that rank={self.rank} cannot be reached; give a smaller private_rank or the same rank"
                )
            number("alpha", self.alpha, open_below=True)
            number("dropout", self.dropout, 0.0, 0.99)
            one_of("group_by", self.group_by, ("type", "shape"))

    def setup(self, site: Site) -> None:
        o, (out, inner) = self.o, site.shape
        fits_rank(site, o.equivalent_rank, "equivalent_rank")
        shards = math.gcd(out, inner, o.shards)
        if o.private_rank:
            self.private_a, self.private_b = map(nn.Parameter, self._start(site, o.private_rank, 1))
        public = o.equivalent_rank - o.private_rank
        if not public:
            return
        sort = site.name.rpartition(".")[2] if o.group_by == "type" else "all"
        sort = f"{sort}_{out}x{inner}_r{o.rank}e{o.equivalent_rank}p{o.private_rank}l{shards}"
        self.pools = f"pool_a_{sort}", f"pool_b_{sort}"
        self.index, names = f"index_{sort}", f"names_{sort}"
        common = site.common
        for name, rows in zip(self.pools, self._start(site, public * shards, shards), strict=True):
            held = getattr(common, name, None)
            rows = rows if held is None else torch.cat([held.detach(), rows.to(held)])
            common.register_parameter(name, nn.Parameter(rows))
        own = torch.tensor([zlib.crc32(site.name.encode()) - 2**31]).int()
        held = getattr(common, names, None)
        own = own if held is None else torch.cat([held.cpu(), own])
        self.place = len(own) - 1
        common.register_buffer(names, own, persistent=False)
        common.register_buffer(self.index, self._routes(site, own, public, shards), persistent=False)

    def _start(self, site: Site, rows: int, shards: int) -> tuple[Tensor, Tensor]:
        """Fresh shards of A (rows, in / shards) and of Bᵀ (rows, out / shards), one of them zero."""
        out, inner = site.shape
        if self.view.kind == "embedding":
            return torch.zeros(rows, inner // shards), torch.randn(rows, out // shards)
        a = torch.empty(rows, inner // shards).uniform_(-1, 1) / math.sqrt(inner)
        return a, torch.zeros(rows, out // shards)

    def _routes(self, site: Site, names: Tensor, public: int, shards: int) -> Tensor:
        """(2, L, shards taken): the rows of both pools that each layer of the group takes."""
        rows = torch.arange(len(names) * public * shards, dtype=torch.int32)
        taken = min((self.o.rank - self.o.private_rank) * shards, len(rows))
        keys = (site.key(salt, shared=True) for salt in ("mos a", "mos b"))
        return torch.stack([noise.bits(key, names, rows).topk(taken).indices for key in keys]).int()

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Options) -> int:
        return options.private_rank * sum(shape)

    @classmethod
    def shared_count(cls, shapes: list[tuple[int, int]], options: Options) -> int:
        return (options.equivalent_rank - options.private_rank) * sum(map(sum, shapes))

    @property
    def dtype(self) -> torch.dtype:
        return (self.private_a if self.o.private_rank else self.shared(self.pools[0])).dtype

    def factors(self) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []
        for number_of, side in enumerate(("a", "b")):
            width = self.view.shape[1 - number_of]
            parts = []
            if self.o.equivalent_rank > self.o.private_rank:
                pool = self.shared(self.pools[number_of])
                parts.append(pool.index_select(0, self.shared(self.index)[number_of, self.place]).view(-1, width))
            if self.o.private_rank:
                parts.append(getattr(self, f"private_{side}"))
            found.append(torch.cat(parts) if len(parts) > 1 else parts[0])
        a, b = found
        return b.T * (self.o.alpha / len(a)), a

    @torch.no_grad()
    def randomize(self) -> None:
        super().randomize()
        if self.o.equivalent_rank > self.o.private_rank:
            for name in self.pools:
                self.shared(name).add_(0.1 * torch.randn_like(self.shared(name)))
