"""What `fallow methods` tells of the capability matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.text import Text

from fallow import catalogue
from fallow.catalogue.capability import COLUMNS, Cell, capabilities
from fallow.cli import show
from fallow.core.errors import ConfigError

MARKS = {"yes": ("yes", "green"), "no": ("no", "red"), "n/a": ("-", "dim")}


def _names(slug: str) -> dict[str, str]:
    """What the two hosts are called: selective methods have an optimizer over the model in the place of attach."""
    return {"own": "in place" if catalogue.card(slug).idea == "selection" else "attach", "peft": "PEFT"}


def as_dict(slug: str) -> dict[str, dict[str, str]]:
    """{column: {host: cell}}, plain values; empty for a method that was not probed."""
    return {key: {host: str(cell) for host, cell in cells.items()} for key, cells in capabilities(slug).items()}


def show_these(slugs: list[str]) -> None:
    """One in full, or a line for each. ConfigError for one that was not probed."""
    if len(slugs) > 1:
        show_all(slugs)
    elif not capabilities(slugs[0]):
        raise ConfigError(f"'{slugs[0]}' was not tried: it is planned, or has no class; `fallow methods` tells which")
    else:
        show_one(slugs[0])


def show_one(slug: str) -> None:
    """Every column of a method, with what there is to say to it."""
    found = capabilities(slug)
    if not found:
        return
    names = _names(slug)
    rows = [
        (COLUMNS[key].group, COLUMNS[key].title, _mark(cells["own"]), _mark(cells["peft"]), _notes(cells, names))
        for key, cells in found.items()
    ]
    show.table("what it can do, as tried", ["", "", *names.values(), ""], rows)


def show_all(slugs: Iterable[str]) -> None:
    """A line for each method that was probed: what both hosts refuse, by group, and the LoRA that it becomes."""
    groups = list(dict.fromkeys(column.group for column in COLUMNS.values() if column.key != "lora"))
    rows: list[list[Any]] = []
    for slug in slugs:
        if found := capabilities(slug):
            rows.append([Text(slug, style="bold"), *(_all_but(found, group) for group in groups), _lora(found["lora"])])
    show.table("", ["method", *groups, "exact LoRA"], rows)
    show.console().print(
        "What neither fallow.attach nor PEFT takes; `fallow methods SLUG` tells of each, and what is said to the rest.",
        style="dim",
    )


def _mark(cell: Cell) -> Text:
    word, style = MARKS[cell.answer]
    return Text(word, style=style)


def _notes(cells: Mapping[Any, Cell], names: Mapping[str, str]) -> str:
    own, peft = cells["own"].note, cells["peft"].note
    if own == peft:
        return own
    return "; ".join(f"{names[host]}: {note}" for host, note in (("own", own), ("peft", peft)) if note)


def _all_but(found: Mapping[str, Mapping[Any, Cell]], group: str) -> str:
    asked = [key for key, column in COLUMNS.items() if column.group == group]
    answers = {key: {cell.answer for cell in found[key].values()} for key in asked}
    missing = [COLUMNS[key].title for key in asked if "no" in answers[key] and "yes" not in answers[key]]
    return f"not {', '.join(missing)}" if missing else "all"


def _lora(cells: Mapping[Any, Cell]) -> str:
    return next((cell.note for cell in cells.values() if cell.answer == "yes"), "-")
