"""Terms of a model's logits, row by row: which rows count, and sums over them in float32 with little memory.

A language model's logits (n, t, v) are its largest tensor. A term that casts them to float32 and keeps what autograd
wants holds them several times over. Here a few rows at a time are cast, the term and its gradient are made of them at
once, and of all this one tensor of the logits' shape and dtype is kept: the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fallow.core.errors import ConfigError, DataError

CHUNK = 1 << 22  # entries that are in float32 at one time: 16 MiB
IGNORED = -100
Term = Callable[[Tensor, Tensor], Tensor]  # rows (m, v) in float32 or wider, their numbers (m,) -> a sum over them


def logits_of(outputs: Any) -> Tensor:
    """What a model put out: `.logits` or `.sample`, an entry of that name, the first of a tuple, or itself.

    ConfigError where there is no such tensor.
    """
    for name in ("logits", "sample"):
        found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(outputs, tuple | list) and outputs:
        outputs = next((part for part in outputs if isinstance(part, Tensor) and part.ndim > 1), None)
    if isinstance(outputs, Tensor):
        return outputs
    raise ConfigError(f"outputs={type(outputs).__name__} have no logits; give what the model returned, or its logits")


def labels_of(batch: Any, name: str = "labels") -> Tensor:
    """The labels of a batch, a mapping with such an entry or a pair whose last part they are. DataError without."""
    if isinstance(batch, Mapping):
        found = batch.get(name)
    else:
        found = batch[-1] if isinstance(batch, Sequence) and len(batch) > 1 else None
    if not isinstance(found, Tensor):
        raise DataError(f"the batch has no '{name}'; this objective needs them to know which positions count")
    return found


def target_rows(logits: Tensor, labels: Tensor, shift: bool = True) -> tuple[Tensor, Tensor]:
    """Which rows of logits.flatten(0, -2) count, (m,), and the targets of these, (m,).

    Of a language model's logits (n, t, v) and labels (n, t), position i of the logits speaks of label i + 1: `shift`.
    Labels of -100 do not count. DataError where the shapes do not fit.
    """
    if labels.shape != logits.shape[:-1]:
        raise DataError(f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}; one for each row")
    aimed = labels
    if shift and labels.ndim > 1:
        aimed = torch.full_like(labels, IGNORED)
        aimed[..., :-1] = labels[..., 1:]
    flat = aimed.reshape(-1).to(logits.device)
    rows = (flat != IGNORED).nonzero().squeeze(1)
    return rows, flat[rows]


def count(labels: Tensor, shift: bool = True) -> Tensor:
    """How many labels count, as a scalar on their device."""
    return (labels[..., 1:] if shift and labels.ndim > 1 else labels).ne(IGNORED).sum()


@dataclass
class Job:
    """`weight` times the sum of term(z, at) over `rows`, `at`: where in `rows` the rows z stand. `whole`: the term
    needs all of them at once. `value`: the sum, once it is known.
    """

    rows: Tensor
    term: Term
    weight: float = 1.0
    whole: bool = False
    value: Tensor | None = None


def sum_over_rows(logits: Tensor, *jobs: Job) -> Tensor:
    """The sum of these jobs over the rows of logits.flatten(0, -2), in float32 or wider; differentiable once.

    All jobs share the one gradient that is kept. Without rows it is 0, with a graph.
    """
    return cast(Tensor, _Sum.apply(logits.reshape(-1, logits.shape[-1]), jobs))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, jobs: Sequence[Job]) -> Tensor:
        wide = torch.float64 if flat.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=flat.device)
        grad = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        with torch.autocast(flat.device.type, enabled=False):
            for job in jobs:
                job.value = torch.zeros_like(total)
                for at in torch.arange(len(job.rows), device=flat.device).split(_step(job, flat)):
                    job.value += _part(job, at, flat, grad, wide)
                total += job.weight * job.value
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return (grad * upstream).to(grad.dtype), None


def _step(job: Job, flat: Tensor) -> int:
    return max(1, len(job.rows) if job.whole else CHUNK // flat.shape[1])


def _part(job: Job, at: Tensor, flat: Tensor, grad: Tensor | None, wide: torch.dtype) -> Tensor:
    """The term of these rows; its weighed gradient goes into `grad`."""
    index = job.rows[at]
    z = flat.index_select(0, index).to(wide).requires_grad_(grad is not None)
    with torch.set_grad_enabled(grad is not None):
        value = job.term(z, at)
    if grad is not None and value.requires_grad:
        (made,) = torch.autograd.grad(value, z)
        grad.index_add_(0, index, made.mul_(job.weight).to(grad.dtype))
    return value.detach()
