"""DyLoRA: one LoRA that works at every rank, because each step trains it at a rank drawn anew.

"DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low Rank Adaptation",
arXiv 2210.07558.

    W' = W + (alpha / b) B[:, :b] A[:b]      A (R, in), uniform in +-1 / sqrt(in); B (out, R), zero
    each step                                b drawn from rank_min..R, in multiples of `unit`, one for the whole model
    update "frozen"                          the last unit of those b alone is trained
    update "full"                            all b are

The draw follows from the seed and the step alone, so that all layers, all processes, all passes of an accumulation and
what checkpointing runs again have the same. Outside training the rank is R, or `fallow.condition(model, rank=b)`;
`resize(b)` cuts for good, which is an ordinary LoRA of rank b and the same alpha.

Each unit is a pair of Parameters of its own, `A0`, `B0`, `A1`, ..., without a gradient while it rests: so an optimizer
leaves it alone, moments, step count and weight decay included. In the official code the resting units have zero
gradients, and move; `strict=False` does that, with one A and one B. Their draws also differ by one, `randint(0, R)`
being their rank less one. "frozen" gives a unit one step in R: it wants 2 to 4 times the learning rate. Under
DistributedDataParallel resting units want `find_unused_parameters=True`; torch.compile makes a graph for each rank
(`torch._dynamo.config.recompile_limit`). A weight that its module reads itself is refused: there a training step cannot
be told from a merge.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.delta import Site, fits_rank, number, one_of, whole
from fallow.core.errors import ConfigError
from fallow.core.factor_pair import PairOptions
from fallow.core.factored import through
from fallow.core.starting import Pair
from fallow.deltas.lora import LoRA


class DyLoRA(LoRA):
    name = "dylora"
    supports = ("linear", "conv", "embedding")
    any_dtype = True
    steps: Tensor

    @dataclasses.dataclass(kw_only=True)
    class Options(PairOptions):
        """`rank`: R. `alpha`: the scale at rank b is alpha / b. `dropout`: on the layer's input. `rank_min`: the least
        that is drawn. `unit`: ranks that go together; it divides both (a `rank_min` of 1 stands for one unit).
        `update`: "frozen", the last unit of those drawn alone is trained, or "full", all of them. `strict`: resting
        units have no gradient; False gives them one of zero, with which optimizers move them, as in the official code.
        `geometric`: p of a draw of the k-th rank with weight (1 - p)^k, which trains low ranks more often; 0 is
        uniform.
        """

        rank: int = 8
        alpha: float = 16.0
        dropout: float = 0.0
        rank_min: int = 1
        unit: int = 1
        update: str = "frozen"
        strict: bool = True
        geometric: float = 0.0

        def check(self) -> None:
            super().check()
            whole("rank", self.rank)
            number("alpha", self.alpha, open_below=True)
            number("dropout", self.dropout, most=0.99)
            whole("rank_min", self.rank_min, most=self.rank)
            whole("unit", self.unit, most=self.rank)
            for name, value in (("rank", self.rank), ("rank_min", self.rank_min)):
                if value % self.unit and value != 1:
                    raise ConfigError(f"unit={self.unit} must divide {name}={value}; give one that does")
            one_of("update", self.update, ("frozen", "full"))
            one_of("strict", self.strict, (True, False))
            number("geometric", self.geometric, most=0.99)

    def setup(self, site: Site) -> None:
        if site.fresh:
            fits_rank(site, self.o.rank)
        self.seed = site.seed
        self._keep(*self.start(self.o.rank))
        self.keep_start()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.drawn = self.draw(0)

    def _keep(self, a: Tensor, b: Tensor, trained: bool = True) -> None:
        """Make the factors the Parameters of their units."""
        size = self.o.unit if self.o.strict else self.o.rank
        for name in [name for name in self._parameters if name[0] in "AB"]:
            delattr(self, name)
        for i, (rows, columns) in enumerate(zip(a.split(size), b.split(size, 1), strict=True)):
            self.register_parameter(f"A{i}", nn.Parameter(rows.clone(), trained))
            self.register_parameter(f"B{i}", nn.Parameter(columns.clone(), trained))

    def draw(self, step: int) -> int:
        """The rank of the step after step number `step`."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        unit, first = self.o.unit, -(-self.o.rank_min // self.o.unit)
        weights = (1 - self.o.geometric) ** torch.arange(self.o.rank // unit - first + 1, dtype=torch.float64)
        return unit * (first + int(torch.multinomial(weights, 1, generator=generator)))

    def on_step(self, step: int, total: int | None) -> None:
        self.steps.fill_(step)
        self.drawn = self.draw(step)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.drawn = self.draw(int(self.steps))

    @property
    def chosen(self) -> int:
        """The rank outside training, of merging and of `factors`."""
        rank = self.context.get("rank", self.o.rank)
        whole("rank", rank, most=self.o.rank)
        if rank % self.o.unit:
            raise ConfigError(f"rank={rank} must be a multiple of unit={self.o.unit}")
        return int(rank)

    @property
    def scaling(self) -> float:
        return float(self.o.alpha / self.chosen)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self._at(self.chosen)

    def delta_forward(self, x: Tensor) -> Tensor:
        b, a = self._at(self.drawn, training=True) if self.training else self.factors()
        return through(self.view, x, a, b)

    def _at(self, rank: int, training: bool = False) -> tuple[Tensor, Tensor]:
        """(alpha / rank) B (out, rank) and A (rank, in); in training what rests is detached."""
        size = self.o.unit if self.o.strict else self.o.rank
        names = range(-(-rank // size))
        rows, columns = [getattr(self, f"A{i}") for i in names], [getattr(self, f"B{i}") for i in names]
        if not self.o.strict:
            rows, columns = list(rows[0][:rank].split(self.o.unit)), list(columns[0][:, :rank].split(self.o.unit, 1))
        if training and self.o.update == "frozen":
            rows[:-1], columns[:-1] = [t.detach() for t in rows[:-1]], [t.detach() for t in columns[:-1]]
        s = self.o.alpha / rank
        b, a = torch.cat(columns, 1) * s, torch.cat(rows)
        if not self.o.offset:
            return b, a
        return torch.cat([b, self.start_B[:, :rank] * -s], 1), torch.cat([a, self.start_A[:rank]])

    def pair_form(self) -> tuple[int, float]:
        return self.o.rank, float(self.o.alpha / self.o.rank)

    @torch.no_grad()
    def take(self, pair: Pair) -> None:
        """The first ranks are subtracted with their units, so that the model is the base at every rank."""
        if pair.core is not None:
            raise ConfigError(f"'{self.name}' has no core between its factors, which this start is for; use 'lora-xs'")
        out, inner = self.view.shape
        a, b = torch.empty(self.o.rank, inner).copy_(pair.a), torch.zeros(out, self.o.rank)
        if pair.b is not None:
            b.copy_(pair.b)
        self._keep(a, b)
        if pair.b is not None and not pair.kept:
            self._subtract(a, b)

    def importance(self) -> Tensor:
        """What a cut at each rank loses at most: the sum of s |B_k| |A_k|, or of what these have changed since a start,
        from it on, so it falls.
        """
        b, a = (factor.detach() for factor in self._at(self.o.rank))
        s = self.o.alpha / self.o.rank
        worth = s * self.learned(b[:, : self.o.rank] / s, a[: self.o.rank])
        return worth.flip(0).cumsum(0).flip(0)

    def used_ranks(self) -> int:
        """All, or those of `fallow.condition(model, rank=b)`: at a lower rank the scale is another."""
        return self.chosen

    @torch.no_grad()
    def resize(self, rank: int) -> None:
        """The first ranks, as they are: the scale becomes alpha / rank, for which they were trained."""
        whole("rank", rank)
        b, a = self._at(self.o.rank)
        b, a = b[:, : self.o.rank] * (self.o.rank / self.o.alpha), a[: self.o.rank]
        more = max(0, rank - self.o.rank)
        fresh_a, fresh_b = self.start(more)
        trained = next(self.parameters()).requires_grad
        self.o = dataclasses.replace(self.o, rank=rank, rank_min=min(self.o.rank_min, rank))
        self._keep(torch.cat([a[:rank], fresh_a.to(a)]), torch.cat([b[:, :rank], fresh_b.to(b)], 1), trained)
        if self.o.offset:
            zero_a, zero_b = torch.zeros_like(fresh_a).to(a), torch.zeros_like(fresh_b).to(b)
            start_a, start_b = self.start_A[:rank], self.start_B[:, :rank]
            self._subtract(torch.cat([start_a, zero_a]), torch.cat([start_b, zero_b], 1))
        self.drawn = self.draw(int(self.steps))
