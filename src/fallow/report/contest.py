"""The page of a job in which methods are set against each other, in what such pages have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fallow.core.errors import DataError
from fallow.core.files import read_json
from fallow.report import plots
from fallow.report.page import render

Methods = list[dict[str, Any]]


def write_contest_page(
    folder: str | Path, template: str, topic: str, told: Callable[[dict[str, Any], Methods], dict[str, Any]]
) -> Path:
    """Write `report.html` beside the `results.json` in `folder`; returns its path. DataError where there is none.

    `told(results, methods)`: `figures`, (figure or None, label) each, and what else the template asks for.
    """
    folder = Path(folder)
    try:
        result = read_json(folder / "results.json")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no results.json that can be read ({error}); give a folder of a job") from error
    methods = [{**method, "series": number} for number, method in enumerate(result["methods"])]
    given = told(result, methods)
    figures = given.pop("figures")
    return render(
        template,
        folder / "report.html",
        title=f"{topic}: {Path(str(result['config']['data'])).name}",
        folder=folder.resolve().name,
        result=result,
        config=result["config"],
        methods=methods,
        plots=[plots.inline_svg(figure, label) for figure, label in figures if figure is not None],
        failures=[(m["label"], run["failed"]) for m in methods for run in m["runs"] if run["failed"]],
        **given,
    )
