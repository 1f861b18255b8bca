"""What the papers of the low-rank optimizers claim, on the digits: the figures of their specifications, two seeds."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from digits_protocol import loss_after

from fallow.optim.apollo import APOLLO, APOLLOMini
from fallow.optim.dct_adamw import DCTAdamW
from fallow.optim.fira import Fira
from fallow.optim.frugal import FRUGAL
from fallow.optim.galore import GaLore
from fallow.optim.lowrank import LowRank
from fallow.optim.q_galore import QGaLore

SEEDS = 2
COLUMNS = (("basis", "coordinates"), ("side", "right"))


@lru_cache
def adamw(frozen: bool = False) -> float:
    def make(projected, rest):
        return torch.optim.AdamW(rest if frozen else projected + rest, 1e-3, weight_decay=0)

    return loss_after(make, SEEDS)


@lru_cache
def loss(kind: type[LowRank], *options: tuple[str, Any]) -> float:
    given = {"lr": 1e-3, "refresh_every": 50, **dict(options)}
    return loss_after(lambda p, rest: kind([{"params": p}, {"params": rest, "rank": None}], **given), SEEDS)


def test_a_larger_rank_of_galore_comes_closer_to_adamw():
    eight, two = (loss(GaLore, ("rank", r), ("scale", 1.0)) for r in (8, 2))
    assert adamw() < 0.15 < eight < 0.36 < two < 1.1 < adamw(frozen=True)


def test_fira_learns_more_than_galore_most_at_the_smallest_rank():
    eight, two = (loss(Fira, ("rank", r), ("scale", 1.0)) for r in (8, 2))
    assert two < 0.45
    assert eight < 0.28
    assert loss(GaLore, ("rank", 2), ("scale", 1.0)) - two > loss(GaLore, ("rank", 8), ("scale", 1.0)) - eight > 0.02


def test_four_and_eight_bits_learn_as_well():
    quantized = loss(QGaLore, ("rank", 8), ("scale", 1.0))
    assert abs(quantized - loss(GaLore, ("rank", 8), ("scale", 1.0))) < 0.05


def test_the_part_without_states_is_what_counts_in_frugal():
    some = loss(FRUGAL, ("rank", 0.25), *COLUMNS)
    few = loss(FRUGAL, ("rank", 0.03), *COLUMNS)
    few_alone = loss(FRUGAL, ("rank", 0.03), ("free", None), *COLUMNS)
    assert abs(some - adamw()) < 0.03
    assert few < 0.16
    assert few_alone > 0.8


def test_cosines_chosen_by_norm_beat_chance_and_moments_must_follow_them():
    once, chance = (loss(LowRank, ("rank", 8), ("basis", basis)) for basis in ("dct", "random"))
    assert once < chance - 0.08
    always, kept = (loss(DCTAdamW, ("rank", 8), ("refresh_every", 1), ("moments", m)) for m in ("rotate", "keep"))
    assert always < 0.55 < kept


def test_apollo_learns_about_as_well_as_galore_and_mini_far_better_than_nothing():
    assert loss(APOLLO, ("rank", 8)) < loss(GaLore, ("rank", 8), ("scale", 1.0)) + 0.1
    assert loss(APOLLOMini) < 0.35
