"""Methods that are set against each other in one table, each by a short name, and the runs that are made once only.

    codyra      a method with its own rank        lora:16    with this rank
    full        every weight                      linear     the classifier alone
    NAME=lora   the same under another name, for options of its own

What a run found is kept as JSON under a name that holds a hash of all that decides it, so that a stopped job goes on
where it was when it is called again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fallow.core.delta import REGISTRY, make_options, method_of
from fallow.core.errors import ConfigError, nearest
from fallow.core.files import atomic_write, read_json, write_json
from fallow.recipes import run_directory
from fallow.recipes.settings import to_toml

PLAIN = ("full", "linear")


@dataclass(frozen=True)
class Contestant:
    """`method`: the name of a Delta, "full" or "linear"."""

    label: str
    method: str
    options: dict[str, Any]

    @property
    def plain(self) -> bool:
        """Whether it trains weights themselves."""
        return self.method in PLAIN

    @property
    def rank(self) -> int | None:
        """Of each layer: what is asked for, or the method's own; None where it has none."""
        if self.plain:
            return None
        made: Any = make_options(method_of(self.method), self.options)
        return getattr(made, "rank", None)


def contestants(
    names: Sequence[str], options: Mapping[str, Mapping[str, Any]], allowed: Sequence[str] = PLAIN
) -> list[Contestant]:
    """Those of these names. `options`: of single ones, by name; `allowed`: which of the plain ones there are.

    ConfigError for a name that is no method, twice there or has options that it does not take.
    """
    labels = [name.partition("=")[0] for name in names]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"methods={list(names)} names one of them twice; give one as NAME=METHOD")
    spelled = {label.replace("-", "_"): label for label in labels}  # as keys of flags arrive
    own = {spelled.get(name, name): dict(given) for name, given in options.items()}
    if strange := sorted(set(own) - set(labels)):
        raise ConfigError(f"options are given for {', '.join(strange)}, not among methods={list(names)}")
    return [
        _contestant(label, name.rpartition("=")[2], own.get(label, {}), allowed)
        for label, name in zip(labels, names, strict=True)
    ]


def _contestant(label: str, name: str, options: dict[str, Any], allowed: Sequence[str]) -> Contestant:
    method, colon, rank = name.partition(":")
    if not re.fullmatch(r"[\w.+:-]+", label):
        raise ConfigError(f"methods: '{label}' must be of letters, digits and . + - _ alone; it names files")
    if method in PLAIN:
        if method not in allowed:
            raise ConfigError(f"methods: '{method}' is none of this job; give a weight parameterization or {allowed}")
        if colon or options:
            raise ConfigError(f"methods: '{method}' has neither rank nor options; give its name alone")
        return Contestant(label, method, {})
    import fallow.deltas  # noqa: F401  # makes all names known

    if method not in REGISTRY:
        raise ConfigError(f"methods: '{method}' is no method{nearest(method, [*REGISTRY, *allowed])}")
    if colon:
        if not rank.isdecimal():
            raise ConfigError(f"methods: '{name}' needs a whole number behind the colon, its rank, like {method}:16")
        options = {"rank": int(rank), **options}
    make_options(method_of(method), options)
    return Contestant(label, method, options)


def once(folder: Path, name: str, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` finds, kept in `folder`; read from there where the same settings were made before."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
    file = folder / f"{name.replace(':', '-')}-{key}.json"
    with contextlib.suppress(OSError, ValueError):  # not made yet, or cut off: made now
        kept = read_json(file)
        if isinstance(kept, dict):
            return kept
    found = make()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, found)
    return found


def take_folder(folder: Path, config: BaseModel) -> None:
    """Take a folder that is empty, or holds this very job, to go on with it; call it within `run_directory.alone`.

    ConfigError where something else is in it.
    """
    file, there = folder / "config.toml", {place.name for place in folder.iterdir()} - {run_directory.LOCK}
    if file.is_file():
        if file.read_text(encoding="utf-8") != to_toml(config, exclude={"output"}):
            raise ConfigError(f"output {folder} holds a job of other settings; give another folder, or those settings")
    elif there:
        raise ConfigError(f"output {folder} is not empty; give another folder")
    with atomic_write(file) as partial:
        partial.write_text(to_toml(config, exclude={"output"}), encoding="utf-8")


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation (None of one value) of those that are there; None where none is."""
    told = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(told) if told else None,
        "deviation": statistics.stdev(told) if len(told) > 1 else None,
    }
