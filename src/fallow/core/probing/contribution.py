"""How much each layer contributed to what a fine-tuning achieved: integrated gradients along the way to it (FAIG).

    theta(a) = theta_b + a (theta_t - theta_b)
    IG_j(x)  = (theta_t - theta_b)_j 1/M sum_m dL/dtheta_j (theta((m + 1/2) / M), x)
    score    = mean over the weights j of a layer, and over samples x, of |IG_j(x)|

As CoLoRA (arXiv 2408.01099) uses "Finding Discriminative Filters for Specific Degradations" (NeurIPS 2021). The
absolute value is taken of each sample before the mean; a gradient of a batch cancels between samples. FAIG's code takes
left end points; the middles used here converge as 1 / M², and sum_j IG_j = L(theta_t) - L(theta_b) over all of theta.

Everything moves along the path that `tuned` holds: biases, norms and running means too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.errors import DataError, ModelError, nearest
from fallow.core.probing.layers import Layer


def check_tuned(model: nn.Module, layers: list[Layer], tuned: Mapping[str, Tensor]) -> None:
    """DataError where the tuned state lacks a layer, has another shape or is not finite; ModelError for weights in a
    code, which cannot move.
    """
    names = names_of(model)
    for layer in layers:
        if type(layer.parameter.data) is not Tensor or not layer.parameter.is_floating_point():
            raise ModelError(
                f"'{layer.name}' is kept in a code ({type(layer.parameter).__name__}), which cannot move from one "
                "state to another; give the model in floats for want='contribution'"
            )
        if not any(name in tuned for name in names[id(layer.parameter)]):
            name = names[id(layer.parameter)][0]
            raise DataError(
                f"tuned= lacks '{name}'{_close(name, tuned)}; give the whole state dict of the tuned model, with the "
                "names of this one"
            )
    for name, tensor in _state(model).items():
        if name not in tuned:
            continue
        if tuned[name].shape != tensor.shape:
            raise DataError(
                f"tuned= has '{name}' of {tuple(tuned[name].shape)}, where the model has {tuple(tensor.shape)}; give "
                "the state of the same model"
            )
        if not bool(torch.isfinite(tuned[name]).all()):
            raise DataError(f"tuned= has NaN or infinite values in '{name}'; its training had failed")


def _close(name: str, tuned: Mapping[str, Tensor]) -> str:
    found = nearest(name, tuned)
    return found if "did you mean" in found else ""


def names_of(model: nn.Module) -> dict[int, list[str]]:
    """{id of a Parameter: its names}"""
    found: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(param), []).append(name)
    return found


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers in floats, by the names of a state dict."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in named if tensor.is_floating_point()}


@contextmanager
def moving(model: nn.Module, tuned: Mapping[str, Tensor]) -> Iterator[Callable[[float], None]]:
    """Yields what moves the model to a point `a` of the path; afterwards it is at its start again, bit for bit.

    Keeps a copy of what moves on its device; `tuned` may lie elsewhere.
    """
    found = {id(tensor): (tensor, tuned[name]) for name, tensor in _state(model).items() if name in tuned}
    moved = [(tensor, tensor.detach().clone(), end) for tensor, end in found.values()]

    @torch.no_grad()
    def to(a: float) -> None:
        for tensor, start, end in moved:
            tensor.copy_(start if a == 0 else start.lerp(end.to(start), a))

    try:
        yield to
    finally:
        to(0)


def integrated(
    model: nn.Module,
    params: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    points: int,
    loss_scale: float = 1.0,
) -> dict[str, Tensor]:
    """{name: IG, of the Parameter's shape, float32 on its device}, signed, of the mean loss of one batch.

    `params`: the model's Parameters of which it is wanted, by their names in `tuned`; they must require gradients and
    have none. Their gradients are summed where they are, so that the buffer is one copy of them.
    """
    sums: dict[str, Tensor] = {}
    with moving(model, tuned) as to:
        for point in range(points):
            to((point + 0.5) / points)
            with torch.enable_grad():
                (loss(model, batch) * loss_scale).backward()
            for name, param in params.items():
                if param.grad is not None:
                    part = param.grad.float()
                    sums[name] = sums[name].add_(part) if name in sums else part
                    param.grad = None
    for name, part in sums.items():
        part.mul_((tuned[name].to(params[name]) - params[name].detach()).float()).div_(points * loss_scale)
    return sums


class Contribution:
    """Sums of |IG| over samples: `rows` {name of a layer: (out,), the mean over its inputs}, float64 on the CPU."""

    def __init__(self, model: nn.Module, layers: list[Layer], tuned: Mapping[str, Tensor], points: int) -> None:
        names = names_of(model)
        self.layers, self.tuned, self.points = layers, tuned, points
        self.names = {layer.name: next(n for n in names[id(layer.parameter)] if n in tuned) for layer in layers}
        self.rows: dict[str, Tensor] = {}
        self.count = 0

    @property
    def parameters(self) -> list[Tensor]:
        return [layer.parameter for layer in self.layers]

    def add(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], sample: Any, loss_scale: float) -> None:
        """With one more sample."""
        params = {self.names[layer.name]: layer.parameter for layer in self.layers}
        found = integrated(model, params, self.tuned, loss, sample, self.points, loss_scale)
        for layer in self.layers:
            if (value := found.get(self.names[layer.name])) is not None:
                part = layer.view.read(value).abs().double().mean(1).cpu()
                self.rows[layer.name] = self.rows[layer.name].add_(part) if layer.name in self.rows else part
        self.count += 1
