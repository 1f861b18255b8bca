"""Selective methods in the words of the hosts of Deltas, so that the same probes run on them.

OwnEntries     the optimizer over the model, and `fallow.Adapters` for what is saved
PeftEntries    `SaRAConfig` and `SHiRAConfig`
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from delta_hosts import PeftHost
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import fallow

SHARE = 0.3
CONFIGS = {"sara": fallow.SaRAConfig, "shira": fallow.SHiRAConfig}


@dataclasses.dataclass(frozen=True)
class EntriesMethod:
    """What checks ask of a Delta's class, of a selective one."""

    name: str
    selective: type[fallow.Selective]
    mode: ClassVar[str] = "add"
    starts: ClassVar[str] = ""
    Options: ClassVar[type] = fallow.MethodOptions


class Stirred:
    """In the place of a Delta, where something is to be changed."""

    def __init__(self, stir: Callable[[], None]) -> None:
        self.randomize = stir


class OwnEntries:
    name: ClassVar[str] = "own"

    def attach(
        self, model: nn.Module, method: EntriesMethod, options: Mapping[str, Any], targets: Any, name: str = "default"
    ) -> nn.Module:
        """In place; the optimizer is the model's attribute `trains`."""
        for param in model.parameters():
            if param.is_floating_point():
                param.requires_grad = True
        accepted = inspect.signature(method.selective).parameters
        told: dict[str, Any] = {"fraction" if "fraction" in accepted else "density": SHARE, "lr": 0.1}
        if "batches" in accepted and accepted["batches"].default is inspect.Parameter.empty:
            told |= {"batches": [None], "loss": _size_of_weights}
        if "dense_steps" in accepted:
            told["dense_steps"] = 1
        if any(name.endswith("bias") for name, _ in model.named_parameters()):
            told["exclude"] = ["bias$"]  # so that it is the weight where entries are chosen
        model.__dict__["trains"] = method.selective(model, **told)
        return model

    def deltas(self, model: nn.Module, name: str = "default") -> dict[str, Stirred]:
        return {name: Stirred(lambda: self._stir(model.trains))}

    def _stir(self, optimizer: fallow.Selective) -> None:
        """A step with a random gradient."""
        for proxy in optimizer.trainable():
            proxy.grad = torch.randn_like(proxy)
        optimizer.step()
        optimizer.zero_grad()

    def trained(self, model: nn.Module) -> list[Tensor]:
        return list(model.trains.trainable())

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        with model.trains.disabled():
            yield

    def scale(self, model: nn.Module, scale: float) -> None:
        model.trains.set_scale(scale)

    def save(self, model: nn.Module, folder: Path) -> None:
        model.trains.save(folder)

    def load(self, base: nn.Module, folder: Path) -> nn.Module:
        fallow.Adapters(base).add("default", folder)
        return base


def _size_of_weights(model: nn.Module, batch: None) -> Tensor:
    """An objective that needs no inputs."""
    return torch.stack([p.float().square().mean() for p in model.parameters() if p.requires_grad]).sum()


class PeftEntries(PeftHost):
    def attach(
        self, model: nn.Module, method: EntriesMethod, options: Mapping[str, Any], targets: Any, name: str = "default"
    ) -> nn.Module:
        amount = {"density" if method.name == "shira" else "fraction": SHARE}
        config = CONFIGS[method.name](target_modules=targets, seed=3, **amount)
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            model.set_adapter(name)
            return model
        return get_peft_model(model, config, adapter_name=name)

    def deltas(self, model: nn.Module, name: str = "default") -> dict[str, Stirred]:
        held = {p: layer.fallow_delta[name] for p, layer in self.layers(model).items() if name in layer.fallow_delta}
        return {path: Stirred(lambda entries=entries: self._stir(entries)) for path, entries in held.items()}

    @torch.no_grad()
    def _stir(self, entries: nn.Module) -> None:
        entries.values.add_(0.1 * torch.randn_like(entries.values))
