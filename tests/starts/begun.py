"""What the tests of single starts share: a site, statistics made by hand, and the Delta that a start filled."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import fallow
import fallow.deltas  # which makes methods and starts known
from fallow.core.delta import Delta, Site, make_options, method_of
from fallow.core.starting import Start, begin
from fallow.core.statistics import LayerStatistics, Statistics
from fallow.core.views import view_of


def site_of(layer: nn.Module, name: str = "layer") -> Site:
    return Site(name, view_of(layer), lambda: layer.weight, nn.Module())


def filled(layer: nn.Module, method: str, start: Start, **options: Any) -> Delta:
    """A Delta of the method for this layer, begun with the start."""
    kind, site = method_of(method), site_of(layer)
    delta = kind(site, make_options(kind, options))
    begin(delta, start, site)
    return delta


def statistics(**tensors: dict[str, Tensor]) -> Statistics:
    """`gradient={"layer": g}` and so on."""
    layers: dict[str, dict[str, Any]] = {}
    for field, by_layer in tensors.items():
        for name, tensor in by_layer.items():
            layers.setdefault(name, {"shape": tuple(tensor.shape)})[field] = tensor
    return Statistics({name: LayerStatistics(**found) for name, found in layers.items()}, 1, tuple(tensors))


def with_singular_values(out: int, inner: int, values: Tensor) -> Tensor:
    """A random (out, in) matrix that has these."""
    u, v = (torch.linalg.qr(torch.randn(side, len(values), dtype=torch.float64))[0] for side in (out, inner))
    return ((u * values) @ v.T).float()


def linear(weight: Tensor, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias)
    layer.weight.data = weight.clone()
    return layer


class Small(nn.Module):
    """Two linear layers around a relu, and a convolution in front: what hosts are tried on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.up, self.head = nn.Linear(24, 20), nn.Linear(20, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nn.functional.max_pool2d(self.conv(x).relu(), 2).flatten(1)
        return self.head(self.up(h).relu())


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    return Small(), torch.randn(5, 2, 4, 4)


def probed(model: nn.Module, x: Tensor, names: tuple[str, ...] = ("conv", "up", "head")) -> Statistics:
    """Gradients and squared ones of a loss in the model, by autograd alone."""
    model = copy.deepcopy(model)
    target = torch.arange(len(x)) % 12
    torch.nn.functional.cross_entropy(model(x), target).backward()
    found = {name: model.get_submodule(name).weight.grad.flatten(1) for name in names}
    return statistics(gradient=found, fisher={name: g.square() for name, g in found.items()})


def train(model: nn.Module, x: Tensor, steps: int = 3, lr: float = 0.05) -> None:
    """SGD on the adapter alone."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    target = torch.arange(len(x)) % 12
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
        fallow.step(model)
