"""The documentation's page of capabilities holds the whole matrix, and each error once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fallow import catalogue
from fallow.catalogue.capability import COLUMNS, capabilities, probed

sys.path.append(str(Path(__file__).parents[2] / "docs"))

import capability_page


@pytest.fixture
def page() -> str:
    return capability_page.capability_page()


def test_every_method_has_a_row_in_every_table_and_every_column_is_explained(page):
    for slug in probed():
        assert page.count(f"]({slug}.md) | ") == len(capability_page.HEADS)
    for column in COLUMNS.values():
        assert f"- **{column.title}**: {column.meaning}" in page
    for line in page.splitlines():
        if line.startswith("| ["):
            assert set(line.split(" | ")[1:]) <= {"✓", "✗", "–", "✓ |", "✗ |", "– |", *_words(line)}


def _words(line: str) -> list[str]:
    return [cell for cell in line.split(" | ") if cell.startswith(("attach", "PEFT", "in place", "rank "))]


def test_a_mark_says_which_host_can():
    lora = capabilities("lora")
    assert capability_page.mark(COLUMNS["merge"], "lora", lora["merge"]) == "✓"
    assert capability_page.mark(COLUMNS["sum"], "lora", lora["sum"]) == "PEFT"
    assert capability_page.mark(COLUMNS["lora"], "lora", lora["lora"]).startswith("rank 2 of")
    sara = capabilities("sara")
    assert capability_page.mark(COLUMNS["nf4"], "sara", sara["nf4"]) == "in place"
    smora = capabilities("smora")
    assert capability_page.mark(COLUMNS["merge"], "smora", smora["merge"]) == "✗"


def test_an_error_stands_once_with_all_methods_that_say_it(page):
    said = "acts on a layer's input and output; it has no weight and cannot merge"
    merging = page.split("\n**merge**\n")[1].split("\n**unmerge")[0]
    assert merging.count(said) == 1
    assert f"- smora, wara-spatial, PEFT: 'METHOD' {said}" in merging
    deltas = [slug for slug in probed() if catalogue.card(slug).idea == "delta"]
    assert capability_page.among(deltas) == "all weight parameterizations"
