"""What is common to adapter directories of every kind: adapter_config.json, adapter_model.safetensors, README.md.

The safetensors metadata hold, under "fallow", what PEFT has no place for: fingerprints of the base, and what the
training noted.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fallow.core.errors import AdapterError
from fallow.core.files import atomic_directory, parse_json, read_json
from fallow.core.sparse import CONFIG

VERSION = 1
NETWORKS = ("unet", "transformer")  # the part of a pipeline that denoises
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
PARTS = (*NETWORKS, *TEXT_ENCODERS)
PREFIX = "base_model.model."  # before the names in PEFT's files
WHAT_TO_GIVE = (
    "give an adapter directory, a run directory, or a .safetensors file of Fallow, diffusers, kohya or LyCORIS"
)
FULL_USE = "from fallow.recipes.adapter_files import apply_adapter\n\napply_adapter(pipeline.unet, 'path/to/this')"
PEFT_USE = "from peft import PeftModel\n\nPeftModel.from_pretrained(pipeline.unet, 'path/to/this')"


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file. AdapterError where it cannot be read."""
    try:
        with safe_open(file, framework="pt") as found:
            yield found
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{file} cannot be read as safetensors ({error}); it may have been cut off: copy or train it again"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a directory. AdapterError where it is missing or broken."""
    file = folder / CONFIG
    try:
        found = read_json(file)
    except FileNotFoundError:
        raise AdapterError(f"{folder} is no adapter: it has no {CONFIG}; {WHAT_TO_GIVE}") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read ({error}); copy the adapter again") from None
    if not isinstance(found, dict):
        raise AdapterError(f"{file} holds no settings; copy the adapter again")
    return found


def header(path: Path) -> dict[str, Any]:
    """What Fallow noted in the metadata of a safetensors file of kind full or peft: `base` and `metadata`; or {}."""
    with opened(path) as found:
        return noted_in(path, found.metadata() or {})


def noted_in(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The same, of metadata that have been read. AdapterError where they are broken."""
    try:
        found = parse_json(metadata.get("fallow", "{}"))
        if not isinstance(found, dict) or not all(isinstance(found.get(key, {}), dict) for key in ("base", "metadata")):
            raise ValueError("they are no tables")
        for name, of_base in found.get("base", {}).items():
            if not isinstance(of_base, list) or len(of_base) != 2 or not all(isinstance(one, str) for one in of_base):
                raise ValueError(f"the base of '{name}' is no fingerprint and dtype")
        return found
    except ValueError as error:
        raise AdapterError(f"{path} has broken metadata ({error}); copy it again") from None


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a safetensors file."""
    with opened(path) as found:
        return {name: tuple(found.get_slice(name).get_shape()) for name in found.keys()}  # noqa: SIM118


def noted(base: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a safetensors file, as `header` reads them."""
    return {"format": "pt", "fallow": json.dumps({"version": VERSION, "base": base, "metadata": dict(metadata)})}


@contextlib.contextmanager
def new_directory(folder: str | Path) -> Iterator[Path]:
    """A new adapter directory, in the place of an older adapter when complete; AdapterError where other things are."""
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise AdapterError(f"{place} is a file; give a directory")
    if place.is_dir() and any(place.iterdir()) and not (place / CONFIG).is_file() and not _of_parts(place):
        raise AdapterError(f"{place} is in use by something that is no adapter; give another directory")
    with atomic_directory(place) as partial:
        yield partial


def _of_parts(place: Path) -> bool:
    """Whether it holds adapter directories of parts of a pipeline, and nothing else."""
    return all(inner.name in PARTS and (inner / CONFIG).is_file() for inner in place.iterdir())


def card(method: str, metadata: Mapping[str, Any], use: str) -> str:
    """The README.md of an adapter."""
    rows = "\n".join(f"| {key} | {json.dumps(value)} |" for key, value in metadata.items() if value is not None)
    return (
        f"---\ntags: [fallow, {method.lower()}]\n---\n\n# A {method} adapter\n\nOn the base that it was trained on:\n\n"
        f"```python\n{use}\n```\n\n| setting | value |\n| --- | --- |\n{rows}\n"
    )
