"""DiffoRA: LoRA on the modules that a differentiable search has chosen, the others sharing a few pairs or having none.

"DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank Matrix Adaptation", arXiv 2502.08905.

    chosen           W' = W + s B A           B (out, r), A (r, in) of its own, as LoRA's
    not chosen       W' = W + s B_g A_g       one pair for all weights of a group g, which have one shape
    in the search    W' = W + s c B A         c, differentiable: the gate of this module, see `fallow.budgets.diffora`

    found = fallow.search_modules(model, train, validation)
    fallow.attach(model, "diffora", rank=8, patterns=found.patterns())      # what is not chosen shares
    fallow.attach(model, "lora", rank=8, budget=found)                      # what is not chosen has none

A shared pair is one Parameter, in the file once; its gradient is the sum over its uses. Without a group this is LoRA.

The paper's full text could not be had: that pairs are shared among modules of one type over all layers, and that they
are ordinary LoRA pairs, is a reconstruction.
"""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.delta import Site, fits_rank
from fallow.core.errors import ConfigError
from fallow.core.starting import Pair
from fallow.deltas.lora import LoRA


class DiffoRA(LoRA):
    name = "diffora"

    @dataclasses.dataclass(kw_only=True)
    class Options(LoRA.Options):
        """`group`: a word; all weights of one word share a pair. "" for a pair of its own."""

        group: str = ""

        def check(self) -> None:
            super().check()
            if not isinstance(self.group, str) or not re.fullmatch(r"\w*", self.group):
                raise ConfigError(f"group={self.group!r} must be a word of letters, digits and _")

    def setup(self, site: Site) -> None:
        self.__dict__["coefficient"] = None  # c, in a search
        if not self.o.group:
            super().setup(site)
            return
        if site.fresh:
            fits_rank(site, self.o.rank)
        a, b = self.start(self.o.rank)
        for name, made in (("A", a), ("B", b)):
            self.share(f"{name}_{self.o.group}", site, partial(nn.Parameter, made))
            held = self.shared(f"{name}_{self.o.group}")
            if held.shape != made.shape:
                raise ConfigError(
                    f"group={self.o.group!r} has a pair whose {name} is {tuple(held.shape)}, where '{site.name}' of "
                    f"{site.shape} at rank {self.o.rank} needs {tuple(made.shape)}; give it a group of its own"
                )

    def pair(self) -> tuple[Tensor, Tensor]:
        """B (out, r) and A (r, in), its own or its group's."""
        if self.o.group:
            return self.shared(f"B_{self.o.group}"), self.shared(f"A_{self.o.group}")
        return self.B, self.A

    @property
    def scaling(self) -> float:
        return self.scaling_at(int(self.o.rank))

    @property
    def dtype(self) -> torch.dtype:
        return self.pair()[0].dtype

    def factors(self) -> tuple[Tensor, Tensor]:
        b, a = self.pair()
        s, c = self.scaling, self.__dict__["coefficient"]
        b = b if s == 1.0 else b * s
        return self.with_start(b if c is None else b * c, a, s)

    @torch.no_grad()
    def size(self) -> Tensor:
        """The Frobenius norm of s B A, without forming it."""
        b, a = self.pair()
        return self.scaling * ((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt()

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        return 0 if options.group else super().parameter_count(shape, options)

    @classmethod
    def shared_count(cls, shapes: list[tuple[int, int]], options: Any) -> int:
        """Of weights of one group."""
        return super().parameter_count(shapes[0], options) if options.group and shapes else 0

    def pair_form(self) -> tuple[int, float]:
        self._refuse("a start cannot fill it for one of them")
        return super().pair_form()

    def take(self, pair: Pair) -> None:
        self._refuse("a start cannot fill it for one of them")
        super().take(pair)

    def importance(self) -> Tensor:
        if not self.o.group:
            return super().importance()
        b, a = self.pair()
        return (self.scaling * b.norm(dim=0) * a.norm(dim=1)).detach()

    def used_ranks(self) -> int:
        """All of a shared pair, which is cut for none of its users alone."""
        return int(self.o.rank) if self.o.group else super().used_ranks()

    def resize(self, rank: int) -> None:
        """As LoRA's. ConfigError for a shared pair."""
        self._refuse("it cannot have another rank in one of them")
        super().resize(rank)

    @torch.no_grad()
    def randomize(self) -> None:
        for param in self.pair():
            param.add_(0.1 * torch.randn_like(param))

    def _refuse(self, why: str) -> None:
        if self.o.group:
            raise ConfigError(f"'{self.site_name}' shares the pair of group={self.o.group!r}; {why}")
