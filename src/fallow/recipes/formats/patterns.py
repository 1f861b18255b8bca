"""PEFT's rules for ranks and alphas that differ between layers, read as PEFT reads them, and written so that they fit
exactly one layer each.

A pattern fits a layer whose name is it, or ends in `.` and it; one that begins with `^` must be the whole name. PEFT
takes regular expressions; here only names are taken, since an expression of a stranger's can be made to run for hours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fallow.core.errors import AdapterError

_NAME = re.compile(r"\^?[\w.\-]+\$?")


class Pattern:
    """A `rank_pattern` or `alpha_pattern`: `of(layer, default)`."""

    def __init__(self, where: object, name: str, found: Any) -> None:
        found = {} if found is None else found
        if not isinstance(found, dict):
            raise AdapterError(f"{where} is broken: {name} is {found!r}, not a table; copy the adapter again")
        self.whole: dict[str, float] = {}
        self.ends: list[tuple[str, float]] = []
        for key, value in found.items():
            plain = key.replace("\\.", ".")
            if not _NAME.fullmatch(plain):
                raise AdapterError(
                    f"{where}: {name} holds the regular expression {key!r}; give the adapter with the names of layers"
                )
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise AdapterError(f"{where} is broken: {name} of {key!r} is {value!r}, not a number")
            plain = plain.removesuffix("$")
            if plain.startswith("^"):
                self.whole[plain[1:]] = value
            else:
                self.ends.append((plain, value))

    def of(self, layer: str, default: float) -> float:
        if layer in self.whole:
            return self.whole[layer]
        return next((v for end, v in self.ends if layer == end or layer.endswith("." + end)), default)


def number(where: object, name: str, value: Any, default: float) -> float:
    """A setting that is a number; `default` where it is absent."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        raise AdapterError(f"{where} is broken: {name} is {value!r}, not a number that can be; copy the adapter again")
    return value


def settings(layers: Mapping[str, tuple[int, float]], dora: bool, *, anchored: bool = True) -> dict[str, Any]:
    """LoraConfig's fields for layers of these (ranks, alphas): the commonest as the rule, the others by name.

    `anchored`: names are of the whole network. Without it they may stand behind a prefix (`text_model.`).
    """
    rank = Counter(r for r, _ in layers.values()).most_common(1)[0][0]
    alpha = Counter(a for _, a in layers.values()).most_common(1)[0][0]
    mark = "^" if anchored else ""
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": whole(alpha),
        "rank_pattern": {mark + name: r for name, (r, _) in layers.items() if r != rank},
        "alpha_pattern": {mark + name: whole(a) for name, (_, a) in layers.items() if a != alpha},
        "target_modules": targets(list(layers)) if anchored else list(layers),
        "use_dora": dora,
    }


def targets(names: Sequence[str]) -> list[str] | str:
    """The layers' names; as one expression where one of them alone (`proj_out`) would fit others that end in it."""
    if all("." in name for name in names):
        return list(names)
    return exact_targets(names)  # PEFT fits it to the whole name


def exact_targets(names: Sequence[str]) -> str:
    """An expression that fits these modules and no others."""
    return "|".join(re.escape(name) for name in names)


def whole(value: float) -> float | int:
    """2 for 2.0, as PEFT has it."""
    return int(value) if float(value).is_integer() else value
