"""What a model said before it was adapted: from the same network with its adapters off, so that no second one is held.

Neither host writes into the base, so with the adapters off the network is the original, whatever `start=` they have;
of PiSSA and its kin too. Dropout and everything else that depends on training is off, no graph is kept, and the model
is afterwards as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.errors import ConfigError
from fallow.core.host import disabled
from fallow.core.host.holder import root_of

Teacher = nn.Module | Callable[[Any], Any]
NOT_INPUTS = ("labels", "num_items_in_batch", "shift_labels", "return_loss")


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Within the block no module is in training mode."""
    before = [module for module in model.modules() if module.training]
    try:
        for module in before:
            module.training = False
        yield
    finally:
        for module in before:
            module.training = True


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block the model is its base: adapters of `fallow.attach`, of PEFT, or of both are off.

    PEFT's own way would make what the user froze trainable again. ConfigError where there is none to switch off.
    """
    own = root_of(model) is not None
    tuned = [module for module in model.modules() if isinstance(module.__dict__.get("_disable_adapters"), bool)]
    if not own and not tuned:
        raise ConfigError(
            f"{type(model).__name__} has no adapter to switch off, so it cannot be its own teacher; attach one, or "
            "give teacher= a copy of the original model or a function of the batch"
        )
    before = [module.__dict__["_disable_adapters"] for module in tuned]
    try:
        for module in tuned:
            module.__dict__["_disable_adapters"] = True
        if own:
            with disabled(model):
                yield
        else:
            yield
    finally:
        for module, was in zip(tuned, before, strict=True):
            module.__dict__["_disable_adapters"] = was


def run(model: nn.Module, batch: Any, ignored: Sequence[str] = ()) -> Any:
    """What a model puts out for the inputs of a batch: a mapping, from which labels and the `ignored` are left out; a
    tensor; or a sequence whose last part are labels.
    """
    if isinstance(batch, Mapping):
        given = {name: value for name, value in batch.items() if name not in (*NOT_INPUTS, *ignored)}
        if getattr(getattr(model, "config", None), "use_cache", False) and _takes(model, "use_cache"):
            given["use_cache"] = False  # in evaluation mode language models would keep all keys and values
        return model(**given)
    return model(batch) if isinstance(batch, Tensor) else model(*batch[: max(1, len(batch) - 1)])


def _takes(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@contextmanager
def as_it_was(model: nn.Module, teacher: Teacher | None = None) -> Iterator[Callable[..., Any]]:
    """Yields run(batch, ignored) of the teacher, or of the model itself without its adapters; without gradients."""
    with torch.no_grad():
        if teacher is None:
            with without_adapters(model), resting(model):
                yield lambda batch, ignored=(): run(model, batch, ignored)
        elif isinstance(teacher, nn.Module):
            with resting(teacher):
                yield lambda batch, ignored=(): run(teacher, batch, ignored)
        else:
            yield lambda batch, ignored=(): teacher(batch)
