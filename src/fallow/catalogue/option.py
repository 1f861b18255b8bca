"""What a weight parameterization can be told: its options with their defaults and meanings, read from the class itself.

A method's `Options` says in its docstring what each of its fields means: "`rank`: r. `alpha`: None for the rank. ...".
The command line and the documentation show that; nothing is written twice.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from fallow.catalogue.entry import Card

ENTRY = re.compile(r"(?:^|(?<=[.;)\]]) )`(\w+)`: ")


@dataclasses.dataclass(frozen=True)
class Option:
    """`default`: as it is written in Python. `meaning`: in Markdown, "" where the class says nothing."""

    name: str
    default: str
    meaning: str


def options_of(card: Card) -> list[Option]:
    """The options of a ready weight parameterization, in the order of its class; [] for any other method."""
    if not (card.ready and card.home.startswith("fallow.deltas.")):
        return []
    options = card.load().Options
    meanings = _meanings(options)
    return [Option(f.name, _default(f), meanings.get(f.name, "")) for f in dataclasses.fields(options)]


def _default(field: dataclasses.Field[Any]) -> str:
    return repr(field.default if field.default_factory is dataclasses.MISSING else field.default_factory())


def _meanings(options: type) -> dict[str, str]:
    """{option: what the docstrings of the class and of those that it derives from say of it}, the class's own first."""
    told: dict[str, str] = {}
    for cls in reversed(options.__mro__):
        first = (vars(cls).get("__doc__") or "").split("\n\n")[0]
        _, *parts = ENTRY.split(" ".join(first.split()))
        told |= dict(zip(parts[::2], parts[1::2], strict=True))
    return told
