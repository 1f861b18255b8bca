"""PETALface: two low-rank branches, blended for each sample by how good its input is.

"PETALface: Parameter Efficient Transfer Learning for Low-resolution Face Recognition", arXiv 2412.07771.

    y' = W x + s (1 - g) B1 A1 x + s g B2 A2 x     A1, A2 (r, in), normal with deviation 1 / r; B1, B2 (out, r), zero
    g  = clamp(1/2 + slope (q - threshold), 0, 1)  q (batch,), one score for each sample, without a gradient

    with fallow.condition(model, quality=q): loss = criterion(model(images), labels)

Branch 2 serves samples of high q, branch 1 those of low q. q may come from any scorer: of picture quality, or a noise
level, or a domain. The two run as one branch of rank 2r, whose hidden channels are scaled by (1 - g, g): `A` holds A1
above A2, `B` holds B1 beside B2. Layers must have the samples first, or the windows of each sample in turn.

The official code does not clamp g; there its start is not the identity either, since the network's own initialisation
runs over the branches. With gradient checkpointing the backward reads q again, so it must stand inside the `with`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fallow.core.delta import Delta, MethodOptions, Site, fits_rank, number, whole
from fallow.core.errors import ConfigError
from fallow.core.factored import down


class PETALface(Delta):
    name = "petalface"
    supports = ("linear", "conv", "embedding")

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`rank`: of each branch. `alpha`: None for the rank; s = alpha / rank, the paper's is 1. `branch_dropout`: on
        what each branch puts out, after B. `threshold`: of the gate, which is 1/2 there; `calibrated(scores)` gives the
        two that fit a set of scores. `slope`: of the gate; with 1 and a threshold of 0.5, g is q. `clamp`: g within [0,
        1]; False for the official gate. `windowed`: layers may see several windows of each sample, one after the other,
        as in windowed attention.
        """

        rank: int = 8
        alpha: float | None = None
        branch_dropout: float = 0.1
        threshold: float = 0.5
        slope: float = 1.0
        clamp: bool = True
        windowed: bool = False

        def check(self) -> None:
            whole("rank", self.rank)
            if self.alpha is not None:
                number("alpha", self.alpha, open_below=True)
            number("branch_dropout", self.branch_dropout, most=0.99)
            number("threshold", self.threshold, least=-float("inf"))
            number("slope", self.slope, least=-float("inf"))
            if self.slope == 0:
                raise ConfigError("slope=0 lets both branches count alike for every input; give another value")

    def setup(self, site: Site) -> None:
        rank, (out, inner) = self.o.rank, self.view.shape
        fits_rank(site, rank)
        self.A = nn.Parameter(torch.randn(2 * rank, inner) / rank)
        self.B = nn.Parameter(torch.zeros(out, 2 * rank))

    def _layout(self) -> None:
        super()._layout()
        self.any_dtype = True  # `down` casts x itself

    @property
    def scaling(self) -> float:
        """s"""
        return 1.0 if self.o.alpha is None else float(self.o.alpha / self.o.rank)

    def gate(self) -> Tensor:
        """g, float32, (batch,), or () where one quality stands for all. ConfigError where no quality is given."""
        quality = self.context.get("quality")
        if quality is None:
            raise ConfigError(
                f"'{self.site_name}' blends its two branches by 'quality', which is not given: run the model (and the "
                "backward, with gradient checkpointing) inside `with fallow.condition(model, quality=scores)`, one "
                "score for each sample; to merge, one number for all"
            )
        quality = torch.as_tensor(quality, device=self.A.device).detach().float()
        if quality.dim() > 1:
            raise ConfigError(f"quality of the shape {tuple(quality.shape)}; give one number for each sample")
        g = 0.5 + self.o.slope * (quality - self.o.threshold)
        return g.clamp(0, 1) if self.o.clamp else g

    def _gates(self, x: Tensor) -> Tensor:
        """(samples or 1, 2): 1 - g and g. ConfigError where there are not as many qualities as samples."""
        g, samples = self.gate(), x.shape[0]
        given = g.numel()
        if g.dim() and given != samples:
            if not self.o.windowed or not given or samples % given:
                raise ConfigError(
                    f"quality holds {given} scores, '{self.site_name}' sees {samples} samples; give one for each. "
                    "Where a layer sees windows of each sample in turn, set windowed=True; where another dimension "
                    "comes first, exclude the layer"
                )
            g = g.repeat_interleave(samples // given, output_size=samples)
        return torch.stack([1 - g, g], -1).reshape(-1, 2).to(self.A.dtype)

    def _branch(self, x: Tensor, a: Tensor, b: Tensor, gates: Tensor) -> Tensor:
        """B (gates * A x); gates (samples or 1, r)."""
        if self.view.kind == "conv":
            gates = gates.repeat(1, getattr(self.view, "groups", 1))
            gates = gates.reshape(*gates.shape, *[1] * (x.dim() - 2))
        else:
            tokens = x.dim() - (2 if self.view.kind == "linear" else 1)
            gates = gates.reshape(gates.shape[0], *[1] * tokens, -1) if tokens >= 0 else gates.flatten()
        return self.view.up(down(self.view, x, a) * gates, b)

    def delta_forward(self, x: Tensor) -> Tensor:
        gates, a, b, rank = self._gates(x), self.A, self._scaled_b(), self.o.rank
        drop = self.o.branch_dropout if self.training else 0.0
        if not drop:
            return self._branch(x, a, b, gates.repeat_interleave(rank, 1))
        low = self._branch(x, a[:rank], b[:, :rank], gates[:, :1].expand(-1, rank))
        high = self._branch(x, a[rank:], b[:, rank:], gates[:, 1:].expand(-1, rank))
        return F.dropout(low, drop) + F.dropout(high, drop)

    def factors(self) -> tuple[Tensor, Tensor]:
        """For one quality that stands for all inputs; a merge is at this one."""
        g = self.gate()
        if g.dim() and not bool((g == g[:1]).all()):
            raise ConfigError(
                f"'{self.site_name}' has one weight for each of the {g.numel()} qualities given; to merge, give one "
                "number: with fallow.condition(model, quality=0.7): ..."
            )
        g = g.flatten()[0]
        gates = torch.stack([1 - g, g]).repeat_interleave(self.o.rank).to(self.B.dtype)
        return self._scaled_b() * gates, self.A

    def _scaled_b(self) -> Tensor:
        s = self.scaling
        return self.B if s == 1.0 else self.B * s

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        return 2 * int(options.rank) * (shape[0] + shape[1])


def calibrated(scores: Tensor) -> dict[str, float]:
    """`threshold` and `slope` for scores like these (n,): their mean, and 1 / (4 deviations), so that two deviations
    reach the ends of the gate. ConfigError where they are all alike or not finite.
    """
    scores = scores.detach().double().flatten()
    spread = float(scores.std(correction=0)) if scores.numel() else 0.0
    if not 0 < spread < float("inf"):
        raise ConfigError(f"scores of deviation {spread} over {scores.numel()} samples tell no quality apart")
    return {"threshold": float(scores.mean()), "slope": 1 / (4 * spread)}
