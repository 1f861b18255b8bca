"""The pages on tasks and domains, and their figures: what they show of results made by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fallow.core.errors import DataError
from fallow.report.continual import write_continual_page
from fallow.report.generalise import write_generalise_page
from fallow.report.learning_plots import course_plot, domain_bars, matrix_plot, rank_plot, seen_unseen


def figure(mean: float | None, deviation: float | None = None) -> dict[str, float | None]:
    return {"mean": mean, "deviation": deviation}


COMMON: dict[str, Any] = {
    "status": "finished", "model": "mlp", "data": "digits", "trained_where": {"device": "cpu"},
    "versions": {"torch": "2"},
}  # fmt: skip


def continual_result(label: str = "codyra", failed: str = "") -> dict[str, Any]:
    names = [
        "last",
        "average",
        "transfer",
        "new",
        "forgetting",
        "backward",
        "known_before",
        "known",
        "mean_rank",
        "chance",
    ]
    run = {
        "failed": failed, "seed": 0, "matrix": [[0.1, 0.2], [0.91, 0.3], [0.5, 0.87]], "known_each": [0.97, 0.6, 0.42],
        "ranks": [{"a": 16, "b": 3}, {"a": 12, "b": 0}], **dict.fromkeys(names, 0.5), "seconds": 3.0,
    }  # fmt: skip
    method = {
        "label": label, "method": "codyra", "options": {}, "lr": 0.01, "at_edge": True, "trained_numbers": 1234,
        "sweep": [{"lr": 0.01, "value": 0.5}, {"lr": 0.1, "value": None}], "runs": [run],
        "figures": {name: figure(0.4321, 0.0123) for name in [*names, "kept_numbers"]},
    }  # fmt: skip
    config = {"data": "digits", "steps": 300, "seeds": [0], "lrs": [0.01, 0.1], "select_by": "average"}
    return {**COMMON, "config": config, "tasks": ["one", "two"], "methods": [method]}


def test_the_page_on_tasks_shows_figures_matrices_ranks_and_what_failed(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(continual_result()))
    page = write_continual_page(tmp_path).read_text()
    assert "43.2" in page
    assert "± 1.2" in page
    assert "at the edge" in page
    assert all(f">{value}<" in page for value in ("91", "87"))  # fields of the matrix, in per cent
    assert "Rank of codyra" in page
    assert "failed</b>" not in page
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", page)
    (tmp_path / "results.json").write_text(json.dumps(continual_result("<b>x</b>", failed="the loss is nan")))
    page = write_continual_page(tmp_path).read_text()
    assert "<b>1 run failed</b>" in page
    assert "&lt;b&gt;x&lt;/b&gt;: the loss is nan" in page
    assert "Rank of" not in page


def test_ranks_that_stayed_as_they_were_are_not_drawn(tmp_path: Path) -> None:
    result = continual_result("lora")
    result["methods"][0]["runs"][0]["ranks"] = [{"a": 16, "b": 10}] * 2
    (tmp_path / "results.json").write_text(json.dumps(result))
    assert "Rank of lora" not in write_continual_page(tmp_path).read_text()


def test_the_page_on_domains_names_the_best_and_each_domain(tmp_path: Path) -> None:
    def method(label: str, unseen: float) -> dict[str, Any]:
        run = {
            "failed": "", "seed": 0, "split": ["art"], "unseen": {"art": unseen}, "seen": 0.9, "held_out": 0.9,
            "overlap": 0.1, "best_step": 50, "seconds": 1.0,
        }  # fmt: skip
        names = ("worst", "seen", "overlap", "cosine")
        return {
            "label": label, "lr": 0.01, "at_edge": False, "sweep": [], "trained_numbers": 10, "runs": [run],
            "domains": {"art": figure(unseen, 0.01)},
            "figures": {"unseen": figure(unseen), **dict.fromkeys(names, figure(0.9))},
        }  # fmt: skip

    config = {"data": "PACS", "steps": 400, "seeds": [0], "lrs": [0.01], "sources": [], "average": "swad"}
    told = {**COMMON, "config": config, "domains": ["art", "photo"], "left_out": ["art"]}
    (tmp_path / "results.json").write_text(
        json.dumps({**told, "methods": [method("pego", 0.812), method("lora", 0.6)]})
    )
    page = write_generalise_page(tmp_path).read_text()
    assert "Best on unseen domains: <b>pego</b>" in page
    assert "81.2" in page
    assert "an average (swad)" in page
    assert page.count("<svg") == 2


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    for write in (write_continual_page, write_generalise_page):
        with pytest.raises(DataError, match=r"holds no results\.json that can be read"):
            write(tmp_path)


def test_figures_show_what_they_are_given() -> None:
    drawn = matrix_plot([[0.1, 0.2], [0.9, 0.3], [0.5, 0.8]], ["one", "two"], "a method").axes[0]
    assert [text.get_text() for text in drawn.texts] == ["10", "20", "90", "30", "50", "80"]
    assert [label.get_text() for label in drawn.get_yticklabels()] == ["before", "after one", "after two"]
    bars = rank_plot([{"a": 16.0, "b": 2.0}, {"a": 8.0, "b": 0.0}], ["one", "two"], "ranks", 16).axes[0]
    assert [bar.get_width() for bar in bars.patches] == [16.0, 2.0, 8.0, 0.0]
    methods = [{"label": "m", "series": 0, "mean": {"x": 0.5, "y": None}, "deviation": {"x": None, "y": None}}]
    heights = [bar.get_height() for bar in domain_bars(methods, ["x", "y"], "t").axes[0].patches]
    assert heights[0] == 0.5
    assert heights[1] != heights[1]
    assert course_plot([{"label": "m", "series": 0, "values": [], "deviations": None}], ["one"], "t", "y") is None
    point = {"label": "m", "series": 0, "seen": 0.9, "unseen": None, "seen_spread": None, "unseen_spread": None}
    assert seen_unseen([point], "t") is None
    assert seen_unseen([{**point, "unseen": 0.8}], "t") is not None
