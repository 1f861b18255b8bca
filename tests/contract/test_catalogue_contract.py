"""Every ready selective method of the catalogue, on every kind of network, keeps every point of the contract."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.register_assert_rewrite("contract_checks")

from contract_checks import CHECKS, SUBJECTS, subject  # noqa: E402

import fallow  # noqa: E402
from fallow.catalogue import methods  # noqa: E402

SELECTIVE = [card for card in methods() if card.ready and card.idea == "selection"]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", SUBJECTS)
@pytest.mark.parametrize("card", SELECTIVE, ids=lambda card: card.slug)
def test_a_selective_method(card, kind, check, request, tmp_path: Path):
    check(card.load(), subject(kind, request.getfixturevalue), tmp_path)


def test_every_selective_class_with_a_public_name_has_a_card():
    classes = {
        name
        for name in fallow.__all__
        if isinstance(value := getattr(fallow, name), type) and issubclass(value, fallow.Selective)
    }
    assert classes - {"Selective"} == {card.name for card in SELECTIVE}
