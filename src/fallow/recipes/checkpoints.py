"""Checkpoints of a run: nested states as one safetensors file and one JSON file; nothing is pickled.

    checkpoints/step-000500/state.safetensors     every tensor, named by its place in the state
    checkpoints/step-000500/state.json            "state": everything else, with {"tensor": name} where a tensor stands;
                                                  "sha256" of the other file, and of "state" itself

A checkpoint appears under its name only when it is complete and on the disk, and is read only where it is still what
was written: a single bit that has changed is noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

from torch import Tensor

from fallow.core.errors import AdapterError, ConfigError
from fallow.core.files import (
    atomic_directory,
    read_json,
    read_tensors,
    refuse_full,
    remove_directory,
    write_json,
    write_tensors,
)

VERSION = 1
STATE, WEIGHTS = "state.json", "state.safetensors"
PLAIN = (str, int, float, bool, type(None))


def split(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Tensors by name, and the rest as JSON values, of a nested state.

    It may hold dictionaries (of any plain keys), lists, tuples, tensors, text, numbers, truth values and None.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            tensors[place] = value
            return {"tensor": place}
        if isinstance(value, dict):
            # As pairs, since keys may be numbers (torch's optimizer states) and JSON knows only text.
            return {"dict": [[key, walk(inner, f"{place}/{key}")] for key, inner in value.items()]}
        if isinstance(value, list | tuple):
            parts = [walk(inner, f"{place}/{at}") for at, inner in enumerate(value)]
            return parts if isinstance(value, list) else {"tuple": parts}
        if isinstance(value, float) and not math.isfinite(value):  # as in Prodigy's groups; JSON has no such numbers
            return {"number": str(value)}
        if isinstance(value, PLAIN):
            return value
        raise TypeError(f"{place or 'the state'} is a {type(value).__name__}, which a checkpoint does not hold")

    return tensors, walk(state, "")


def join(tensors: dict[str, Tensor], rest: Any) -> Any:
    """The state that `split` took apart."""
    if isinstance(rest, list):
        return [join(tensors, part) for part in rest]
    if not isinstance(rest, dict):
        return rest
    if "tensor" in rest:
        return tensors[rest["tensor"]]
    if "number" in rest:
        return float(rest["number"])
    if "tuple" in rest:
        return tuple(join(tensors, part) for part in rest["tuple"])
    return {key: join(tensors, part) for key, part in rest["dict"]}


def save_checkpoint(run: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of a step and remove all but the newest `keep` (0: keep all); returns its folder.

    StorageError where the disk has no room for it, or refuses; those that are there are kept.
    """
    folder = run / "checkpoints" / f"step-{step:06d}"
    tensors, rest = split(state)
    refuse_full(folder, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    with atomic_directory(folder) as partial:
        write_tensors(partial / WEIGHTS, tensors, {"format": "pt"})
        digests = {WEIGHTS: _of_file(partial / WEIGHTS), "state": _of_state(rest)}
        write_json(partial / STATE, {"version": VERSION, "sha256": digests, "state": rest})
    if keep:
        for old in checkpoints(run)[:-keep]:
            remove_directory(old)
    return folder


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        (int(match[1]), folder)
        for folder in (run / "checkpoints").glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", folder.name)) and (folder / STATE).is_file()
    ]
    return [folder for _, folder in sorted(found)]


def load_checkpoint(run: Path) -> dict[str, Any]:
    """The state of the newest checkpoint. ConfigError where there is none, AdapterError where it is damaged."""
    found = checkpoints(run)
    if not found:
        raise ConfigError(
            f"{run} has no checkpoint to go on from; train anew with: fallow train --config "
            f"{shlex.quote(str(run / 'config.toml'))}"
        )
    newest = found[-1]
    advice = f"delete {newest} to go on from the one before" if len(found) > 1 else "train anew"
    try:
        state = _checked(newest)
    except (AdapterError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        said = f"{type(error).__name__}: {error}" if isinstance(error, KeyError | TypeError) else str(error)
        raise AdapterError(f"the checkpoint {newest} is damaged ({said}); {advice}") from None
    if not isinstance(state, dict):
        raise AdapterError(f"the checkpoint {newest} holds no state of a run; {advice}")
    return state


def _checked(folder: Path) -> Any:
    """The state in a checkpoint's folder, if it is what was written."""
    told = read_json(folder / STATE)
    if not isinstance(told, dict) or told.get("version") != VERSION:
        raise ValueError(f"{STATE} is of no version that this Fallow reads, which is {VERSION}")
    if _of_state(told["state"]) != told["sha256"]["state"]:
        raise ValueError(f"{STATE} is not what was written")
    if _of_file(folder / WEIGHTS) != told["sha256"][WEIGHTS]:
        raise ValueError(f"{WEIGHTS} is not what was written")
    tensors, _ = read_tensors(folder / WEIGHTS)
    return join(tensors, told["state"])


def _of_file(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _of_state(rest: Any) -> str:
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
