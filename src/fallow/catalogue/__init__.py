"""The catalogue: one card for each method, those that work and those that are planned.

    catalogue.methods()            # all cards, the ready ones first
    catalogue.card("sara").load()  # the class fallow.SaRA

A card says what a method is for, which paper it comes from, what that paper claims and which test holds us to it. The
command line, the documentation and the contract tests are made from the cards, so a method is listed, documented and
tested once its card is here: a file `cards/<slug>.toml`, whose keys are the fields of `Card`. Nothing but the standard
library is imported, and no method before `load()`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib import resources

from fallow.catalogue.entry import Card
from fallow.catalogue.planned import PLANNED
from fallow.core.errors import ConfigError, nearest

__all__ = ["Card", "card", "methods", "register"]


def methods() -> list[Card]:
    """All cards: the ready ones first, each group in alphabetical order of the slugs."""
    return sorted(_CARDS.values(), key=lambda card: (not card.ready, card.slug))


def card(slug: str) -> Card:
    """The card of a method. ConfigError with the nearest name where there is none."""
    if slug not in _CARDS:
        raise ConfigError(f"there is no method '{slug}'{nearest(slug, _CARDS)}; `fallow methods` lists all")
    return _CARDS[slug]


def register(card: Card) -> Card:
    """Add a method of your own; it is then listed and contract-tested like the others. Returns the card.

    ConfigError where the slug is taken by another card.
    """
    if _CARDS.setdefault(card.slug, card) != card:
        raise ConfigError(f"the slug '{card.slug}' is taken by \"{_CARDS[card.slug].title}\"; choose another")
    return card


def _ready() -> Iterator[Card]:
    for file in (resources.files(__package__) / "cards").iterdir():
        if file.name.endswith(".toml"):
            yield Card(slug=file.name.removesuffix(".toml"), status="ready", **tomllib.loads(file.read_text("utf-8")))


_CARDS = {card.slug: card for card in (*(Card(*facts) for facts in PLANNED), *_ready())}
