"""`fallow methods` lists the catalogue and shows one card; `fallow doctor --json` is one JSON document."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import fallow
from fallow import catalogue
from fallow.catalogue import Card
from fallow.cli import app
from fallow.core.errors import ConfigError

READY = {"sara", "shira", "lt-sft", "largest", "random", "lora", "peft", "full"}


@pytest.fixture
def say(monkeypatch):
    """Runs `fallow methods ...` on a wide terminal; gives what it printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, ["methods", *words])
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def test_the_list_names_every_method_once_with_the_ready_ones_on_top(say):
    lines = [line.split() for line in say().splitlines() if {"ready", "planned"} & set(line.split()[1:2])]
    assert len(lines) == len(catalogue.methods()) >= 64
    states = [words[1] for words in lines]
    assert states == sorted(states, reverse=True)
    assert {words[0] for words in lines if words[1] == "ready"} >= READY


def test_a_card_in_full_names_paper_class_defaults_claim_and_test(say):
    text = say("shira")
    for part in ("Sparse High Rank Adapters", "arxiv.org/abs/2406.13175", "fallow.SHiRA", "density=0.02", "test_shira"):
        assert part in text
    assert "fallow train" not in say("galore")


def test_a_weight_parameterization_is_shown_with_its_ways_of_use_its_options_and_what_was_measured(say):
    text = say("bone")
    for part in (
        'fallow.attach(model, "bone")',
        'get_peft_model(model, fallow.BoneConfig(target_modules="all-linear"))',
        "fallow train --method bone",
        'q of "mini", which divides the outputs.',
        "y = x Wᵀ + b + S D",
        "when to use it",
        "what we measured",
        *(
            line
            for field in ("equation", "when", "cost", "found")
            for line in getattr(catalogue.card("bone"), field).split()
        ),
    ):
        assert part in text, part
    assert "fallow train --method smora" not in say("smora")
    assert "not by fallow train: it acts on a layer's inputs" in say("smora")


def test_json_gives_all_cards_or_one(say):
    cards = json.loads(say("--json"))
    assert [card["slug"] for card in cards] == [card.slug for card in fallow.methods()]
    told = json.loads(say("sara", "--json"))
    assert told.pop("capabilities")["merge"]["peft"] == "yes"
    assert told == catalogue.card("sara").as_dict()


def test_an_unknown_method_is_the_users_mistake_and_the_nearest_is_named():
    result = CliRunner().invoke(app, ["methods", "shirra"])
    assert result.exit_code == 2
    assert "there is no method 'shirra' (did you mean 'shira'?)" in result.stderr


def test_no_system_is_missing_and_the_tests_that_cards_name_exist(request):
    cards = fallow.methods()
    assert len({card.slug for card in cards}) == len(cards)
    assert {card.slug for card in cards if card.ready} >= READY
    assert len({card.slug for card in cards} - READY) >= 56
    for card in cards:
        assert card.purpose
        assert card.title
        assert not card.purpose.endswith(".")
        assert not card.arxiv or card.link == f"https://arxiv.org/abs/{card.arxiv}"
        if card.home:
            assert card.load() is getattr(fallow, card.name)
        else:
            with pytest.raises(ConfigError, match="has no class to load"):
                card.load()
        for path in filter(None, card.tested.split(", ")):
            assert (request.config.rootpath / path).exists(), path


def test_the_recipe_trains_with_ready_methods_and_with_every_selection_among_them():
    from fallow.recipes.methods import METHODS

    ready = [card for card in catalogue.methods() if card.ready]
    assert {card.slug for card in ready if card.idea == "selection"} <= set(METHODS) <= {card.slug for card in ready}


def test_a_card_is_checked_when_it_is_made_and_a_slug_is_given_once(monkeypatch):
    with pytest.raises(ConfigError, match=r"idea='selektion' does not exist \(did you mean 'selection'"):
        Card("x", "X", "", "selektion", "does x")
    with pytest.raises(ConfigError, match="card 'x' is ready but lacks claim= or tested="):
        Card("x", "X", "", "selection", "does x", "ready")
    monkeypatch.setattr(catalogue, "_CARDS", dict(catalogue._CARDS))
    mine = catalogue.register(Card("x", "X", "", "selection", "does x"))
    assert catalogue.register(mine) is catalogue.card("x")
    with pytest.raises(ConfigError, match="the slug 'x' is taken by \"X\""):
        catalogue.register(Card("x", "Another", "", "selection", "does y"))


def test_the_catalogue_imports_nothing_heavy():
    code = "import sys, fallow; fallow.methods(); print({'torch', 'numpy', 'pydantic', 'rich'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout.strip() == "set()"


def test_doctor_prints_one_json_document_and_finds_what_is_installed(tmp_path):
    result = CliRunner().invoke(app, ["doctor", "--json", "--output", str(tmp_path)])
    found = json.loads(result.stdout)
    assert result.exit_code == (0 if found["ok"] else 1)
    torch = next(finding for finding in found["findings"] if finding["name"] == "torch")
    assert torch["state"] == "ok"
    assert torch["value"].startswith("2.")
    assert found["memory"] == []
