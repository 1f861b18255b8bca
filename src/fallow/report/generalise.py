"""`report.html` of domain generalisation: accuracy on each domain that was left out, and what it cost on those seen.

Reads only the `results.json` of the folder, so that the page can be made again at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fallow.report.contest import Methods, write_contest_page
from fallow.report.learning_plots import domain_bars, seen_unseen


def write_generalise_page(folder: str | Path) -> Path:
    """Write `report.html` beside the `results.json` in `folder`; returns its path. DataError where there is none."""
    return write_contest_page(folder, "generalise.html", "Domains never seen", _told)


def _told(result: dict[str, Any], methods: Methods) -> dict[str, Any]:
    told = [method for method in methods if method["figures"]["unseen"]["mean"] is not None]
    best = max(told, key=lambda method: float(method["figures"]["unseen"]["mean"]), default=None)
    return {
        "best": best["label"] if best is not None and len(told) > 1 else None,
        "figures": _figures(result, told),
    }


def _figures(result: dict[str, Any], methods: Sequence[dict[str, Any]]) -> list[tuple[Any, str]]:
    if not methods:
        return []
    bars = [
        {
            "label": method["label"], "series": method["series"],
            "mean": {name: method["domains"][name]["mean"] for name in result["left_out"]},
            "deviation": {name: method["domains"][name]["deviation"] for name in result["left_out"]},
        }
        for method in methods
    ]  # fmt: skip
    points = [
        {
            "label": method["label"], "series": method["series"],
            "seen": method["figures"]["seen"]["mean"], "seen_spread": method["figures"]["seen"]["deviation"],
            "unseen": method["figures"]["unseen"]["mean"], "unseen_spread": method["figures"]["unseen"]["deviation"],
        }
        for method in methods
    ]  # fmt: skip
    return [
        (domain_bars(bars, result["left_out"], "Accuracy where it was not trained"), "Accuracy on each unseen domain"),
        (seen_unseen(points, "What was learned, and how far it reaches"), "Unseen over seen accuracy of each method"),
    ]
