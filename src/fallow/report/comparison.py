"""`comparison.html`: several methods on the same pictures, each at its best learning rate, side by side.

Reads only `comparison.json` and the files of the runs that it names, so that the page can be made again at any time,
and grows while the comparison is still going.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from fallow.core.errors import DataError
from fallow.report import plots
from fallow.report.page import picture_fit, picture_uri, render
from fallow.report.run import read_run

TILE = 192  # pixels of the longest side of one picture of the side-by-side rows
COLUMNS = 8  # pictures in a row

CRITERIA = {
    "anchored": "the largest sum of two shares with fixed ends: how much of the distance from the base model to the "
    "floor is gone, and text alignment as a share of that of real pictures (in a VLHI over the sweep, one diverged run "
    "would move the ends and so decide between the others)",
    "vlhi": "the largest VLHI over all runs of all sweeps",
    "frechet": "the smallest Frechet distance",
}


def strip(pictures: Sequence[Path], columns: int = COLUMNS) -> Image.Image | None:
    """The first pictures that can be read, side by side, none larger than `TILE`; None where there is none."""
    tiles = []
    for path in pictures[:columns]:
        try:
            with Image.open(path) as image:
                tile = image.convert("RGB")
        except (OSError, UnidentifiedImageError):
            continue
        tile.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
        tiles.append(tile)
    if not tiles:
        return None
    row = Image.new("RGB", (sum(tile.width for tile in tiles), max(tile.height for tile in tiles)))
    left = 0
    for tile in tiles:
        row.paste(tile, (left, 0))
        left += tile.width
    return row


def _row(label: str, folder: Path, series: int | None = None) -> dict[str, Any] | None:
    if (row := strip(sorted(folder.glob("picture-*.png")))) is None:
        return None
    return {"label": label, "uri": picture_uri(row), "fit": picture_fit(row), "series": series}


def _losses(folder: Path, methods: Sequence[dict[str, Any]]) -> list[tuple[str, int, list[int], list[float | None]]]:
    curves = []
    for method in methods:
        done = next((run for run in method["runs"] if run["status"] == "finished"), None)
        if done is not None and (folder / done["folder"]).is_dir():
            steps, values = read_run(folder / done["folder"]).series("loss")
            curves.append((str(method["label"]), int(method["series"]), steps, values))
    return curves


def _trade_offs(result: dict[str, Any]) -> list[tuple[Any, str]]:
    base = {"label": "base model", **result["base"]} if result.get("base") else None
    real = {
        "label": "real pictures", "frechet": result.get("frechet_floor"), "alignment": result.get("alignment_real"),
    }  # fmt: skip
    methods, around = result["methods"], [base] if base else []
    distance, aligned = "Frechet distance (lower is better)", "text alignment (higher is better)"
    return [
        (
            plots.trade_off(
                methods, "frechet", "alignment", title="Like the data, and true to the prompt", xlabel=distance,
                ylabel=aligned, log_x=True, references=[*around, real],
            ),
            "Frechet distance against text alignment",
        ),
        (
            plots.trade_off(
                methods, "trained_parameters", "frechet", title="What the parameters buy", xlabel="trained parameters",
                ylabel=distance, log_x=True,
            ),
            "Trained parameters against Frechet distance",
        ),
        (
            plots.trade_off(
                [_in_megabytes(method) for method in methods], "megabytes", "frechet", title="What the memory buys",
                xlabel="peak memory, MB", ylabel=distance,
            ),
            "Peak memory against Frechet distance",
        ),
        (
            plots.trade_off(
                methods, "seconds_per_step", "frechet", title="What the time buys", xlabel="seconds for a step",
                ylabel=distance,
            ),
            "Seconds for a step against Frechet distance",
        ),
        (
            plots.trade_off(
                methods, "frechet", "prior_frechet", title="Learning and forgetting", xlabel=distance,
                ylabel="drift on the base model's own prompts", log_x=True, references=around,
            ),
            "Frechet distance against prior preservation",
        ),
    ]  # fmt: skip


def _in_megabytes(method: dict[str, Any]) -> dict[str, Any]:
    peak = method.get("peak_memory_bytes")
    return {**method, "megabytes": None if peak is None else peak / 1e6}


def _sweeps(methods: Sequence[dict[str, Any]]) -> list[tuple[Any, str]]:
    """Distance and alignment over the learning rates, of the methods that tried more than one."""
    sweeps = {m["label"]: (m["series"], m["sweep"]) for m in methods if len({run["lr"] for run in m["sweep"]}) > 1}
    return [
        (plots.sweep_plot(sweeps, "frechet", "Frechet distance"), "Frechet distance over the learning rates"),
        (plots.sweep_plot(sweeps, "alignment", "text alignment"), "Text alignment over the learning rates"),
    ]


def _rank(method: dict[str, Any]) -> tuple[float, float]:
    """The order of the table: by VLHI, then by Frechet distance, those without figures last."""
    score, distance = method["vlhi"], method["frechet"]
    return (-score if score is not None else math.inf, distance if distance is not None else math.inf)


def write_comparison_page(folder: str | Path) -> Path:
    """Write `comparison.html` beside the `comparison.json` in `folder` and return its path.

    Raises DataError where there is no comparison that can be read.
    """
    folder = Path(folder)
    try:
        result = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} holds no comparison.json that can be read ({error}); give a folder of fallow compare"
        ) from error
    methods = result["methods"]
    ranked = sorted(methods, key=_rank)
    drawn = [
        _row("Real pictures", folder / "real"),
        _row("Base model", folder / "base"),
        *(_row(m["label"], folder / m["runs"][0]["folder"] / "evaluation", m["series"]) for m in ranked if m["runs"]),
    ]
    figures = [
        (plots.score_bars(methods), "VLHI of each method"),
        *_trade_offs(result),
        *_sweeps(methods),
        (plots.loss_curves(_losses(folder, methods)), "Loss of each method"),
    ]
    return render(
        "comparison.html",
        folder / "comparison.html",
        title=f"Comparison on {Path(str(result['config']['data'])).name}",
        folder=folder.resolve().name,
        result=result,
        config=result["config"],
        methods=ranked,
        best=ranked[0]["label"] if ranked and ranked[0]["vlhi"] is not None and len(ranked) > 1 else None,
        rows=[row for row in drawn if row],
        prompts=result.get("prompts", [])[:COLUMNS],
        plots=[plots.inline_svg(figure, label) for figure, label in figures if figure is not None],
        criterion=CRITERIA[result["config"]["select_by"]],
        failures=[(m["label"], run) for m in methods for run in _attempts(m) if run["status"] == "failed"],
    )


def _attempts(method: dict[str, Any]) -> list[dict[str, Any]]:
    """Every run of a method once: the sweep, then the seeds that it did not hold."""
    seen = {run["folder"]: run for run in [*method["sweep"], *method["runs"]]}
    return list(seen.values())
