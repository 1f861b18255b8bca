"""What `benchmarks/deltas.py` found of a method, as a table; nothing where it was not run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
NETWORKS = {
    "transformer": "ViT, float32",
    "transformer-bf16": "ViT, bfloat16",
    "unet": "UNet, float32",
}
HEAD = [
    "| network | options | layers | trained | against | its trained | time | peak memory |",
    "| --- | --- | --- | ---: | --- | ---: | ---: | ---: |",
]


def measured(slug: str, results: Path = RESULTS) -> list[str]:
    """Lines of Markdown: a step's time and memory as shares of those of others; [] without figures of the method."""
    runs = [run for run in _runs(results) if any(case["method"] == slug for case in run["cases"])]
    rows = [row for run in runs for case in run["cases"] if case["method"] == slug for row in _rows(run, case)]
    if not rows:
        return []
    hardware = sorted({f"{run['hardware']}, threads used: {run['threads']}" for run in runs})
    told = (
        f"A forward and backward pass, as shares of the other's ({'; '.join(hardware)}): the median ratio of processor "
        "time over several turns, and the most bytes alive beyond the base's weights. The ViT has 6 layers of width "
        "768 and 257 tokens, the UNet 35 million weights (`benchmarks/deltas.py`)."
    )
    return ["", "### Measured", "", told, "", *HEAD, *rows]


def _runs(results: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(results.glob("deltas-*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if run.get("model") in NETWORKS and "cases" in run:
            yield run


def _rows(run: dict[str, Any], case: dict[str, Any]) -> Iterator[str]:
    if "refused" in case:
        return
    options = ", ".join(f"{name}={value!r}" for name, value in case["options"].items())
    layers = f"{case['layers']} linear and convolutions" if case["convolutions"] else f"{case['layers']} linear"
    first = [NETWORKS[run["model"]], f"`{options}`" if options else "defaults", layers, f"{case['trained']:,}"]
    for other in case["against"]:
        figures = [other["name"], f"{other['trained']:,}", f"{other['time_ratio']:.2f}", f"{other['peak_ratio']:.2f}"]
        yield f"| {' | '.join([*first, *figures])} |"
        first = ["", "", "", ""]
