"""The page of what each method can do: tables of the capability matrix, and the errors behind what they cannot.

A cell of the tables is for both hosts, or names the one that can.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from method_pages import title

from fallow import catalogue
from fallow.catalogue.capability import COLUMNS, Capability, Cell, capabilities, probed

HEADS = {
    "layers": ("Layers", "On which layers it starts as the base (or says why not), acts, trains and is switched off."),
    "use": ("Use", "On one linear layer."),
    "bases": ("Bases in fewer bits", "A linear layer whose weight is kept so."),
    "training": ("Training", ""),
    "conversion": ("As a plain LoRA", "*Its own factors*: `to_lora` as it is; *by error*: it wants a bound, this one."),
}
PEFT = "PEFT"
NO_CONFIG = "it has no PEFT config"
INTRO = """# Capabilities

What each method can do, as it was found by doing it: `scripts/probe_capabilities.py` tries every method on small
models, on the CPU, and writes down what happened; a test tries again. Nothing here is declared. Options are the
defaults, but for those that small layers want: rank 2, and the like.

✓ goes in both hosts; **attach** only with `fallow.attach`, **in place** only with the optimizer of a selective method
and `fallow.Adapters`; **PEFT** only with `get_peft_model`; ✗ is refused, by an error that
[stands below](#what-the-refusals-say); – does not apply. `fallow methods SLUG` tells the same of one method.
Of the selective methods SaRA and SHiRA have a PEFT config; what the others save, `fallow.from_sparse` brings into PEFT.
"""


def capability_page() -> str:
    """The whole page, in Markdown."""
    return "\n".join([INTRO, *tables(), *refusals()]) + "\n"


def tables() -> Iterator[str]:
    for group, (head, about) in HEADS.items():
        columns = [column for column in COLUMNS.values() if column.group == group]
        yield from (f"## {head}", "", *([about, ""] if about else []))
        yield from (f"- **{column.title}**: {column.meaning}" for column in columns)
        yield ""
        yield "| method | " + " | ".join(column.title for column in columns) + " |"
        yield "| --- |" + " :-: |" * len(columns)
        for slug in probed():
            cells = capabilities(slug)
            yield (
                f"| [{title(catalogue.card(slug))}]({slug}.md) | "
                + " | ".join(mark(column, slug, cells[column.key]) for column in columns)
                + " |"
            )
        yield ""


def mark(column: Capability, slug: str, cells: dict[str, Cell]) -> str:
    """A cell of a table."""
    able = [host for host, cell in cells.items() if cell.answer == "yes"]
    if column.key == "lora" and able:
        return cells[able[0]].note
    if not able:
        return "✗" if any(cell.answer == "no" for cell in cells.values()) else "–"
    return "✓" if len(able) == len(cells) else called(able[0], slug)


def called(host: str, slug: str) -> str:
    """What a host is called: selective methods have an optimizer over the model in the place of attach."""
    return PEFT if host == "peft" else "in place" if catalogue.card(slug).idea == "selection" else "attach"


def refusals() -> Iterator[str]:
    """Each error and each reason once, with the methods that it is said of."""
    yield from (
        "## What the refusals say",
        "",
        "METHOD stands for the method's name. What does not apply is told too.",
        "",
    )
    for column in COLUMNS.values():
        said: dict[tuple[str, str], list[str]] = {}
        for slug in probed():
            cells = capabilities(slug)[column.key]
            told = {host: cell.note for host, cell in cells.items() if cell.answer != "yes"}
            for note in dict.fromkeys(told.values()):
                hosts = [host for host in told if told[host] == note]
                where = "" if len(hosts) == len(cells) else f", {called(hosts[0], slug)}"
                if not note.startswith(NO_CONFIG):
                    said.setdefault((general(note, slug), where), []).append(slug)
        if said:
            yield from (f"**{column.title}**", "")
            yield from (f"- {among(slugs)}{where}: {escaped(note)}" for (note, where), slugs in said.items())
            yield ""


def general(note: str, slug: str) -> str:
    """The error with METHOD in the place of its name, and without the options that it lists."""
    note = note.replace(f"'{slug}'", "'METHOD'").replace(f"={slug} ", "=METHOD ")
    return re.sub(r" \(allowed: [^)]*\)", " (allowed: ...)", note)


def among(slugs: list[str]) -> str:
    """Their names; whole ideas at once."""
    for idea, name in (("selection", "all selective methods"), ("delta", "all weight parameterizations")):
        if slugs == [slug for slug in probed() if catalogue.card(slug).idea == idea]:
            return name
    return ", ".join(slugs)


def escaped(text: str) -> str:
    return re.sub(r"([|*_])", r"\\\1", text).replace("<", "&lt;")
