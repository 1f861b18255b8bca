"""The method that CONTRIBUTING.md shows is one: its very text is run, registered and held to the contract."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("contract_checks")

from contract_checks import CHECKS, SUBJECTS, subject  # noqa: E402

import fallow  # noqa: E402
from fallow import catalogue  # noqa: E402

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture
def card(tmp_path, monkeypatch):
    """The card that the module registers; the catalogue is as before afterwards."""
    (block,) = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "balanced.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(catalogue, "_CARDS", dict(catalogue._CARDS))
    monkeypatch.delitem(sys.modules, "balanced", raising=False)
    importlib.import_module("balanced")
    yield catalogue.card("balanced")
    sys.modules.pop("balanced", None)


def test_the_method_is_listed_and_trains_the_same_share_of_every_layer(card, mlp):
    assert card in fallow.methods()
    optimizer = card.load()(mlp(), density=0.1)
    assert {name: k for name, (k, _) in optimizer.selected().items()} == {
        name: round(0.1 * n) for name, (_, n) in optimizer.selected().items()
    }
    for slot in optimizer.slots.values():
        size = slot.weight.detach().abs().reshape(-1)
        rest = size.clone()
        rest[slot.index.long()] = float("inf")
        assert size[slot.index.long()].max() <= rest.min()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", ["linear", "conv", "transformer"])
def test_the_method_keeps_the_contract(card, kind, check, request, tmp_path):
    assert kind in SUBJECTS
    check(card.load(), subject(kind, request.getfixturevalue), tmp_path)
