"""An adapter whose file is of no use leaves the model as it was: PEFT puts the adapter in before it reads the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.errors import AdapterError
from fallow.core.peft_host.layer import FallowLayer
from fallow.core.peft_host.shared import SHARED, Shared

PLACE = "fallow_loading"  # of the adapter that waits for its file, in the __dict__ of the model


class Loading:
    """What an adapter has changed in a model, from the time it is put in until its file fits."""

    def __init__(self, model: nn.Module, name: str, configs: MutableMapping[str, Any]) -> None:
        self.model, self.name, self.configs = model, name, configs
        self.required = [(param, param.requires_grad) for param in model.parameters()]
        self.wrapped: list[tuple[nn.Module, str, nn.Module]] = []  # parent, name of the child, the child before

    def undo(self) -> None:
        """Take the adapter, and the layers made for it, out again."""
        self.model.__dict__.pop(PLACE, None)
        for layer in [module for module in self.model.modules() if isinstance(module, FallowLayer | Shared)]:
            if self.name in layer.fallow_delta:
                layer.delete_adapter(self.name)
        shared = getattr(self.model, SHARED, None)
        if isinstance(shared, Shared) and not len(shared.fallow_delta):
            delattr(self.model, SHARED)
        for parent, name, child in reversed(self.wrapped):
            setattr(parent, name, child)
        for param, value in self.required:
            param.requires_grad_(value)
        self.configs.pop(self.name, None)
        if not self.configs and getattr(self.model, "peft_config", None) is self.configs:
            del self.model.peft_config


def waiting(model: nn.Module, name: str) -> Loading | None:
    """The adapter of this name, where it was put into the model for a file that has not been read yet."""
    for held in (model, getattr(getattr(model, "base_model", None), "model", None)):
        found = None if held is None else held.__dict__.get(PLACE)
        if isinstance(found, Loading) and found.name == name:
            return found
    return None


def check_tensors(method: str, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], file: Iterable[str]) -> None:
    """AdapterError where the Deltas' tensors are missing, misshapen, of another kind, no numbers, or too many.

    `wanted`, `given`: by their names in the model; `file`: the names in the file.
    """
    if not wanted.keys() & given.keys():
        raise AdapterError(
            f"no tensor of the file fits this '{method}' adapter: it holds {_some(file)}; the adapter has "
            f"{_some(wanted)}"
        )
    if missing := wanted.keys() - given.keys():
        raise AdapterError(f"the file lacks {_some(missing)} of the '{method}' adapter; copy it again")
    if extra := given.keys() - wanted.keys():
        raise AdapterError(f"the file holds {_some(extra)}, which this '{method}' adapter does not have")
    for name, tensor in wanted.items():
        found = given[name]
        if tensor.shape != found.shape:
            raise AdapterError(
                f"'{name}' is {tuple(found.shape)} in the file and {tuple(tensor.shape)} in the model; give the base "
                "and the options that the adapter was trained with"
            )
        if tensor.is_floating_point() != found.is_floating_point():
            raise AdapterError(f"'{name}' is {found.dtype} in the file and {tensor.dtype} in the model; copy it again")
        if found.is_floating_point() and found.dtype.itemsize > 1 and not bool(torch.isfinite(found).all()):
            raise AdapterError(
                f"the values of '{name}' are NaN or infinite; the file is damaged, or its training had failed"
            )


def refuse_foreign(state: Iterable[str], others: Iterable[str]) -> None:
    """AdapterError where the file holds tensors, beside the Deltas', that the model has no place for."""
    known = {_bare(name) for name in state}
    if foreign := [name for name in others if _bare(name) not in known]:
        raise AdapterError(f"the file holds {_some(foreign)}, which the model does not have; give the adapter's base")


def _bare(name: str) -> str:
    """A tensor's path without PEFT's wrappers."""
    return name.removeprefix("base_model.model.").replace("base_layer.", "")


def _some(names: Iterable[str]) -> str:
    """The first three, and how many more."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
