"""What captions say from use to use."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from fallow.recipes.captions import CaptionRules, tags_of


def many(rules: CaptionRules, caption: str, times: int = 300) -> list[str]:
    return [rules.drawn(caption, random.Random(number)) for number in range(times)]


def test_without_rules_a_caption_stays_as_it_is():
    rules = CaptionRules()
    assert not rules.random
    assert rules.drawn("a bag,  {red}", random.Random(0)) == "a bag,  {red}" == rules.plain("a bag,  {red}")


def test_shuffling_moves_all_tags_but_the_kept_ones_and_loses_none():
    rules = CaptionRules(shuffle=True, keep=2)
    found = many(rules, "sks, dog, on grass, sunny, smiling")
    assert len(set(found)) == 6
    for text in found:
        assert text.startswith("sks, dog, ")
        assert sorted(tags_of(text)) == ["dog", "on grass", "sks", "smiling", "sunny"]
    assert rules.plain("sks, dog, on grass, sunny, smiling") == "sks, dog, on grass, sunny, smiling"


def test_tags_are_dropped_as_often_as_asked_but_never_the_kept_ones():
    found = many(CaptionRules(keep=1, tag_dropout=0.3), "sks, a, b, c, d", 1000)
    counts = Counter(tag for text in found for tag in tags_of(text))
    assert counts["sks"] == 1000
    for tag in "abcd":
        assert counts[tag] == pytest.approx(700, abs=60)
    assert all(tags_of(text) == sorted(tags_of(text), key=["sks", "a", "b", "c", "d"].index) for text in found)


def test_dropping_all_tags_leaves_the_trigger_between_prefix_and_suffix():
    rules = CaptionRules(tag_dropout=1.0, trigger="sks", prefix="photo of", suffix="in style")
    assert set(many(rules, "a, b")) == {"photo of sks in style"}


def test_the_trigger_stands_in_front_and_is_not_said_twice():
    rules = CaptionRules(trigger="sks dog", shuffle=True)
    assert all(text.startswith("sks dog, ") for text in many(rules, "running, outside"))
    assert CaptionRules(trigger="sks dog").plain("a photo of sks dog") == "a photo of sks dog"
    assert CaptionRules(trigger="sks dog").plain("") == "sks dog"


def test_wildcards_draw_a_line_and_a_word_and_double_braces_stay():
    rules = CaptionRules(wildcards=True)
    found = Counter(many(rules, "a {red|blue} bag\n a {{literal}} bag", 1000))
    assert set(found) == {"a red bag", "a blue bag", "a {literal} bag"}
    assert found["a {literal} bag"] == pytest.approx(500, abs=60)
    assert rules.plain("a {red|blue} bag\na bag") == "a red bag"


def test_the_same_seed_draws_the_same_caption():
    rules = CaptionRules(shuffle=True, tag_dropout=0.5, wildcards=True)
    assert many(rules, "a, b, {c|d}, e\nf, g") == many(rules, "a, b, {c|d}, e\nf, g")
