"""`fallow methods` shows the capability matrix: a line for each method, or every column of one, with the reasons."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fallow.catalogue.capability import COLUMNS, capabilities, probed
from fallow.cli import app


@pytest.fixture
def say(monkeypatch):
    """Runs `fallow methods ...` on a wide terminal; gives what it printed."""
    monkeypatch.setenv("COLUMNS", "250")

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, ["methods", *words])
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def test_a_line_for_each_probed_method_tells_what_neither_host_takes(say):
    lines = {line.split()[0]: line for line in say("--capabilities").splitlines() if line.split()[:1]}
    assert set(probed()) <= set(lines)
    assert "rank 2 of 24, its own factors" in lines["lora"]
    assert lines["lora"].count("all") == 4
    assert "not merge, unmerge bit for bit" in lines["smora"]
    assert "not Embedding, MultiheadAttention" in lines["smora"]


def test_a_method_is_shown_with_every_column_and_the_error_behind_each_no(say):
    text = say("smora")
    assert text.index("what it does") < text.index("what it can do, as tried")
    for column in COLUMNS.values():
        assert f" {column.title} " in text
    assert "'smora' acts on a layer's input and output; it has no weight and cannot merge" in " ".join(text.split())
    row = next(line.split() for line in text.splitlines() if line.split()[:2] == ["use", "merge"])
    assert row[2:4] == ["no", "no"]
    assert "in place" in say("sara", "--capabilities")
    assert "what it does" not in say("sara", "--capabilities")
    assert "what it can do" not in say("galore")


def test_json_has_the_matrix_by_column_and_host(say):
    rows = {card["slug"]: card["capabilities"] for card in json.loads(say("--json"))}
    assert {slug for slug, row in rows.items() if row} == set(probed())
    for slug in probed():
        assert rows[slug] == {
            key: {host: str(cell) for host, cell in cells.items()} for key, cells in capabilities(slug).items()
        }


def test_a_method_that_was_not_tried_is_said_to_be_so():
    result = CliRunner().invoke(app, ["methods", "galore", "--capabilities"])
    assert result.exit_code == 2
    assert "'galore' was not tried" in result.stderr
