"""Files that are whole or absent, and the fingerprint by which an adapter knows its base.

Everything that Fallow writes goes to a temporary name in the same folder and is renamed when complete, so that a crash,
a full disk or a second reader never meets half a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fallow.core.errors import AdapterError

PRECISIONS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there takes the name `path` when the block ends well.

    After an exception nothing is left behind and an older file is untouched. Folders above are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())  # mkstemp and safetensors give 0600; a file of the user's has the user's mask
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary directory beside `path`; it takes the name `path`, in the place of an older one, at the end.

    The older one is removed only after the new one stands. After an exception nothing of the new one is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():  # safetensors writes 0600, which nobody else could read
                file.chmod(0o666 & ~_umask())
        if path.exists():
            former = partial.with_suffix(".former")
            path.replace(former)
            partial.replace(path)
            shutil.rmtree(former, ignore_errors=True)
        else:
            partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON document, atomically; NaN and infinity, which strict readers refuse, raise ValueError."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, atomically."""
    with atomic_write(path) as partial:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, dict(metadata or {}))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file. AdapterError where it is missing, cut off or none."""
    path = Path(path)
    if not path.is_file():
        raise AdapterError(f"{path} does not exist; give an adapter: a .safetensors file or an adapter directory")
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} cannot be read as safetensors ({error}); it may have been cut off: copy or train it again"
        ) from None


def fingerprint(tensor: Tensor) -> str:
    """What a base weight is known by: a hash of its values as float32, and as float16 and bfloat16.

    With the three, an adapter of a float32 base is recognised on the same base loaded in half precision, and one that
    was trained in half precision on the float32 original. Shape and dtype are not part of it. Reads the tensor once for
    each; about a second per 10^8 entries.
    """
    return ",".join(f"{name}:{_digest(tensor, dtype)}" for name, dtype in PRECISIONS.items())


def matches(print_of_base: str, tensor: Tensor, trained_in: torch.dtype | None = None) -> bool:
    """Whether a weight is the one that was fingerprinted, up to its precision or that of the training."""
    parts = dict(part.split(":", 1) for part in print_of_base.split(",") if ":" in part)
    own = tensor.dtype if tensor.dtype in PRECISIONS.values() else torch.float32
    names = {dtype: name for name, dtype in PRECISIONS.items()}
    candidates = [own] if trained_in not in (torch.float16, torch.bfloat16) else [own, trained_in]
    return any(parts.get(names[dtype]) == _digest(tensor, dtype) for dtype in dict.fromkeys(candidates))


def _digest(tensor: Tensor, dtype: torch.dtype) -> str:
    """16 hexadecimal digits of SHA-256 over the row-major values in this dtype."""
    values = tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().data).hexdigest()[:16]
