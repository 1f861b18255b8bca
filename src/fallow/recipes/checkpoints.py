"""Checkpoints of a run: nested states as one safetensors file and one JSON file; nothing is pickled.

    checkpoints/step-000500/state.safetensors     every tensor, named by its place in the state
    checkpoints/step-000500/state.json            everything else, with {"tensor": name} where a tensor stands

A checkpoint appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from fallow.core.errors import AdapterError, ConfigError
from fallow.core.files import atomic_directory, read_tensors, write_json, write_tensors

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
    if "tuple" in rest:
        return tuple(join(tensors, part) for part in rest["tuple"])
    return {key: join(tensors, part) for key, part in rest["dict"]}


def save_checkpoint(run: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of a step and remove all but the newest `keep` (0: keep all); returns its folder."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    tensors, rest = split(state)
    with atomic_directory(folder) as partial:
        write_tensors(partial / "state.safetensors", tensors, {"format": "pt"})
        write_json(partial / "state.json", rest)
    if keep:
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    return folder


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        (int(match[1]), folder)
        for folder in (run / "checkpoints").glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", folder.name)) and (folder / "state.json").is_file()
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
        tensors, _ = read_tensors(newest / "state.safetensors")
        state = join(tensors, json.loads((newest / "state.json").read_text(encoding="utf-8")))
    except (AdapterError, OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"the checkpoint {newest} is damaged ({error}); {advice}") from None
    if not isinstance(state, dict):
        raise AdapterError(f"the checkpoint {newest} holds no state of a run; {advice}")
    return state
