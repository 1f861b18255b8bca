"""The capability matrix: every ready method that has a class, tried in both hosts, column by column."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from capability_probes import PROBES, NotApplicable, Refused, Tried
from delta_hosts import HOSTS
from entries_hosts import CONFIGS, EntriesMethod, OwnEntries, PeftEntries
from entries_probes import OTHERWISE

from fallow.catalogue import methods
from fallow.catalogue.capability import COLUMNS, Cell
from fallow.core.delta import Delta
from fallow.core.errors import FallowError

WITHOUT_HOST = ("train",)  # the command is one and the same


def subjects() -> dict[str, tuple[Any, tuple[Any, Any]]]:
    """{slug: (method, its two hosts)} of every ready weight parameterization and selective method."""
    found: dict[str, tuple[Any, tuple[Any, Any]]] = {}
    for card in methods():
        cls = card.load() if card.ready and card.home else None
        if isinstance(cls, type) and issubclass(cls, Delta):
            found[card.slug] = (cls, HOSTS)
        elif isinstance(cls, type) and card.idea == "selection":
            found[card.slug] = (EntriesMethod(card.slug, cls), (OwnEntries(), PeftEntries()))
    return dict(sorted(found.items()))


def answer(column: str, tried: Tried) -> Cell:
    """What trying gives. Errors that are none of ours go through."""
    if tried.peft and isinstance(tried.method, EntriesMethod) and tried.method.name not in CONFIGS:
        return Cell("n/a", "it has no PEFT config; fallow.from_sparse makes a PEFT adapter of its file")
    probe = OTHERWISE.get(type(tried.host), {}).get(column, PROBES[column])
    torch._dynamo.reset()  # it compiles one function a few times only, and all probes share the engine's
    try:
        return Cell("yes", probe(tried) or "")
    except NotApplicable as why:
        return Cell("n/a", str(why))
    except Refused as why:
        return Cell("no", str(why))
    except FallowError as error:
        return Cell("no", re.sub(re.escape(str(tried.folder)) + r"\S*", "FOLDER", str(error)))


def try_out(slug: str, columns: Iterable[str] = COLUMNS) -> dict[str, str | dict[str, str]]:
    """{column: the cell's text, or one by host where they differ}, in alphabetical order."""
    method, hosts = subjects()[slug]
    row: dict[str, str | dict[str, str]] = {}
    for column in sorted(columns):
        cells: dict[str, str] = {}
        for host in hosts[:1] if column in WITHOUT_HOST else hosts:
            with tempfile.TemporaryDirectory() as folder, _quiet():
                try:
                    cells[host.name] = str(answer(column, Tried(host, method, Path(folder))))
                except Exception as error:
                    error.add_note(f"while trying '{column}' of '{slug}' in the host '{host.name}'")
                    raise
        row[column] = cells if len(set(cells.values())) > 1 else next(iter(cells.values()))
    return row


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries say on the way."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def differences(stored: Mapping[str, Any], tried: Mapping[str, Any]) -> list[str]:
    """What trying says otherwise than the stored rows, a line for each cell."""
    return [
        f"{slug}, {column}: stored {stored.get(slug, {}).get(column)!r}, now {cell!r}"
        for slug, row in tried.items()
        for column, cell in row.items()
        if stored.get(slug, {}).get(column) != cell
    ]
