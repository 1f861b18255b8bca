"""The directory of a run: a name that is free, a place that can be written, what stands in run.json.

config.toml  run.json  metrics.jsonl  tensorboard/  samples/  checkpoints/  adapter/  report.html
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import platform
import shlex
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from fallow.core.errors import ConfigError, StorageError
from fallow.core.files import atomic_write, not_written, read_json, sweep, write_json
from fallow.recipes.settings import to_toml

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".lock"  # held by the process that writes into a directory, and gone when it ends well


def new_folder(method: str, data: str) -> Path:
    """Make `runs/<method>-<data>-<n>` with the first n from 1 that is not there yet, whoever else is making one."""
    name = f"{method}-{Path(data).expanduser().absolute().name or 'pictures'}"
    make(Path("runs"))
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            (folder := Path("runs") / f"{name}-{number}").mkdir()
            break
    return folder


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within the block no other process that asks for it writes into the directory. ConfigError where one does.

    The system takes the lock from a process that is killed, so none is left that has to be removed by hand.
    """
    file = folder / LOCK
    handle = _locked(file)
    try:
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()} on {platform.node()}\n".encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # the directory may be gone, as that of a run that never began
            file.unlink(missing_ok=True)
        os.close(handle)


def _locked(file: Path) -> int:
    """A handle that holds the lock."""
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise StorageError(not_written(file.parent, error.strerror or str(error))) from None
        try:
            if sys.platform == "win32":
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with contextlib.suppress(OSError):
                owner = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            whose = f" (process {owner})" if owner else ""
            raise ConfigError(
                f"{file.parent} is being written by another run{whose}; wait for its end, or give another output"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), file.stat()):
                return handle
        os.close(handle)  # its former owner has just removed it


def claim(folder: Path) -> None:
    """Take an empty directory for a new run; call it within `alone`. ConfigError where something is in it."""
    sweep(folder, alone=True)
    if {place.name for place in folder.iterdir()} - {LOCK}:
        raise ConfigError(
            f"output {folder} is not empty; give another one, or go on with it: fallow train --resume "
            f"{shlex.quote(str(folder))}"
        )


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
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{run / 'config.toml'} cannot be read ({error}); train anew") from None


def write_settings(folder: Path, config: BaseModel) -> None:
    """config.toml, which makes the same run again."""
    with atomic_write(folder / "config.toml") as partial:
        partial.write_text(to_toml(config, exclude={"output", "resume"}), encoding="utf-8")


def began(folder: Path) -> bool:
    """Whether a run without a checkpoint is one that can begin anew in its place: it was killed, and told no end."""
    return read_info(folder).get("status") in (None, "running")


def write_info(folder: Path, info: dict[str, Any], **more: Any) -> None:
    """Add to what is known of the run, and write run.json."""
    info.update(more)
    write_json(folder / "run.json", info)


def read_info(folder: Path) -> dict[str, Any]:
    """run.json, or nothing where it is missing or broken: all of it is known again when the run ends."""
    try:
        found = read_json(folder / "run.json")
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
