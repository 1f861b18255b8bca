"""The layer of SLTrain for pretraining: W = s B A + S in a Linear's place. See `fallow.deltas.sltrain`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from fallow.core.coding import unpack
from fallow.core.delta import number, one_of, whole
from fallow.core.errors import ConfigError, ModelError
from fallow.core.linalg import low_rank
from fallow.core.low_rank_sparse import compose, entries, keep, places, product
from fallow.core.select import seeded

TARGETS = ("attn", "attention", "mlp")


def sltrain(
    model: nn.Module,
    rank: int = 128,
    density: float = 0.03,
    alpha: float = 32.0,
    *,
    target_modules: Iterable[str] = TARGETS,
    start: str = "fresh",
    support: str = "uniform",
    seed: int = 0,
) -> list[str]:
    """Replace, in place, the Linear layers whose path holds one of `target_modules`; returns their paths.

    The defaults are the paper's for 60 M parameters; alpha / rank is the sensitive one. `start`: "fresh", or "compress"
    from the weights there are. `support`: see `SLTrainLinear`. A layer used at several paths stays one. Call it before
    the optimizer is made. ConfigError, and nothing is replaced, for impossible values and where no layer fits.
    """
    one_of("start", start, ("fresh", "compress"))
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Linear and n}
    chosen = {name: layer for name, layer in layers.items() if any(part in name for part in wanted)}
    if not chosen:
        raise ConfigError(
            f"target_modules={wanted} is in the path of no Linear layer of this {type(model).__name__}; its layers: "
            f"{', '.join(list(layers)[:8]) or 'none'}"
        )
    for name, layer in chosen.items():
        if isinstance(rank, int) and rank > min(layer.weight.shape):
            raise ConfigError(
                f"rank={rank} is above what '{name}' of {tuple(layer.weight.shape)} can have; give a smaller one, or "
                "leave the layer out of target_modules"
            )
    made: dict[nn.Linear, SLTrainLinear] = {}
    for name, layer in chosen.items():
        if layer not in made:
            generator = seeded(seed, name)
            new = SLTrainLinear.like(layer, rank, density, alpha, support, generator, compress=start == "compress")
            made[layer] = new.train(layer.training)
    for name, layer in chosen.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made[layer])
    return list(chosen)


class SLTrainLinear(nn.Module):
    """x (..., in) to x Wᵀ + bias, W = s B A + S never stored. Trained: `A`, `B`, `values` (K,), `bias`.

    `rank`: 0 for S alone. `support`: "uniform" over all places, or "rows", as many in each row, so that none is empty.
    `residual` (out, in): with "largest", the K places where it is largest. Computed in the dtype of x, or autocast's.
    ConfigError for impossible values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 128,
        density: float = 0.03,
        alpha: float = 32.0,
        support: str = "uniform",
        generator: torch.Generator | None = None,
        residual: Tensor | None = None,
    ) -> None:
        super().__init__()
        whole("rank", rank, least=0, most=min(in_features, out_features))
        number("alpha", alpha, open_below=True)
        self.in_features, self.out_features, self.rank, self.alpha = in_features, out_features, rank, alpha
        shape = (out_features, in_features)
        count = entries(shape, density)
        index = places(shape, count, support, generator or torch.Generator().manual_seed(0), residual)
        self.low: Tensor
        self.counts: Tensor | None
        keep(self, index, shape, persistent=True)
        bound = 1 / math.sqrt(in_features)
        self.A = nn.Parameter(torch.empty(rank, in_features).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        self.values = nn.Parameter(torch.empty(count).uniform_(-bound, bound))
        width = 1 / math.sqrt(out_features)
        self.bias = nn.Parameter(torch.empty(out_features).uniform_(-width, width)) if bias else None

    @classmethod
    @torch.no_grad()
    def like(
        cls,
        layer: nn.Linear,
        rank: int,
        density: float,
        alpha: float,
        support: str,
        generator: torch.Generator,
        compress: bool = False,
    ) -> SLTrainLinear:
        """In the place of a Linear: its shape, dtype and device; with `compress` its weight, as near as it comes."""
        weight, out, inner = layer.weight, layer.out_features, layer.in_features
        if weight.is_meta:
            raise ModelError("the layers to replace are on the meta device; make the model on a real one first")
        residual = None
        if compress:
            residual = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            u, sigma, vt = low_rank(residual, min(rank, out, inner), generator=generator)
            residual -= (u * sigma) @ vt
        elif support == "largest":
            raise ConfigError("support='largest' chooses by what a weight leaves over: give start='compress' with it")
        new = cls(
            inner, out, layer.bias is not None, rank=rank, density=density, alpha=alpha, support=support,
            generator=generator, residual=residual,
        ).to(weight.device, weight.dtype)  # fmt: skip
        if residual is not None:
            root = (sigma / max(new.scaling, 1e-30)).sqrt()
            new.B.copy_(u * root)
            new.A.copy_(root[:, None] * vt)
            new.values.copy_(residual.flatten()[new.index.long()])
            if new.bias is not None:
                new.bias.copy_(cast(Tensor, layer.bias))
        return new

    @property
    def scaling(self) -> float:
        """s"""
        return self.alpha / self.rank if self.rank else 1.0

    @property
    def index(self) -> Tensor:
        """(K,) the places of S: flat, sorted; int32 below 2^31 entries."""
        return unpack(self.low, self.counts, self.out_features * self.in_features)

    @property
    def weight(self) -> Tensor:
        """W (out, in), formed anew, differentiable; for code that reads a layer's weight."""
        return compose(self.B, self.A, self.values, self.index, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        y = product(x, self.B, self.A, self.values, self.low, self.counts, self.scaling)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """A plain Linear of the same function."""
        dense = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.B.device,
            dtype=self.B.dtype,
        )
        dense.weight.copy_(self.weight)
        if self.bias is not None:
            dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, entries={len(self.values)}"
