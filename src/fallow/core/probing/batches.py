"""What a batch is to `fallow.probe`: its loss, its samples, its label tokens, its mask of padding.

A batch is a dict, whose loss is `model(**batch).loss`; a pair (inputs, labels) of class numbers, whose loss is the
cross entropy of `model(inputs)`; a tensor, for what needs no loss; a function of the model that returns the loss; or
whatever a `loss(model, batch)` of the user's takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fallow.core.errors import ConfigError, DataError

Loss = Callable[[nn.Module, Any], Tensor]
IGNORED = -100  # the label of what does not count


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """`model(**batch).loss`, the convention of transformers."""
    return model(**batch).loss


def loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """A scalar. ConfigError where it is not known how to get one of such a batch, DataError where labels lack."""
    if loss is not None:
        return _scalar(loss(model, batch))
    if isinstance(batch, Mapping):
        output = model(**batch)
        found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if found is None:
            missing = "" if "labels" in batch else ", for want of 'labels'"
            raise DataError(
                f"model(**batch) gave no loss{missing} (the batch holds {', '.join(map(str, batch))}); give batches "
                "with labels, or fallow.probe loss=, a function of the model and a batch"
            )
        return _scalar(found)
    if callable(batch) and not isinstance(batch, Tensor):
        return _scalar(batch(model))
    if _is_pair(batch):
        logits = model(batch[0])
        logits = getattr(logits, "logits", logits)
        return F.cross_entropy(logits, batch[1], ignore_index=IGNORED)
    raise ConfigError(
        f"there is no loss of a batch that is {named(batch)}; give dicts with labels, pairs (inputs, class numbers), "
        "or loss=, a function of the model and a batch"
    )


def forward(model: nn.Module, batch: Any, loss: Loss | None) -> None:
    """Run the model for what its layers see; a loss is asked for only where it is the user's own."""
    if loss is not None:
        loss(model, batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, Tensor):
        model(batch)
    elif callable(batch):
        batch(model)
    elif _is_pair(batch):
        model(batch[0])
    else:
        raise ConfigError(
            f"it is not known how a model takes a batch that is {named(batch)}; give dicts, tensors, pairs (inputs, "
            "labels), or loss=, a function of the model and a batch"
        )


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        told = f"of the shape {tuple(value.shape)}" if isinstance(value, Tensor) else named(value)
        raise ConfigError(f"the loss of a batch is {told}; loss= must return a tensor of one number")
    return value


def _is_pair(batch: Any) -> bool:
    """Inputs, and labels that are class numbers."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        return False
    return not batch[1].is_floating_point()


def named(value: Any) -> str:
    """What a value is, for a message."""
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device; itself where they are there."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        held = {key: moved(value, device) for key, value in batch.items()}
        return batch if all(held[key] is value for key, value in batch.items()) else held
    if type(batch) in (tuple, list):
        parts = [moved(value, device) for value in batch]
        return batch if all(map(is_, parts, batch)) else type(batch)(parts)
    return batch


def label_tokens(batch: Any, given: Callable[[Any], float] | None = None) -> float:
    """How much a batch counts in a mean: the number of its labels, without those of -100; 1 where it has none."""
    if given is not None:
        return float(given(batch))
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
    else:
        labels = batch[1] if _is_pair(batch) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return 1.0
    return float((labels != IGNORED).sum())


def samples(batch: Any) -> list[Any]:
    """Batches of one sample each. ConfigError where the parts do not have one first dimension in common."""
    parts = (
        list(batch.values()) if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    )
    tensors = [part for part in parts if isinstance(part, Tensor) and part.dim()]
    sizes = {len(part) for part in tensors}
    if len(sizes) != 1:
        raise ConfigError(
            f"a batch that is {named(batch)} cannot be split into samples (first dimensions: "
            f"{sorted(sizes) or 'none'}); give batches of tensors that all have the samples as their first dimension"
        )

    def one(part: Any, at: int) -> Any:
        return part[at : at + 1] if isinstance(part, Tensor) and part.dim() else part

    if isinstance(batch, Mapping):
        return [{key: one(part, at) for key, part in batch.items()} for at in range(sizes.pop())]
    if isinstance(batch, Tensor):
        return [one(batch, at) for at in range(sizes.pop())]
    return [type(batch)(one(part, at) for part in batch) for at in range(sizes.pop())]


def masks_of(batch: Any, mask: Any) -> list[Tensor]:
    """The masks (B, T) of a batch, bool, True where a token counts; none where it holds none.

    ConfigError where one is of another number of dimensions.
    """
    if mask is None:
        return []
    if isinstance(mask, str):
        found = batch.get(mask) if isinstance(batch, Mapping) else None
        given = [found] if isinstance(found, Tensor) else []
    else:
        made = mask(batch)
        given = [] if made is None else [made] if isinstance(made, Tensor) else list(made)
    for one in given:
        if one.dim() != 2:
            raise ConfigError(
                f"mask={mask!r} gives a mask of the shape {tuple(one.shape)}; it must be (samples, tokens): give a "
                "function of the batch that makes one, or mask=None"
            )
    return [one != 0 for one in given]
