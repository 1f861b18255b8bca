"""What a method is made from, and what is in training then."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fallow.core import schedule
from fallow.core.delta import Delta
from fallow.recipes.optimizers import Rule
from fallow.recipes.parts import of_part, write_each
from fallow.selection.sara import SaRA
from fallow.selection.selective import Selective


@dataclass(frozen=True)
class Order:
    """What a method is made from.

    `batches` is walked, more than once if need be, by the methods that look at data before they choose; `loss(network,
    batch)` is the recipe's. `lr` None: the method's own. `rule`: the optimizer. `network` may
    be `Parts`. Where options do not say: `targets` are PEFT's target_modules by part ("" for a network that stands
    alone), and `include` is a regular expression of the weights that the other methods train.
    """

    network: nn.Module
    lr: float | None
    options: Mapping[str, Any]
    steps: int
    seed: int
    batches: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    rule: Rule = field(default_factory=Rule)
    targets: Mapping[str, Sequence[str] | str] = field(default_factory=dict)
    include: str | None = None


class Trained(Protocol):
    """A network in training by one method.

    `trained_where` tells for each weight how many of its entries are trained, and how many it has; `threshold` is what
    |W| was below where that decided; `events` grows by what happens at steps. `masters()` and `put()` give and set the
    trained values exactly, by name: for averages over the steps. `notes` is what the adapter's file tells other tools.
    """

    trained_parameters: int
    total_parameters: int
    trained_where: dict[str, tuple[int, int]]

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...
    @property
    def threshold(self) -> float | None: ...
    @property
    def events(self) -> list[dict[str, Any]]: ...
    def trainable(self) -> list[nn.Parameter]: ...
    def masters(self) -> dict[str, Tensor]: ...
    def put(self, values: dict[str, Tensor]) -> None: ...
    def save_adapter(
        self, folder: Path, metadata: Mapping[str, Any], notes: Mapping[str, str] | None = None
    ) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SelectiveTraining:
    """Some entries of the existing weights; `store` says what the adapter holds: "delta" or (bit-exact) "value"."""

    def __init__(self, optimizer: Selective, total_parameters: int, store: str) -> None:
        self.optimizer: Selective = optimizer
        self.total_parameters, self.store = total_parameters, store
        self.trained_parameters = optimizer.trained_parameters
        self.trained_where = optimizer.selected()
        # Elsewhere the bound is on something else: on chance, on a change, or from below.
        self.threshold = optimizer.threshold if isinstance(optimizer, SaRA) else None

    @property
    def events(self) -> list[dict[str, Any]]:
        return self.optimizer.events

    def trainable(self) -> list[nn.Parameter]:
        return self.optimizer.trainable()

    def masters(self) -> dict[str, Tensor]:
        """(n,) of every entry chosen at first, those that a re-selection has put to rest included."""
        return self.optimizer.masters()

    def put(self, values: dict[str, Tensor]) -> None:
        self.optimizer.put(values)

    def save_adapter(self, folder: Path, metadata: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> None:
        delta = self.optimizer.delta(self.store, **metadata)  # type: ignore[arg-type]

        def write(name: str, part: nn.Module, place: Path) -> None:
            dataclasses.replace(delta, entries=of_part(delta.entries, name)).save(place, notes=notes)

        write_each(self.optimizer.model, folder, write)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


class DenseTraining:
    """Whole tensors: those of the network that require a gradient, under AdamW or another rule."""

    threshold = None

    def __init__(
        self,
        network: nn.Module,
        lr: float,
        adamw: Mapping[str, Any],
        rule: Rule,
        total_parameters: int,
        save: Callable[[nn.Module, Path, dict[str, Any], Mapping[str, str] | None], Any],
        metadata: Mapping[str, Any],
    ) -> None:
        self.network, self.save, self.metadata = network, save, metadata
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.total_parameters = total_parameters
        self.trained_parameters = sum(parameter.numel() for parameter in self.parameters.values())
        self.trained_where = {
            _plain_name(name): (p.numel() if p.requires_grad else 0, p.numel())
            for name, p in network.named_parameters()
        }
        self.events: list[dict[str, Any]] = []
        if rule.name == "adamw":
            rule = dataclasses.replace(rule, options={"betas": adamw["betas"], "eps": adamw["eps"]})
        names = [_plain_name(name) for name in self.parameters]
        group = {"params": list(self.parameters.values()), "names": names, "lr": lr}
        self.optimizer = rule([{**group, "weight_decay": adamw["weight_decay"]}])

    def trainable(self) -> list[nn.Parameter]:
        return list(self.parameters.values())

    def masters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def save_adapter(self, folder: Path, metadata: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> None:
        def write(name: str, part: nn.Module, place: Path) -> None:
            self.save(part, place, {**self.metadata, **metadata}, notes)

        write_each(self.network, folder, write)

    def state_dict(self) -> dict[str, Any]:
        return {"parameters": self.masters(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.put(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])


class DeltaTraining(DenseTraining):
    """A weight parameterization: its Parameters are trained, its steps follow the optimizer's, its buffers are kept."""

    def __init__(self, *args: Any, steps: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps = 0
        schedule.resolve(self.network, steps)
        self.optimizer.register_step_post_hook(self._after_step)  # not called for a step that a scaler skips

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.steps += 1
        schedule.step(self.network)

    def _buffers(self) -> dict[str, Tensor]:
        return {
            f"{path}.{name}": tensor
            for path, module in self.network.named_modules()
            if isinstance(module, Delta)
            for name, tensor in module.state_dict(keep_vars=True).items()
            if not isinstance(tensor, nn.Parameter)
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "buffers": self._buffers(), "steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for path, module in self.network.named_modules():
            if isinstance(module, Delta):  # by its own loading, which draws anew what follows from buffers
                own = {
                    name.removeprefix(f"{path}."): t for name, t in state["buffers"].items() if name.startswith(path)
                }
                module.load_state_dict({name: t for name, t in own.items() if "." not in name}, strict=False)
        self.steps = int(state["steps"])
        schedule.resume(self.network, self.steps)


def _plain_name(name: str) -> str:
    """A parameter's name in the network without an adapter's wrapping, so that reports speak of the same layers."""
    return name.replace(".base_layer.", ".")
