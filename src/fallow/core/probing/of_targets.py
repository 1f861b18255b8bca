"""Dense gradients of the weights that a selective method chooses among: of their sum, or of their magnitudes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fallow.core.distributed import mean, ranks
from fallow.core.errors import ConfigError, DataError, nearest
from fallow.core.probing.batches import Loss, default_loss
from fallow.core.probing.borrowing import borrowed
from fallow.core.select import Target
from fallow.core.sharded import is_dtensor, local

Aggregate = Literal["sum", "mean_abs"]


def gradients(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Iterable[Any],
    loss: Loss | None = None,
    aggregate: Aggregate = "sum",
) -> dict[str, Tensor]:
    """{name: float32 CPU tensor of the weight's shape}: |sum of the batches' gradients|, or the mean of their
    magnitudes.

    Layer by layer: a hook moves each gradient to the CPU as soon as it exists and drops it, so the device holds one
    dense gradient at a time and the CPU one copy of the weights (two for "mean_abs"). The model runs in eval mode (no
    dropout, fixed batch statistics) and is left as it was: modes, gradients and requires_grad.

    Of several processes each gives batches of its own, as many as the others, and all get the mean of what they found;
    of a sharded weight its own part.

    Raises DataError without batches or where no gradient arrives or one is not finite.
    """
    if aggregate not in ("sum", "mean_abs"):
        raise ConfigError(f"aggregate={aggregate!r} does not exist{nearest(str(aggregate), ('sum', 'mean_abs'))}")
    loss = loss or default_loss
    total: dict[str, Tensor] = {}
    batch_sum: dict[str, Tensor] = {}

    def collect(name: str) -> Callable[[Tensor], None]:
        def hook(param: Tensor) -> None:
            grad, param.grad = param.grad, None
            if grad is not None:
                grad = local(grad)
                part = (grad.to_dense() if grad.is_sparse else grad).float().cpu()
                batch_sum[name] = part + batch_sum[name] if name in batch_sum else part

        return hook

    count = 0
    with borrowed(model, [param for target in targets for param in target.params]), ExitStack() as hooks:
        for target in targets:
            for param in target.params:
                hooks.callback(param.register_post_accumulate_grad_hook(collect(target.name)).remove)
        for batch in batches:
            with torch.enable_grad():
                loss(model, batch).backward()
            count += 1
            for name, part in batch_sum.items():
                part = part.abs_() if aggregate == "mean_abs" else part
                total[name] = total[name].add_(part) if name in total else part
            batch_sum.clear()
    if not count:
        raise DataError("batches is empty; the choice by gradients needs 8 to 64 calibration batches")
    if not total:
        raise DataError(
            "no chosen weight received a gradient from the calibration batches; check include= and the loss"
        )
    for name, value in total.items():
        if not bool(torch.isfinite(value).all()):
            raise DataError(f"the calibration gradient of '{name}' is not finite; check the batches and the loss")
    for target in targets:
        if ranks() > 1 and target.name in total and not is_dtensor(target.weight):
            total[target.name] = mean(total[target.name].to(target.weight.device)).cpu()
    return {
        target.name: (total[target.name].abs_() / (count if aggregate == "mean_abs" else 1))
        if target.name in total
        else torch.zeros(local(target.weight).shape)
        for target in targets
    }
