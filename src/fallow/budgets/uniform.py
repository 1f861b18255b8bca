"""Uniform: the same rank in every layer, but where a pattern of names says otherwise.

    r_i = ranks[pattern] of the first pattern that matches the whole name of layer i, else `rank`; 0: no adapter there

What budgets are compared with. `total=True` keeps the sum at N rank: what the patterns leave of it is shared by the
other layers, the first ones getting what does not divide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from fallow.core.budgeting import Budget
from fallow.core.delta import one_of, whole
from fallow.core.errors import ConfigError


@dataclass(frozen=True)
class Uniform(Budget):
    """`patterns`: {regular expression: rank}. `total`: whether the others make up for what these have more or less."""

    name: ClassVar[str] = "uniform"

    patterns: Mapping[str, int] = field(default_factory=dict)
    total: bool = False

    def __post_init__(self) -> None:
        one_of("total", self.total, (True, False))
        for pattern, rank in self.patterns.items():
            whole(f"patterns[{pattern!r}]", rank, 0)
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"patterns: {pattern!r} is no regular expression: {error}") from None

    def ranks(self, shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, int]:
        for pattern in self.patterns:
            if not any(re.fullmatch(pattern, name) for name in shapes):
                raise ConfigError(
                    f"patterns: {pattern!r} matches none of {', '.join(shapes)}; it is to match whole names"
                )
        given = {
            name: next((r for pattern, r in self.patterns.items() if re.fullmatch(pattern, name)), None)
            for name in shapes
        }
        others = [name for name, r in given.items() if r is None]
        if not self.total or not others:
            return {name: rank if r is None else r for name, r in given.items()}
        left = rank * len(shapes) - sum(r or 0 for r in given.values())
        if left < 0:
            raise ConfigError(
                f"patterns ask for {-left} more ranks than the {rank * len(shapes)} there are; lower them"
            )
        each, more = divmod(left, len(others))
        shares = {name: each + (number < more) for number, name in enumerate(others)}
        return {name: shares[name] if r is None else r for name, r in given.items()}
