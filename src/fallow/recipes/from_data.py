"""Starts and budgets of a run that look at its pictures first: named in the options, made from a probe of its batches.

fallow train --method dora --option start=eva --option budget=eva
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fallow.budgets.eva import EVARanks
from fallow.budgets.lamda import LaMDARanks
from fallow.core.errors import ConfigError
from fallow.core.probe import probe
from fallow.core.statistics import Statistics
from fallow.recipes.trained import Order
from fallow.starts.corda import CorDA
from fallow.starts.eva import EVA
from fallow.starts.lora_ga import LoRAGA
from fallow.starts.lora_sb import LoRASB

Make = Callable[[Statistics, Order], Any]


@dataclass(frozen=True)
class FromData:
    """What has to be gathered, and what is made of it. `components`: directions kept for each rank of the adapter."""

    want: str
    make: Make
    components: int = 1


STARTS = {
    "lora-ga": FromData("gradient", lambda found, order: LoRAGA(found)),
    "lora-sb": FromData("gradient", lambda found, order: LoRASB(found, lr=_first_rate(order))),
    "corda": FromData("input_covariance", lambda found, order: CorDA(found)),
    "eva": FromData("activation", lambda found, order: EVA(found), 2),
}
BUDGETS = {
    "eva": FromData("activation", lambda found, order: EVARanks(found), 2),
    "lamda": FromData("spectrum", lambda found, order: LaMDARanks(found)),
}
ELSEWHERE = {
    "fila": "it compares a set to forget with one to retain: fallow unlearn",
    "colora": "it compares the base with a network that was fully trained: fallow.CoLoRARanks",
}


def from_data(order: Order, part: nn.Module, options: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The options with `start` and `budget` made, where their names ask for data: of one pass over the batches.

    `part`: of the network, that the options are for. ConfigError for names that need what this recipe has not.
    """
    asked: dict[str, FromData] = {}
    for argument, known in (("start", STARTS), ("budget", BUDGETS)):
        name = options.get(argument)
        if isinstance(name, str) and name in known:
            asked[argument] = known[name]
        elif isinstance(name, str) and name in ELSEWHERE:
            raise ConfigError(f"{argument}={name} has no place in this command: {ELSEWHERE[name]}")
    if not asked:
        return dict(options)
    want = {one.want for one in asked.values()}
    told: dict[str, Any] = {}
    if "activation" in want:
        told = {"components": rank * max(one.components for one in asked.values()), "rank": rank}
    found = probe(
        part,
        order.batches,
        want,
        loss=lambda _, batch: order.loss(order.network, batch),
        targets=options["target_modules"],
        exclude=options.get("exclude_modules"),
        **told,
    )
    return {**options, **{argument: one.make(found, order) for argument, one in asked.items()}}


def _first_rate(order: Order) -> float:
    """Of the first step, in the recipe's own warm-up of a twentieth of the run and at most 100 steps."""
    return (5e-4 if order.lr is None else order.lr) / max(1, min(100, order.steps // 20))
