"""How the command line looks: consoles, tables, sizes. No colour codes reach a file or a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

UNFOLDED = 10_000  # columns
FOLDED = 16  # columns that a folded cell has at least
GAP = 3  # columns between two of a table, at most
_LIBRARIES_WARNING = warnings.showwarning


def console(stderr: bool = False) -> Console:
    """A console on the present stdout or stderr. Made anew, because tests and pipes replace the streams."""
    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def results() -> Console:
    """A console on stdout for tables; in a file or a pipe so wide that no name or path is folded."""
    out = console()
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = UNFOLDED
    return out


def error(message: str, title: str = "Error") -> None:
    """Say what went wrong, on stderr: a panel on a terminal, plain unwrapped lines in a log."""
    out = console(stderr=True)
    if out.is_terminal:
        out.print(Panel(Text(message), title=title, title_align="left", border_style="red", box=box.ROUNDED))
    else:
        out.print(Text(f"{title}: {message}"), soft_wrap=True)


def note(message: str) -> None:
    """A remark on stderr, which leaves stdout to the results."""
    console(stderr=True).print(Text(message), soft_wrap=not sys.stderr.isatty())


def warning(message: Warning | str, category: type[Warning], filename: str, *where: Any, **more: Any) -> None:
    """In the place of `warnings.showwarning`: Fallow's own warnings as remarks, those of libraries as they come."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        note(f"Note: {message}")
    else:
        _LIBRARIES_WARNING(message, category, filename, *where, **more)


def result(value: Any) -> None:
    """One JSON document on stdout, and nothing else. Not-a-number becomes null: strict readers refuse NaN."""
    typer.echo(json.dumps(_plain(value), indent=2, ensure_ascii=False))


@contextlib.contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """While a machine reads stdout, whatever the block prints goes to stderr."""
    if wanted:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    else:
        yield


@contextlib.contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done, on a terminal only; yields the function that changes it."""
    out = console(stderr=True)
    if not out.is_terminal:
        yield lambda text: None
        return
    with out.status(Text(text)) as status:
        yield lambda text: status.update(Text(text))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Iterable[int] = ()) -> None:
    """Print a table; the columns numbered in `right` are aligned to the right and never wrapped nor cut.

    On a terminal that is too narrow for them the lines go on in the next.
    """
    right, rows = set(right), [list(row) for row in rows]
    grid = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, title_style="bold")
    for number, name in enumerate(columns):
        if number in right:
            grid.add_column(name, justify="right", no_wrap=True)
        else:
            grid.add_column(name, overflow="fold")
    for row in rows:
        grid.add_row(*(cell if isinstance(cell, Text) else Text("" if cell is None else str(cell)) for cell in row))
    out = results()
    longest = [max(len(str(cell)) for cell in column) for column in zip(columns, *rows, strict=True)]
    needed = sum(width if at in right else min(width, FOLDED) for at, width in enumerate(longest))
    out.width = max(out.width, needed + GAP * len(columns))
    out.print(grid)


def facts(title: str, rows: Iterable[tuple[str, Any]]) -> None:
    """Print names and values in two columns; on a terminal long values fold under themselves."""
    out = results()
    if title:
        out.print(Text(title, style="bold"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(f"  {name}", value if isinstance(value, Text) else Text(str(value)))
    out.print(grid)


def text(title: str, content: str) -> None:
    """Print some lines under a title, as they are written."""
    out = results()
    out.print()
    out.print(Text(title, style="bold"))
    out.print(Text(content.strip("\n")), soft_wrap=True)


def size(number: float | None) -> str:
    """Bytes for people, in decimal units: `1.23 MB`."""
    if number is None:
        return "?"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 999.5:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def duration(seconds: float | None) -> str:
    """Seconds for people: `48 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def share(part: float, whole: float) -> str:
    """A percentage with three digits: `5.8%`."""
    return f"{100 * part / whole:.3g}%" if whole else "-"


def number(value: Any) -> str:
    """A figure for a table: four digits, `-` where there is none."""
    if value is None or value != value:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def version_text() -> str:
    """`fallow 0.1.0`."""
    return f"fallow {version('fallow')}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, int, bool)):
        return value
    return str(value)
