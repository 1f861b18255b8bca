"""Adding an objective to the loss that a model puts out, so that any Trainer or loop that uses it trains with both.

    fallow.add_objective(model, fallow.BALoRA())      then Trainer(model, ...), or model(**batch).loss.backward()

In training mode, with gradients, `outputs.loss` becomes loss + objective(model, batch, outputs); evaluation is as
before. A Trainer that computes its own loss of the logits (`compute_loss_func`, label smoothing, a model without a
loss) passes it by: there call the objective as `loss + objective(model, batch, outputs)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fallow.core import schedule
from fallow.core.errors import ConfigError
from fallow.core.objective import Objective, Told, objective_of
from fallow.objectives.rows import count


class Added:
    """`remove()` takes the objective off the model again. `last`: its value in the last forward, for logs."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self.model, self.objective = model, objective
        self.last: Tensor | None = None
        self.busy = False
        self.batch: dict[str, Any] = {}
        self.handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.objective.leave()

    def _before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Keep from the model what is the objective's own, such as `forget_labels`."""
        if self.busy:
            return args, kwargs
        self.batch = {**_named(model, args), **kwargs}
        return args, {name: value for name, value in kwargs.items() if name not in self.objective.inputs}

    def _after(self, model: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        batch, self.batch = self.batch, {} if not self.busy else self.batch
        if self.busy or not model.training or not torch.is_grad_enabled():
            return outputs
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if not isinstance(loss, Tensor):
            raise ConfigError(
                f"{type(model).__name__} put out no loss to add objective '{self.objective.name}' to; give it labels, "
                "or add objective(model, batch, outputs) to your own loss"
            )
        self.busy = True
        try:
            term = self.objective(model, batch, outputs) * _share(batch)
        finally:
            self.busy = False
        self.last = term.detach()
        outputs["loss"] = loss + term.to(loss)
        return outputs


def _named(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    names = list(inspect.signature(model.forward).parameters) if args else []
    return dict(zip(names, args, strict=False))


def _share(batch: Mapping[str, Any]) -> Any:
    """Where a Trainer sums losses over accumulated batches and divides by all labels in these: this batch's share."""
    items, labels = batch.get("num_items_in_batch"), batch.get("labels")
    if items is None or not isinstance(labels, Tensor):
        return 1.0
    return count(labels) / (items.to(labels.device) if isinstance(items, Tensor) else items)


def add_objective(model: nn.Module, objective: Told) -> Added:
    """Add an objective of a model's outputs (an object, the name of one, or a list of these) to the loss it puts out.

    Do it before the model is wrapped by DDP or torch.compile. `fallow.step(model)` and `fallow.Callback(model)` advance
    its schedule. Returns a handle with `remove()`. ConfigError for an objective of the weights alone, which
    `fallow.attach(..., objective=)` takes.
    """
    found = objective_of(objective)
    if found is None or not found.of_outputs:
        raise ConfigError(
            f"objective={objective!r} is one of the weights alone; give it to fallow.attach(model, ..., objective=)"
        )
    found.enter(model)
    schedule.attach(model, found)
    return Added(model, found)
