"""Exchangeable parts of an optimizer: named, with options, and plain data in files.

A part is a frozen dataclass with a `name`. Where one is asked for, it is given as its name, `"fira"`, as a mapping,
`{"name": "fira", "limit": 1.02}`, or made, `Fira(limit=1.02)`; `state_dict()` holds the mapping.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from fallow.core.errors import ConfigError, nearest

P = TypeVar("P")


def make_part(what: str, given: object, table: Mapping[str, type[P]], kind: type) -> P:
    """The part that is meant by `given`; ConfigError for a name or an option that does not exist, or a bad value."""
    if isinstance(given, kind) and not isinstance(given, type):
        return given  # type: ignore[return-value]
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise ConfigError(
            f"{what}={given!r} must be a name, a mapping with a name, or a part itself{nearest('', table)}"
        )
    name, options = given["name"], {key: value for key, value in given.items() if key != "name"}
    if name not in table:
        raise ConfigError(f"{what}='{name}' does not exist{nearest(name, table)}")
    allowed = {field.name for field in fields(table[name])}  # type: ignore[arg-type]
    for key in options:
        if key not in allowed:
            raise ConfigError(f"{what}='{name}' has no option '{key}'{nearest(key, allowed)}")
    return table[name](**options)


def described(part: Any) -> dict[str, Any]:
    """The mapping that `make_part` takes."""
    return {"name": part.name, **asdict(part)}


def number(what: str, value: Any, low: float, high: float = float("inf"), *, closed: bool = True) -> None:
    """ConfigError where `value` is no number in [low, high), or in (low, high) if not `closed`."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not (low <= value < high) or (not closed and value == low):
        above = "at least" if closed else "above"
        below = "" if high == float("inf") else f" and below {high:g}"
        raise ConfigError(f"{what}={value!r} must be a number {above} {low:g}{below}")


def one_of(what: str, value: Any, allowed: tuple[str, ...]) -> None:
    """ConfigError where `value` is none of these."""
    if value not in allowed:
        raise ConfigError(f"{what}={value!r} does not exist{nearest(str(value), allowed)}")
