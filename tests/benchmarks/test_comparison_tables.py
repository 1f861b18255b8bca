"""The tables of the page on time and memory."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
if str(DOCS) not in sys.path:
    sys.path.append(str(DOCS))
tables = importlib.import_module("comparison_tables")

RUN = {
    "hardware": "a machine, 2 cores", "versions": {"torch": "2.13"}, "threads": 1, "model": "unet",
    "cases": [
        {
            "variant": "kasa", "method": "kasa", "layers": 36,
            "convolutions": False, "trained": 663840, "load": 2.0, "each": [1.0, 1.1],
            "against": [
                {"kind": "lora", "name": "PEFT LoRA r=8", "trained": 663552, "time_ratio": 0.987, "peak_ratio": 1.123},
                {"kind": "own", "name": "PEFT KaSA", "trained": 663840, "time_ratio": 0.961, "peak_ratio": 0.5},
            ],
        },
        {"variant": "wara", "method": "wara", "refused": "rank=8 is above 4"},
    ],
}  # fmt: skip


def test_a_table_has_the_ratios_of_its_file_and_what_was_refused(tmp_path):
    (tmp_path / "deltas-unet-x.json").write_text(json.dumps(RUN))
    page = tables.filled("before\n<!-- figures: unet -->\nafter", tmp_path)
    assert "| kasa | 36 | 663,840 | 8 | 663,552 | 0.99 | 1.12 | 0.96 | 0.50 |\n" in page
    assert "| wara | refused: rank=8 is above 4 |" in page
    left = page.partition("Not measured on this network yet: ")[2]
    assert "bone, " in left
    assert "kasa" not in left
    assert "2 turns or more, while the machine did other things (load 2 to 2)" in page


def test_a_table_without_a_file_says_so(tmp_path):
    assert tables.filled("<!-- figures: unet -->", tmp_path) == "These figures were not taken."


def test_two_threads_have_columns_where_they_were_measured(tmp_path):
    row = {"variant": "kasa", "load": 1.0, "threads 1": {"ours": {"processor": 2.04}, "peft": {"processor": 3.28}}}
    run = {"hardware": "a machine", "repeats": 2, "attaching": [row]}
    place = tmp_path / "deltas-setup-x.json"
    place.write_text(json.dumps(run))
    assert list(tables.setting_up(tmp_path))[-1] == "| kasa | 2.04 | 3.28 |"
    row["threads 2"] = {"ours": {"processor": 2.5, "wall": 1.3}}
    place.write_text(json.dumps(run))
    assert list(tables.setting_up(tmp_path))[-1] == "| kasa | 2.04 | 3.28 | 2.50 | 1.30 |"


def test_every_mark_of_the_page_is_filled_from_the_results_that_are_there():
    page = (DOCS / "benchmarks" / "deltas.md").read_text(encoding="utf-8")
    assert all(f"<!-- figures: {name} -->" in page for name in tables.MAKERS)
    made = tables.filled(page)
    assert "<!--" not in made
    rows = [line for line in made.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
    for name in tables.NETWORKS:
        for case in tables._found(tables.RESULTS, "deltas-", name).get("cases", []):
            assert any(row.startswith(f"| {case['variant']} |") for row in rows)
    assert any(row.startswith("| kasa | ") for row in rows)
