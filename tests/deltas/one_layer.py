"""One layer with one Delta, run by the engine without any host: what the tests of single methods need."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.delta import Delta, Site, make_options, method_of
from fallow.core.engine import new_weight, run_deltas
from fallow.core.views import view_of

LAYERS = {
    "linear": lambda: nn.Linear(12, 20),
    "wide": lambda: nn.Linear(20, 12, bias=False),
    "conv": lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1),
    "conv1d": lambda: nn.Conv1d(4, 8, 3, padding=1, padding_mode="circular"),
    "grouped": lambda: nn.Conv2d(8, 12, 3, groups=2, padding=1),
    "embedding": lambda: nn.Embedding(24, 12),
}


def inputs(layer: nn.Module, rows: int = 3) -> Tensor:
    """A batch that the layer takes."""
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, (rows, 5))
    dtype = layer.weight.dtype
    if isinstance(layer, nn.Linear):
        return torch.randn(rows, 5, layer.in_features, dtype=dtype)
    return torch.randn(rows, layer.in_channels, *[9] * (layer.weight.dim() - 2), dtype=dtype)


class OneLayer(nn.Module):
    """`layer` with the method on it: `OneLayer(layer, "lora", rank=2)(x)`. Several share `common` if it is given."""

    def __init__(
        self,
        layer: nn.Module,
        method: str | type[Delta],
        *,
        common: nn.Module | None = None,
        context: Mapping[str, Any] | None = None,
        name: str = "layer",
        seed: int = 0,
        fresh: bool = True,
        **given: Any,
    ) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.view = view_of(layer)
        self.common = nn.Module() if common is None else common
        kind = method_of(method)
        site = Site(name, self.view, lambda: layer.weight, self.common, context, seed, fresh)
        self.delta = kind(site, make_options(kind, given))
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        active = [(self.delta, self.scale)]
        return run_deltas(layer, layer, "weight", self.view, lambda: layer.weight.data, active, x)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The (out, in) matrix with the Delta in it."""
        return new_weight(self.view.read(self.layer.weight.data), [(self.delta, self.scale)])

    @torch.no_grad()
    def by_merged(self, x: Tensor) -> Tensor:
        """What the layer gives with the merged weight in its place."""
        kept = self.layer.weight.data
        try:
            self.layer.weight.data = self.view.write(self.merged(), kept).to(kept.dtype)
            return self.layer(x)
        finally:
            self.layer.weight.data = kept


def with_matrix(layer: nn.Module, matrix: Tensor, x: Tensor) -> Tensor:
    """What the layer gives with the (out, in) matrix in the place of its weight, differentiable."""
    weight = view_of(layer).write(matrix, layer.weight)
    return torch.func.functional_call(layer, {"weight": weight}, (x,))


def backward_both(got: Tensor, want: Tensor) -> None:
    """Compare the two, then run the backward of both from the same random gradient."""
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(got)
    (got * weights).sum().backward()
    (want * weights).sum().backward()


def train(model: OneLayer, optimizer: torch.optim.Optimizer, x: Tensor, steps: range, total: int = 8) -> None:
    """These steps of a run of `total`, the Delta told of each."""
    for step in steps:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        model.delta.on_step(step, total)


def in_another_process(method: str, model: OneLayer, x: Tensor, **options: Any) -> Tensor:
    """What a fresh process gives for x with the same base Linear(12, 20) and nothing but the Delta's state."""
    told = io.BytesIO()
    torch.save([method, options, model.delta.state_dict(), model.layer.state_dict(), x], told)
    code = """
import io, sys
sys.path[:0] = sys.argv[1:]
import torch
import fallow.deltas
from one_layer import OneLayer
method, options, delta, layer, x = torch.load(io.BytesIO(sys.stdin.buffer.read()))
base = torch.nn.Linear(12, 20)
base.load_state_dict(layer)
model = OneLayer(base, method, **options)
model.delta.load_state_dict(delta)
torch.save(model(x).detach(), sys.stdout.buffer)
"""
    command = [sys.executable, "-c", code, *sys.path]
    found = subprocess.run(command, input=told.getvalue(), capture_output=True, check=True, timeout=60)
    return torch.load(io.BytesIO(found.stdout))
