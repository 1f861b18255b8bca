"""`report.html` of a sequence of tasks: accuracies after each, what is kept of what was known, where the rank went.

Reads only the `results.json` of the folder, so that the page can be made again at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fallow.report.contest import write_contest_page
from fallow.report.learning_plots import course_plot, matrix_plot, rank_plot

SHOWN = 24  # weights whose ranks are drawn; of more, the first


def write_continual_page(folder: str | Path) -> Path:
    """Write `report.html` beside the `results.json` in `folder`; returns its path. DataError where there is none."""
    return write_contest_page(
        folder, "continual.html", "One task after another", lambda result, told: {"figures": _figures(result, told)}
    )


def _figures(result: dict[str, Any], methods: Sequence[dict[str, Any]]) -> list[tuple[Any, str]]:
    tasks = result["tasks"]
    done = {method["label"]: [run for run in method["runs"] if not run["failed"]] for method in methods}
    told = [method for method in methods if done[method["label"]]]
    drawn: list[tuple[Any, str]] = [
        (
            course_plot(
                [_course(m, [run["known_each"] for run in done[m["label"]]]) for m in told],
                tasks, "What it knew before", "accuracy on what was known",
            ),
            "Accuracy on what was known before, after each task",
        ),
        (
            course_plot(
                [_course(m, [[fmean(row) for row in run["matrix"]] for run in done[m["label"]]]) for m in told],
                tasks, "All tasks, learned or not", "mean accuracy on all tasks",
            ),
            "Mean accuracy on all tasks, after each task",
        ),
    ]  # fmt: skip
    for method in told:
        matrices = [run["matrix"] for run in done[method["label"]]]
        drawn.append((matrix_plot(_mean(matrices), tasks, method["label"]), f"Accuracies of {method['label']}"))
    for method in told:
        runs = done[method["label"]]
        if any(one != runs[0]["ranks"][0] for run in runs for one in run["ranks"]):  # gates fell
            names = list(runs[0]["ranks"][0])[:SHOWN]
            ranks = [
                {name: fmean(run["ranks"][at][name] for run in runs) for name in names} for at in range(len(tasks))
            ]
            most = max(method["options"].get("rank", 16), *(round(v) for one in ranks for v in one.values()))
            drawn.append((rank_plot(ranks, tasks, f"Rank of {method['label']}", most), f"Ranks of {method['label']}"))
    return drawn


def _mean(matrices: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    return [[fmean(values) for values in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def _course(method: dict[str, Any], runs: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    steps: list[list[float]] = [[value for value in step if value is not None] for step in zip(*runs, strict=True)]
    told = all(steps)
    return {
        "label": method["label"], "series": method["series"], "values": [fmean(step) for step in steps] if told else [],
        "deviations": [stdev(step) for step in steps] if told and len(runs) > 1 else None,
    }  # fmt: skip
