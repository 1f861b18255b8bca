"""The directory of a run: a name that is free, a place that can be written, what stands in run.json.

config.toml  run.json  metrics.jsonl  tensorboard/  samples/  checkpoints/  adapter/  report.html
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fallow.core.errors import ConfigError
from fallow.core.files import write_json


def free_name(method: str, data: str) -> Path:
    """`runs/<method>-<data>-<n>` with the first n from 1 that is not there yet."""
    name = f"{method}-{Path(data).expanduser().absolute().name or 'pictures'}"
    number = 1
    while (Path("runs") / f"{name}-{number}").exists():
        number += 1
    return Path("runs") / f"{name}-{number}"


def claim(folder: Path) -> bool:
    """Make the directory of a new run; tells whether it was there already.

    ConfigError where something is in it, or it cannot be written.
    """
    with refusing(folder):
        there = folder.is_dir()
        if there and any(folder.iterdir()):
            raise ConfigError(
                f"output {folder} is not empty; give another one, or go on with it: fallow train --resume "
                f"{shlex.quote(str(folder))}"
            )
    make(folder)
    return there


def make(folder: Path) -> None:
    """Make a directory where there is none yet. ConfigError where it cannot be made, or written into."""
    with refusing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    refuse_read_only(folder)


@contextlib.contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Turn what the system says of a directory that cannot be made into a ConfigError."""
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"output {folder} is, or lies in, a file; give a folder") from None
    except OSError as error:
        raise ConfigError(
            f"output {folder} cannot be made ({error.strerror}); give a folder that you may write to"
        ) from None


def clear(folder: Path) -> None:
    """Take away what a run that never began has put into its directory."""
    for place in folder.iterdir():
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)


def refuse_read_only(folder: Path) -> None:
    """ConfigError unless files can be written there; tried, since permissions do not tell all."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"output {folder} cannot be written ({error.strerror}); give a folder that you may write to"
        ) from None


def settings_of(run: Path) -> dict[str, Any]:
    """The config.toml of a run. ConfigError where there is none that can be read."""
    if not run.is_dir():
        raise ConfigError(f"resume={run} is no folder; give the directory of a run")
    try:
        return tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"resume={run} is no run: it has no config.toml; give the directory of a run") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run / 'config.toml'} cannot be read ({error}); train anew") from None


def write_info(folder: Path, info: dict[str, Any], **more: Any) -> None:
    """Add to what is known of the run, and write run.json."""
    info.update(more)
    write_json(folder / "run.json", info)


def read_info(folder: Path) -> dict[str, Any]:
    """run.json, or nothing where it is missing or broken: all of it is known again when the run ends."""
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def hardware(device: torch.device) -> dict[str, Any]:
    """What the run was made on."""
    found: dict[str, Any] = {"device": str(device)}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    found["processor"] = _processor()
    found["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found["threads"] = torch.get_num_threads()
    return found


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            told = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), None)
    except OSError:
        told = None
    return told or platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of the packages that decide what a run computes."""
    names = ("fallow", "torch", "diffusers", "transformers", "peft", "safetensors")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
