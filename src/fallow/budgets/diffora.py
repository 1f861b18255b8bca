"""DiffoRA's choice: which modules get a low-rank pair, told by gates that a short search has learned.

"DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank Matrix Adaptation", arXiv 2502.08905.
Layers are rows i, their modules columns j; a_ij are logits, s B A the change that module ij has in the search:

    relaxed      W' = W + c gamma_ij s B A      gamma_i = softmax(a_i / temperature), or sigmoid(a_ij) without coupling
    bilevel      min over a of L_validation(theta*(a), a),   theta*(a) = argmin over theta = {A, B} of L_train(theta, a)
    discrete     of each row the ceil(share N) modules of the largest gamma, or of all rows together the ceil(share L N)

`fallow.search_modules` runs the search; what it finds is a budget, `DiffoRARanks`. As such it gives `rank` to what is
chosen and none to the others; `patterns()` is for method "diffora", where the others share pairs.

The paper's full text could not be had. The relaxation, two levels and a share of modules kept are its own; the form of
the gates, the choice within rows and the groups that share are reconstructions, each an option.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fallow.core.budgeting import Budget
from fallow.core.delta import number, one_of
from fallow.core.errors import ConfigError

Scope = Literal["layer", "model"]
Sharing = Literal["none", "layer", "type", "shape"]


def place_of(name: str) -> tuple[str, str]:
    """A module's layer and its type there: its path up to the last number that is not its end, and what follows."""
    parts = name.split(".")
    at = max((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), default=-1)
    return ".".join(parts[: at + 1]), ".".join(parts[at + 1 :])


@dataclass
class DiffoRARanks(Budget):
    """What a search has found. `scores`: by which modules are compared, by name; `gates`: the gamma of each. `rows`: of
    each the layer that it is in. `share`: how many are chosen, of each layer or of the whole `scope`="model". `steps`:
    that the search has made. `entropy`: of the gates of a layer, its mean over layers, 1 where they are all alike.
    """

    name: ClassVar[str] = "diffora"
    needs: ClassVar[str] = "a search, budget=fallow.search_modules(model, train, validation)"

    scores: dict[str, float]
    shapes: dict[str, tuple[int, int]]
    gates: dict[str, float] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    share: float = 0.5
    scope: Scope = "layer"
    steps: int = 0
    entropy: float = 1.0

    def __post_init__(self) -> None:
        number("share", self.share, most=1.0)
        one_of("scope", self.scope, ("layer", "model"))
        self.rows = self.rows or {name: place_of(name)[0] for name in self.scores}

    @property
    def chosen(self) -> list[str]:
        """The names of the chosen modules, in their order. ConfigError where equal scores leave it open."""
        groups: dict[str, list[str]] = {}
        for name in self.scores:
            groups.setdefault(self.rows[name] if self.scope == "layer" else "", []).append(name)
        found = {name for names in groups.values() for name in best({n: self.scores[n] for n in names}, self.share)}
        return [name for name in self.scores if name in found]

    def ranks(self, shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, int]:
        """`rank` for what is chosen, 0 for the others. ConfigError where the layers are not those of the search."""
        if missing := sorted(shapes.keys() - self.scores.keys()):
            raise ConfigError(f"budget='diffora' was searched without '{missing[0]}'; give the same targets")
        chosen = set(self.chosen)
        return {name: rank if name in chosen else 0 for name in shapes}

    def patterns(self, sharing: Sharing = "type", rank: int | None = None) -> dict[str, dict[str, object]]:
        """Of `fallow.attach(model, "diffora", patterns=...)`: what is not chosen shares a pair, of this rank (None: as
        the others), with those not chosen of its type in all layers, of its layer, or all, of one shape in any case.
        """
        one_of("sharing", sharing, ("layer", "type", "shape"))
        chosen = set(self.chosen)
        found: dict[str, dict[str, object]] = {}
        words: dict[tuple[str, tuple[int, int]], str] = {}
        for name, shape in self.shapes.items():
            if name in chosen:
                continue
            row, kind = self.rows[name], place_of(name)[1]
            key = {"layer": row, "type": kind, "shape": ""}[sharing], (shape[0], shape[1])
            word = words.setdefault(key, f"g{len(words)}_" + re.sub(r"\W", "_", key[0]))
            found[re.escape(name)] = {"group": word, **({} if rank is None else {"rank": rank})}
        return found


def best(scores: Mapping[str, float], share: float, refuse: bool = True) -> list[str]:
    """The ceil(share n) names of the largest scores. ConfigError, unless `refuse` is False, where the last of them and
    the first of the others are equal, as gates that were never trained are.
    """
    count = math.ceil(round(share * len(scores), 9))
    order = sorted(scores, key=lambda name: -scores[name])
    if refuse and 0 < count < len(order) and scores[order[count - 1]] == scores[order[count]]:
        raise ConfigError(
            f"'{order[count - 1]}' and '{order[count]}' have the same score, {scores[order[count]]:.6g}, and one of "
            "them is to be chosen; search longer, or with more steps after the warm-up"
        )
    return order[:count]


def rows_of(names: list[str], row: Callable[[str], str] | None = None) -> dict[str, list[str]]:
    """The modules of each layer, in their order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(place_of(name)[0] if row is None else row(name), []).append(name)
    return found
