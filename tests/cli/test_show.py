"""How results look where no terminal is."""

from __future__ import annotations

from fallow.cli import show


def test_nothing_is_folded_in_a_file_or_a_pipe(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    long = "runs/" + 40 * "a long name " + "/adapter"
    show.facts("a run", [("adapter", long), ("size", "3 kB")])
    show.table("", ["tensor", "differ"], [(long, 3), ("short", 4)], right=[1])
    lines = capsys.readouterr().out.splitlines()
    assert sum(long in line for line in lines) == 2
    assert max(map(len, lines)) < len(long) + 40


def test_figures_are_never_cut_and_names_never_vanish(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    figures = [f"{number}.0001234" for number in range(8)]
    show.table("", ["method", *(f"figure {number}" for number in range(8))], [("sara", *figures)], right=range(1, 9))
    line = next(line for line in capsys.readouterr().out.splitlines() if "sara" in line)
    assert line.split() == ["sara", *figures]


def test_a_width_that_is_asked_for_is_kept(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    show.facts("", [("adapter", 100 * "x")])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 40
