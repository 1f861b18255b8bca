"""`report.html` of an unlearning run: what the model knew of the texts before and after, and how it got there.

Reads run.json, metrics.jsonl and config.toml of the run directory alone, so the page can be made again at any time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from fallow.core.errors import DataError
from fallow.report import plots
from fallow.report.page import render
from fallow.report.plots import SERIES, canvas

ROWS = (
    ("forget", "accuracy", "memorisation accuracy of what is forgotten", "lower is better"),
    ("forget", "extraction", "its extraction likelihood", "lower is better"),
    ("forget", "perplexity", "its perplexity", "far above the reference's it stands out"),
    ("retain", "accuracy", "memorisation accuracy of what is kept", "higher is better"),
    ("retain", "perplexity", "its perplexity", "lower is better"),
)


def json_lines(lines: Sequence[dict[str, Any]]) -> str:
    """One JSON object on each line."""
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_unlearning_report(folder: str | Path) -> Path:
    """Write `report.html` into the run directory and return its path. DataError where it is none."""
    folder = Path(folder)
    try:
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        before, methods = info["before"], info["methods"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} is no unlearning run that was measured ({error}); give its directory") from None
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    except OSError:
        lines = []
    reference = info.get("reference") or {}
    rows = [
        (label, before[part].get(name), [each["after"][part].get(name) for each in methods], reference.get(name), aim)
        for part, name, label, aim in ROWS
        if before[part].get(name) is not None
    ]
    curves = [_curve(lines, "forget", "Loss on what is forgotten"), _curve(lines, "retain", "Loss on what is kept")]
    config = folder / "config.toml"
    return render(
        "unlearning.html",
        folder / "report.html",
        title=f"{info['method']}: forgetting {Path(info['forget']).name}",
        folder=folder.resolve().name,
        info=info,
        methods=methods,
        rows=rows,
        has_reference=bool(reference),
        curves=[plots.inline_svg(figure, label) for figure, label in curves if figure is not None],
        config=config.read_text(encoding="utf-8") if config.exists() else "",
    )


@rc_context(plots._STYLE)
def _curve(lines: Sequence[dict[str, Any]], name: str, title: str) -> tuple[Any, str]:
    """One line for each method; nothing where none logged it."""
    methods = list(dict.fromkeys(line["method"] for line in lines if name in line))
    if not methods:
        return None, title
    figure, axes = canvas()
    for series, method in enumerate(methods):
        told = [(line["step"], line[name]) for line in lines if line["method"] == method and name in line]
        axes.plot(*zip(*told, strict=True), color=SERIES[series % len(SERIES)], label=method)
    axes.set(title=title, xlabel="update", ylabel="loss")
    axes.legend(loc="best")
    return figure, title
