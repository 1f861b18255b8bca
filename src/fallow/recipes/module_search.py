"""Which modules deserve an adapter: a short differentiable search, as DiffoRA's (see `fallow.budgets.diffora`).

    found = fallow.search_modules(model, train, validation, steps=200)
    fallow.attach(model, "lora", rank=8, budget=found)

Every target gets a LoRA with a gate. After `warmup` steps of the factors alone, each step moves the gates by the loss
of a validation batch, then the factors by that of a training batch. The model is then as it was: its weights, its mode,
what of it is trained. In several processes, each with batches of its own, gradients are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from fallow.budgets.diffora import DiffoRARanks, Scope, best, rows_of
from fallow.core.delta import Delta, number, one_of
from fallow.core.errors import ConfigError, DataError
from fallow.core.host import detach
from fallow.core.probing.batches import Loss
from fallow.core.trimming import adapters
from fallow.deltas import attach
from fallow.recipes.module_gates import Relaxed, Search

NAME = "module_search"


def search_modules(
    model: nn.Module,
    train: Iterable[Any],
    validation: Iterable[Any],
    *,
    loss: Loss | None = None,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Any = "all-linear",
    exclude: Any = None,
    share: float = 0.5,
    scope: Scope = "layer",
    rows: Callable[[str], str] | None = None,
    **how: Any,
) -> DiffoRARanks:
    """The modules of `targets` that a low-rank change helps most. `train`, `validation`: batches of disjoint halves of
    the training data, gone through again and again. `loss(model, batch)`: `model(**batch).loss` unless given. `rows`: a
    module's layer, by its name. Others: see `Search`.

    ConfigError for impossible options, DataError without batches, TrainingError where the loss is no number.
    """
    told = Search(**how)
    number("share", share, most=1.0)
    one_of("scope", scope, ("layer", "model"))
    if train is validation:
        raise ConfigError("train and validation are the same batches; the gates would learn to overfit: split them")
    if any(isinstance(module, Delta) for module in model.modules()):
        raise ConfigError(
            "the model has adapters already, beside which a search says nothing; search on the base alone"
        )
    streams = (_endless(train, "train"), _endless(validation, "validation"))
    trained = {param for param in model.parameters() if param.requires_grad}
    attach(model, "diffora", targets, NAME, exclude=exclude, rank=rank, alpha=alpha, expect_gradients=False)
    try:
        deltas = dict(adapters(model, NAME))
        running = Relaxed(model, deltas, told, rows_of(list(deltas), rows), loss)
        running.run(*streams, lambda scores: best_of(scores, running.rows, share, scope))
        return running.found(share, scope)
    finally:
        detach(model, NAME)
        for param in model.parameters():
            param.requires_grad_(param in trained)


def best_of(scores: dict[str, float], rows: dict[str, list[str]], share: float, scope: Scope) -> list[str]:
    """What would be chosen by these as they are."""
    groups = rows.values() if scope == "layer" else [list(scores)]
    return [name for names in groups for name in best({n: scores[n] for n in names}, share, refuse=False)]


def _endless(batches: Iterable[Any], name: str) -> Iterator[Any]:
    """The batches over and over. DataError where there is none."""
    held = batches if hasattr(batches, "__getitem__") or hasattr(batches, "__len__") else list(batches)
    while True:
        count = 0
        for batch in held:
            count += 1
            yield batch
        if not count:
            raise DataError(f"{name} holds no batch; give some of both")
