"""Cutting the ranks that do nothing, after training or in the middle of it, with no change of the output.

    fallow.trim(model)                      gates at zero (SoRA, CoDyRA), triplets that were taken or never needed
    with fallow.condition(model, rank=4):
        fallow.trim(model)                  DyLoRA: what is beyond the rank that was chosen

A layer without any rank that does something keeps one that does nothing: its file has the same layers on both hosts,
and a gate at zero may return where training goes on. Optimizers that train the adapter go on too, see
`fallow.core.regrowth`. Ranks whose start was taken out of the weight stay, as what they do is the difference to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from fallow.core.delta import Delta
from fallow.core.errors import ConfigError, nearest
from fallow.core.fused import single
from fallow.core.regrowth import resized
from fallow.core.schedule import attached


def trim(model: nn.Module, name: str = "default", optimizers: Iterable[Optimizer] = ()) -> dict[str, int]:
    """Cut an adapter's ranks of no effect, on either host; the rank of each layer now.

    `optimizers`: those that train it and have made no step yet; others are known. ConfigError where there is no adapter
    of that name, its method has no ranks to cut, or a budget is still changing them.
    """
    deltas = dict(adapters(model, name))
    changing: list[Any] = [each for each in attached(model) if hasattr(each, "finished") and not each.finished()]
    if any(each.follows(delta) for each in changing for delta in deltas.values()):
        raise ConfigError(
            "a budget is still changing ranks; trim after its last decision, or it would miss what is cut"
        )
    used = {key: max(1, delta.used_ranks()) for key, delta in deltas.items()}
    for key, delta in deltas.items():
        if used[key] < len(delta.importance()):
            resized(delta, used[key], optimizers)
    return used


def adapters(model: nn.Module, name: str = "default") -> Iterator[tuple[str, Delta]]:
    """The Deltas of an adapter on either host by the names of their weights; of fused weights the blocks.

    ConfigError where there is none.
    """
    found = {path: module for path, module in model.named_modules() if isinstance(module, Delta)}
    within = {id(part) for delta in found.values() for part in delta.modules() if part is not delta}
    mine = {path: delta for path, delta in found.items() if path.rpartition(".")[2] == name and id(delta) not in within}
    if not mine:
        known = sorted({path.rpartition(".")[2] for path, delta in found.items() if id(delta) not in within})
        hint = nearest(name, known) if known else "; fallow.attach(model, 'lora') adds one"
        raise ConfigError(f"{type(model).__name__} has no adapter '{name}'{hint}")
    for delta in mine.values():
        yield from single(delta.site_name, delta)
