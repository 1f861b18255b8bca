"""Reading and recognising an adapter of any of the formats by its path."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from fallow.core.sparse import CONFIG
from fallow.recipes.adapter_directory import opened
from fallow.recipes.formats import peft, single_file
from fallow.recipes.formats.layers import Adapter
from fallow.recipes.formats.writing import DIFFUSERS_FILE

ENCODER_MARKS = ("lora_te", "text_encoder", "text_model", "encoder.layers.", "encoder.block.")


def is_one(file: Path) -> bool:
    """Whether a safetensors file is of diffusers, kohya or LyCORIS. AdapterError where it cannot be read."""
    with opened(file) as found:
        return single_file.is_one(list(found.keys()))


def names_encoders(file: Path) -> bool:
    """Whether such a file changes text encoders too, as far as its keys tell, without its tensors being read."""
    with opened(file) as found:
        keys = list(found.keys())
    return any(mark in key for key in keys for mark in ENCODER_MARKS)


def inner_file(folder: Path) -> Path | None:
    """The file of a directory as diffusers saves a LoRA; None where it is none such."""
    file = folder / DIFFUSERS_FILE
    return file if file.is_file() and not (folder / CONFIG).exists() else None


def read(place: Path, known: Mapping[str, Collection[str]] | None = None, part: str | None = None) -> Adapter:
    """The adapter there: a file, or a PEFT directory. `part`: of a PEFT directory whose names do not tell."""
    if place.is_file():
        return single_file.read(place, known)
    return peft.read(place, part)
