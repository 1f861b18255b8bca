"""Gradients of weights, layer by layer: a hook takes each as soon as it is complete and drops it.

    gradient   1/K sum_b G_b                       G_b = dL_b/dW of batch b, K batches
    sketch     1/K sum_b (G_b Omega, Psi G_b)      in its place; see `fallow.core.statistics.Sketch`
    fisher     sum_b c_b G_b² / sum_b c_b          c_b label tokens (LoKU's code, arXiv 2408.06621); of single samples,
                                                   sum_s c_s g_s² / sum_s c_s, where asked for

All in float32 on the CPU; the device holds one gradient at a time. Weights that another library keeps in a code have
none of their own: there it is made of the input and of the gradient of the output, G = dL/dyᵀ x.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.errors import ConfigError
from fallow.core.probing.layers import Layer
from fallow.core.probing.options import Options
from fallow.core.statistics import Sketch

Projections = tuple[Tensor, Tensor]


def sketched(shape: tuple[int, int], k: int | None) -> bool:
    """Whether a sketch of k columns is kept of a gradient of this shape: where it is smaller."""
    if k is None:
        return False
    width, height = Sketch.sizes(shape, k)
    return width * shape[0] + height * shape[1] < shape[0] * shape[1]


class Gradients:
    """Sums over backward passes, by weight: layers that share one share its sums.

    `gradients`, `fishers`: {key of a weight: sum, of the weight's own shape}; `columns`, `rows`: {layer: sum}.
    `count`: passes of which the gradient was taken; `weight`: sum of c of those of which the square was.
    """

    def __init__(self, layers: Sequence[Layer], want: frozenset[str], options: Options) -> None:
        self.options, self.want = options, want
        by_weight: dict[int, list[Layer]] = {}
        for layer in layers:
            by_weight.setdefault(id(layer.parameter), []).append(layer)
        self.sharing = {
            same[0].name: same for same in by_weight.values()
        }  # the key of a weight is its first layer's name
        self.key = {layer.name: key for key, same in self.sharing.items() for layer in same}
        self.gradients: dict[str, Tensor] = {}
        self.fishers: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.count, self.weight = 0, 0.0
        self._projections: dict[str, Projections] = {}
        self._taking: frozenset[str] = frozenset()
        self._counts = 0.0
        self._came: set[str] = set()
        self._parts: dict[str, tuple[Tensor, int]] = {}  # of layers in a code: the sum so far, of so many calls
        self._calls: dict[str, int] = {}
        self._handles: list[Any] = []

    @property
    def parameters(self) -> list[Tensor]:
        """Those that must require gradients."""
        return [same[0].parameter for same in self.sharing.values() if not same[0].coded]

    def watch(self) -> None:
        """Put the hooks on; `leave` takes them off."""
        for same in self.sharing.values():
            first = same[0]
            if first.coded:
                self._handles += [layer.spot.layer.register_forward_hook(self._on_output(first)) for layer in same]
            else:
                self._handles.append(first.parameter.register_post_accumulate_grad_hook(self._on_gradient(first)))

    def leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self, take: frozenset[str], counts: float = 1.0) -> None:
        """Before a forward pass: what is taken of its gradients, and how much it counts in the Fisher diagonal."""
        self._taking, self._counts = take & self.want, counts
        self._came.clear()
        self._calls.clear()
        self._parts.clear()

    @torch.no_grad()
    def end(self) -> None:
        """After its backward pass."""
        for name, (part, _) in self._parts.items():  # of layers of which a call did not count for the loss
            self._take(name, part)
        self._parts.clear()
        self.count += "gradient" in self._taking
        self.weight += self._counts if "fisher" in self._taking else 0.0
        self._taking = frozenset()

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _on_gradient(self, layer: Layer) -> Callable[[Tensor], None]:
        def hook(param: Tensor) -> None:
            if not self._taking:
                return
            grad, param.grad = param.grad, None
            if grad is not None:
                self._take(layer.name, grad.to_dense() if grad.is_sparse else grad)

        return hook

    def _on_output(self, layer: Layer) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not self._taking or not torch.is_grad_enabled():
                return output
            output = output if output.requires_grad else output.detach().requires_grad_()
            x = args[0].detach()
            self._calls[layer.name] = self._calls.get(layer.name, 0) + 1
            output.register_hook(lambda grad: self._part(layer, x, grad))
            return output

        return hook

    @torch.no_grad()
    def _part(self, layer: Layer, x: Tensor, grad: Tensor) -> None:
        part = grad.reshape(-1, grad.shape[-1]).float().mT @ x.reshape(-1, x.shape[-1]).float()
        before, calls = self._parts.pop(layer.name, (None, 0))
        part = part if before is None else before.add_(part)
        if calls + 1 == self._calls[layer.name]:
            self._take(layer.name, part)
        else:
            self._parts[layer.name] = part, calls + 1

    @torch.no_grad()
    def _take(self, name: str, grad: Tensor) -> None:
        grad = grad.float()
        grad = grad / self.options.loss_scale if self.options.loss_scale != 1 else grad
        if "fisher" in self._taking:
            if name in self._came:
                raise ConfigError(
                    f"'{name}' got a second gradient in one backward pass, after the first was squared: its gradient "
                    "checkpointing is re-entrant; give use_reentrant=False, or switch it off"
                )
            self._came.add(name)
        if "gradient" in self._taking:
            grad = self._keep_gradient(name, grad)
        if "fisher" in self._taking:
            held = grad.cpu()
            if name in self.fishers:
                self.fishers[name].addcmul_(held, held, value=self._counts)
            else:
                self.fishers[name] = held.square().mul_(self._counts)

    def _keep_gradient(self, name: str, grad: Tensor) -> Tensor:
        """Add it to its sum; returns it as it is needed for what follows."""
        full = False
        for layer in {layer.shape: layer for layer in reversed(self.sharing[name])}.values():
            if sketched(layer.shape, self.options.sketch):
                self._sketch(layer, grad)
            else:
                full = True
        if full:
            held = grad.cpu()
            if name in self.gradients:
                self.gradients[name].add_(held)
            else:  # the very memory: nobody else has it
                self.gradients[name] = held
            return held
        return grad

    def _sketch(self, layer: Layer, grad: Tensor) -> None:
        omega, psi = self._projection(layer, grad.device)
        matrix = layer.view.read(grad) if not layer.coded else grad
        for sums, part in ((self.columns, matrix @ omega), (self.rows, psi @ matrix)):
            held = part.cpu()
            sums[layer.name] = sums[layer.name].add_(held) if layer.name in sums else held

    def _projection(self, layer: Layer, device: torch.device) -> Projections:
        if layer.name not in self._projections:
            assert self.options.sketch is not None, "a sketch was asked for"
            omega, psi = Sketch.projections(layer.shape, self.options.sketch, self.seed(layer.name))
            self._projections[layer.name] = omega.to(device), psi.to(device)
        return self._projections[layer.name]

    def seed(self, name: str) -> int:
        """Of the projections of a layer."""
        return self.options.seed + zlib.crc32(name.encode())

    # -- results ------------------------------------------------------------------------------------------------------

    def matrix(self, layer: Layer, of: dict[str, Tensor]) -> Tensor | None:
        """(out, in) of a sum by weight, as this layer sees the weight."""
        found = of.get(self.key[layer.name])
        if found is None or layer.coded:
            return found
        return layer.view.read(found)

    def sketch_of(self, layer: Layer) -> Sketch | None:
        name = next(other.name for other in self.sharing[self.key[layer.name]] if other.shape == layer.shape)
        if name not in self.columns:
            return None
        return Sketch(self.columns[name], self.rows[name], self.seed(name))
