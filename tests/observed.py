"""What `fallow.probe` finds in passing, by the equations of the papers from all inputs at once: a reference."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fallow.core.statistics import Components, LayerStatistics, Statistics
from fallow.core.views import view_of


@torch.no_grad()
def layer_inputs(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """{layer: its input of each batch as (tokens, in)}; of a Conv2d without groups, its patches."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):

            def keep(layer: nn.Module, given: tuple[Tensor], out: Tensor, name: str = name) -> None:
                x = given[0]
                if isinstance(layer, nn.Conv2d):
                    x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
                seen.setdefault(name, []).append(x.flatten(0, -2))

            handles.append(module.register_forward_hook(keep))
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    return seen


def covariance_of(inputs: list[Tensor]) -> Tensor:
    """CorDA's C: of each batch Xᵀ X, X divided by |max X|, and of these the mean."""
    return torch.stack([(x / x.max().abs()).T @ (x / x.max().abs()) for x in inputs]).mean(0)


def components_of(inputs: list[Tensor], count: int, center: bool = True) -> Components:
    """EVA's components of all inputs, by one decomposition in float64."""
    x = torch.cat(inputs).double()
    mean = x.mean(0) if center else torch.zeros(x.shape[1]).double()
    _, s, v = torch.linalg.svd(x - mean, full_matrices=False)
    largest = v.gather(1, v.abs().argmax(1, keepdim=True))
    whole = (x - mean).square().sum()
    ratios = s.square() / whole if whole > 0 else torch.zeros_like(s)
    parts = (v * largest.sign())[:count], s[:count], ratios[:count], mean
    return Components(*(part.float() for part in parts), torch.ones(count).bool(), len(x))


def observed(model: nn.Module, batches: Iterable[Tensor], count: int = 8, center: bool = True) -> Statistics:
    """Covariances, components of the inputs and spectra of all linear layers and convolutions."""
    layers = {}
    for name, inputs in layer_inputs(model, batches).items():
        matrix = view_of(model.get_submodule(name)).read(model.get_submodule(name).weight.detach())
        layers[name] = LayerStatistics(
            (matrix.shape[0], matrix.shape[1]),
            covariance=covariance_of(inputs),
            tokens=sum(map(len, inputs)),
            calls=len(inputs),
            activation=components_of(inputs, min(count, matrix.shape[1]), center),
            spectrum=torch.linalg.svdvals(matrix),
        )
    return Statistics(
        layers, len(next(iter(layer_inputs(model, batches).values()))), ("input_covariance", "activation")
    )
