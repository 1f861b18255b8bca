"""Which layer gets how much rank: a `Budget` gives the ranks before training, and may change them during it.

    fallow.attach(model, "lora", rank=8, budget=fallow.EVARanks(stats))      rank: the mean, or what it makes of it
    fallow.attach(model, "lora", rank=4, budget="increlora")                 a name, where no data is needed

A layer that gets 0 has no adapter. The scale s = alpha / r stays the same in all layers: alpha follows the rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from fallow.core.delta import Delta, MethodOptions
from fallow.core.errors import ConfigError
from fallow.core.schedule import Attached
from fallow.core.starting import meant

BUDGETS: dict[str, type[Budget]] = {}
PLAIN = ("default",)  # every layer has the rank that it is told


class Budget:
    """Override `ranks`, `follow` or both. Subclasses are dataclasses of their options; `needs`: the data they need."""

    name: ClassVar[str] = ""
    needs: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("name"):
            BUDGETS[cls.name] = cls

    def ranks(self, shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, int]:
        """The rank of each layer before training, by name; `shapes`: their (out, in)."""
        return dict.fromkeys(shapes, rank)

    def follow(self, deltas: Mapping[str, Delta]) -> Attached | None:
        """What changes the ranks of these while they train; None for nothing."""
        return None


def budget_of(given: Any) -> Budget | None:
    """The Budget that is meant. ConfigError for unknown names and those that need data."""
    found: Budget | None = meant("budget", given, BUDGETS, Budget, PLAIN)
    return found


def shared_out(
    budget: Budget | None, options: Mapping[str, MethodOptions], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, MethodOptions]:
    """The options of each layer with its rank of the budget; layers that get none are left out.

    ConfigError where the method has no rank, layers were told ranks of their own, or the budget does not fit them.
    """
    if budget is None:
        return dict(options)
    if not all(hasattr(own, "rank") for own in options.values()):
        raise ConfigError(f"budget='{budget.name}' shares out ranks, which this method does not have; leave it out")
    given: set[int] = {vars(own)["rank"] for own in options.values()}
    if len(given) > 1:
        raise ConfigError(
            f"budget='{budget.name}' and patterns both give layers ranks of their own ({sorted(given)}); give one"
        )
    ranks = budget.ranks(shapes, given.pop())
    for name, rank in ranks.items():
        if name not in options or isinstance(rank, bool) or not isinstance(rank, int) or not rank >= 0:
            raise ConfigError(f"budget='{budget.name}' gave {name!r} the rank {rank!r}, which is no layer's or no rank")
    shared = {name: at_rank(own, ranks[name]) for name, own in options.items() if ranks.get(name)}
    if not shared:
        raise ConfigError(f"budget='{budget.name}' gives no layer any rank; give it more, or leave it out")
    return shared


def at_rank(options: MethodOptions, rank: int) -> MethodOptions:
    """The same options at another rank, alpha such that the scale is the same."""
    before: int = getattr(options, "rank", rank)
    alpha = getattr(options, "alpha", None)
    root = getattr(options, "scaling", "standard") == "rslora"
    told: dict[str, Any] = {"rank": rank}
    if root:
        told["alpha"] = float((before if alpha is None else alpha) * math.sqrt(rank / before))
    elif alpha is not None:
        told["alpha"] = float(alpha * rank / before)
    return dataclasses.replace(options, **told)
