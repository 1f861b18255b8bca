"""What the gradients of a step were, before anybody clips them.

torch clips between the backward pass and the step, so what is to be known is measured when the gradients of a layer
are complete: by a hook on each of its parameters, anew in each pass of an accumulation, where the last one counts.
Where the gradients are still to be averaged over several processes, they are measured at the step instead, as they
then are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fallow.core.distributed import ranks
from fallow.optim.perturbed import Layer


class Observed:
    """`measure(layer)`: the squared norms that are wanted, or None. `seen`: what it gave, by layer, for one step.
    `scaler`: a GradScaler whose scale is in the gradients.
    """

    def __init__(
        self, layers: Sequence[Layer], measure: Callable[[Layer], Tensor | None], scaler: torch.amp.GradScaler | None
    ) -> None:
        self.layers, self.measure, self.scaler = list(layers), measure, scaler
        self.seen: dict[str, Tensor] = {}
        self.arrived: dict[int, set[int]] = {}

    def hooks(self) -> list[Any]:
        """On the parameters; to be removed by the caller."""
        return [
            param.register_post_accumulate_grad_hook(self._watching(layer))
            for layer in self.layers
            for param in layer.parameters()
        ]

    def _watching(self, layer: Layer) -> Callable[[Tensor], None]:
        expected = {id(param) for param in layer.parameters()}

        def hook(param: Tensor) -> None:
            arrived = self.arrived.setdefault(layer.index, set())
            arrived.add(id(param))
            if arrived == expected:
                arrived.clear()
                if ranks() == 1:
                    self._look(layer)

        return hook

    @torch.no_grad()
    def _look(self, layer: Layer) -> None:
        if (found := self.measure(layer)) is not None:
            self.seen[layer.name] = found

    def complete(self) -> dict[str, Tensor]:
        """All gradients of the step are there, unscaled: what they were."""
        if self.scaler is not None and self.scaler.is_enabled():
            factor = self.scaler.get_scale() ** -2
            self.seen = {name: square * factor for name, square in self.seen.items()}
        for layer in self.layers:
            if layer.name not in self.seen:
                self._look(layer)
        return self.seen

    def clear(self) -> None:
        """Begin the next step."""
        self.seen = {}


def when_gradients_are_there(args: Any, kwargs: Any, then: Callable[[], None]) -> Any:
    """For a hook before the step: call `then` now, or after each call of a closure. Returns what the hook returns."""
    closure = next((value for value in (*args, *kwargs.values()) if callable(value)), None)
    if closure is None:
        then()
        return None

    def wrapped() -> Any:
        loss = closure()
        then()
        return loss

    return tuple(wrapped if value is closure else value for value in args), {
        name: wrapped if value is closure else value for name, value in kwargs.items()
    }
