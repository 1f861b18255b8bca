"""The capability matrix is true: what it says is tried again, and every method and every column stands in it."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest

pytest.register_assert_rewrite("contract_checks", "delta_checks", "capability_probes", "entries_probes")

from capability_probes import PROBES  # noqa: E402
from capability_table import differences, subjects, try_out  # noqa: E402
from delta_checks import LAYERS  # noqa: E402

from fallow.catalogue import methods  # noqa: E402
from fallow.catalogue.capability import COLUMNS, Cell, capabilities, probed  # noqa: E402
from fallow.core.delta import Delta  # noqa: E402
from fallow.core.errors import ConfigError  # noqa: E402

AGAIN = "run scripts/probe_capabilities.py, and look at what has changed"
SLOW = {"train": 0, "compile": 6}  # columns of seconds: of so many methods, one after the other; the script tries all
SHARE = (
    4  # of the quick cells one in so many is tried: each method in a quarter of the columns, each column in a quarter
)


def stored() -> dict[str, Any]:
    return json.loads((resources.files("fallow.catalogue") / "capabilities.json").read_text("utf-8"))


def columns_of(number: int, slug: str) -> list[str]:
    """Another quarter of the columns for each method, and the slow ones for few."""
    quick = [key for at, key in enumerate(key for key in COLUMNS if key not in SLOW) if (at + number) % SHARE == 0]
    count = len(subjects())
    slow = [key for key, few in SLOW.items() if few and number % (count // few) == 0]
    return [*quick, *slow]


def settled(told: str | dict[str, str]) -> dict[str, str]:
    """A cell by host, without the words of an error, which may be put better without a new matrix."""
    cells = told if isinstance(told, dict) else dict.fromkeys(("own", "peft"), told)
    return {host: text if text.startswith("yes") else Cell.read(text).answer for host, text in cells.items()}


@pytest.mark.parametrize(("number", "slug"), list(enumerate(subjects())))
def test_the_matrix_says_what_trying_says(number, slug):
    told = {slug: {key: settled(cell) for key, cell in stored().get(slug, {}).items()}}
    tried = {slug: {key: settled(cell) for key, cell in try_out(slug, columns_of(number, slug)).items()}}
    assert not differences(told, tried), AGAIN


def test_every_method_with_a_class_and_every_column_stands_in_the_matrix():
    ready = {card.slug for card in methods() if card.ready and card.idea in ("selection", "delta") and card.home}
    assert set(probed()) == set(subjects()) == ready, AGAIN
    assert set(PROBES) == set(COLUMNS)
    assert set(LAYERS) <= set(COLUMNS)
    for slug in probed():
        assert list(capabilities(slug)) == list(COLUMNS), AGAIN
    covered = {(slug, key) for number, slug in enumerate(subjects()) for key in columns_of(number, slug)}
    assert {key for _, key in covered} == set(COLUMNS) - {"train"}


@pytest.mark.parametrize("slug", [slug for slug, (method, _) in subjects().items() if isinstance(method, type)])
def test_what_a_weight_parameterization_declares_is_what_it_does(slug):
    method: type[Delta] = subjects()[slug][0]
    cells = capabilities(slug)
    for kind, (view, *_) in LAYERS.items():
        wanted = "yes" if view in method.supports else "no"
        assert {cell.answer for cell in cells[kind].values()} == {wanted}, kind
    merges = "no" if method.mode == "output" else "yes"
    for key in ("merge", "unmerge", "lora"):
        assert {cell.answer for cell in cells[key].values()} == {merges}, key
    if method.exact:
        assert "its own factors" in cells["lora"]["own"].note


def test_every_refusal_tells_why():
    for slug in probed():
        for key, cells in capabilities(slug).items():
            for host, cell in cells.items():
                assert cell.answer == "yes" or len(cell.note.split()) >= 4, (slug, key, host)


def test_a_cell_is_read_as_it_is_written_and_nothing_else():
    for text in ("yes", "yes: rank 2 of 24", "no: 'x' cannot: because", "n/a: why"):
        assert str(Cell.read(text)) == text
    assert Cell.read("no: a: b") == Cell("no", "a: b")
    with pytest.raises(ConfigError, match="'maybe', which is no answer"):
        Cell.read("maybe")
