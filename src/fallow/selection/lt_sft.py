"""LT-SFT: train the entries that a short full fine-tuning moves most, from their first values again.

"Composable Sparse Fine-Tuning for Cross-Lingual Transfer" (lottery-ticket sparse fine-tuning), arXiv 2110.07560; the
selective baseline of SaRA (arXiv 2409.06633).

    1. dense      W_T = a few steps of AdamW on every eligible weight
    2. select     the K entries with the largest |W_T - W_0| over the whole model
    3. rewind     W = W_0, bit for bit
    4. train      those entries only

The dense phase costs the memory of full fine-tuning (two moments and a gradient per weight) and its steps; the first
values wait on the CPU. That is the price of this method, and what SaRA's choice avoids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fallow.core.distributed import average_gradients, start_alike
from fallow.core.errors import ConfigError, DataError, ModelError
from fallow.core.probe import Loss, default_loss
from fallow.core.select import Amount, Patterns, Selector, Target, choose, eligible
from fallow.core.sharded import is_dtensor
from fallow.core.stored_weight import StoredWeight
from fallow.selection.rules import Rule
from fallow.selection.selective import Selective


def most_moved(moved: dict[str, Tensor]) -> Selector:
    """Select the entries with the largest change; `moved` holds |W_T - W_0| by name, on any device."""

    def change(target: Target) -> Tensor:
        return moved[target.name].to(target.weight.device)

    return lambda targets, amount: choose(targets, change, amount, largest=True)


def dense_phase(
    model: nn.Module, targets: Sequence[Target], train: Callable[[list[nn.Parameter]], None]
) -> dict[str, Tensor]:
    """|W_T - W_0| of each target, on the CPU, after `train(parameters)`; the model is rewound bit for bit, buffers
    too.
    """
    first = {target.name: target.weight.detach().to("cpu", copy=True) for target in targets}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    wanted = {id(param) for target in targets for param in target.params}
    required = {param: param.requires_grad for param in model.parameters()}
    moved = {}
    try:
        for param in required:
            param.requires_grad_(id(param) in wanted)
        train([target.weight for target in targets])
        for target in targets:
            last = target.weight.detach().cpu()
            wide = torch.float64 if last.dtype == torch.float64 else torch.float32
            moved[target.name] = (last.to(wide) - first[target.name].to(wide)).abs_()
    finally:
        with torch.no_grad():
            for target in targets:
                target.weight.copy_(first[target.name])
            for buffer, value in buffers:
                buffer.copy_(value)
        for param, requires_grad in required.items():
            param.requires_grad_(requires_grad)
            param.grad = None
    return moved


class LTSFT(Selective):
    """Trains the entries that moved most in a short full fine-tuning.

    Args:
        model: the network. fraction (0.05 by default), budget: how many entries.
        batches: what the dense phase trains on, repeated as often as needed; an iterable that can be walked more than
            once.
        loss: `loss(model, batch)`, by default `model(**batch).loss`.
        dense_steps, dense_lr: of the dense phase.
        lr: 5e-4 for the sparse phase. The other arguments are those of `SaRA`.

    Raises ConfigError or DataError before the model is touched, DataError where the dense phase diverges (then
    rewound).
    """

    def __init__(
        self,
        model: nn.Module,
        fraction: float | None = None,
        budget: int | None = None,
        lr: float = 5e-4,
        *,
        batches: Iterable[Any],
        loss: Loss | None = None,
        dense_steps: int = 100,
        dense_lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        include: Patterns = None,
        exclude: Patterns = None,
        rule: Rule | None = None,
        row_chunk: int | str | None = None,
        in_backward: bool = False,
        state_bits: Literal[8, 32] = 32,
    ) -> None:
        if fraction is None and budget is None:
            fraction = 0.05
        Amount(fraction=fraction, budget=budget)
        if dense_steps < 1 or not 0 < dense_lr < float("inf"):
            raise ConfigError(f"dense_steps={dense_steps} must be at least 1 and dense_lr={dense_lr} above 0")
        objective = loss or default_loss

        def train(parameters: list[nn.Parameter]) -> None:
            optimizer = torch.optim.AdamW(parameters, lr=dense_lr, betas=betas, eps=eps, weight_decay=0.0)
            for batch in islice(_repeated(batches), dense_steps):
                value = objective(model, batch)
                if not bool(torch.isfinite(value)):
                    raise DataError(f"the dense phase diverged (loss {value.item()}); lower dense_lr={dense_lr}")
                value.backward()
                join_gradients(targets)
                average_gradients([target.weight for target in targets])
                optimizer.step()
                optimizer.zero_grad()

        targets = eligible(model, include, exclude)
        if any(is_dtensor(target.weight) for target in targets):
            raise ModelError("LT-SFT's dense phase takes no sharded weights; give SaRA, or an unsharded model")
        if coded := [target.name for target in targets if isinstance(target.weight, StoredWeight)]:
            raise ModelError(
                f"LT-SFT's dense phase trains whole weights, and '{coded[0]}' is quantised; give SaRA, or a base in "
                "float32, bfloat16 or float16"
            )
        start_alike([target.weight for target in targets])
        moved = dense_phase(model, targets, train)
        super().__init__(
            model, most_moved(moved), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fraction=fraction,
            budget=budget, include=include, exclude=exclude, rule=rule,
            row_chunk=row_chunk, in_backward=in_backward, state_bits=state_bits,
            metadata={"method": "lt-sft", "dense_steps": dense_steps, "dense_lr": dense_lr},
        )  # fmt: skip


def join_gradients(targets: Sequence[Target]) -> None:
    """Add the gradients of the other Parameters of a weight that is tied by its storage to the first one's."""
    for target in targets:
        for other in target.params[1:]:
            if other.grad is not None:
                first = target.weight.grad
                target.weight.grad = other.grad if first is None else first + other.grad
                other.grad = None


def _repeated(batches: Iterable[Any]) -> Iterable[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise DataError("batches is empty or can be walked only once; give a list or a DataLoader")
