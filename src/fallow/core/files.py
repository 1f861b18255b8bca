"""Files that are whole or absent, and the fingerprint by which an adapter knows its base.

Everything that Fallow writes goes to a temporary name in the same folder, is brought to the disk (fsync) and renamed
when complete, so that a crash, a kill, a full disk, a power cut or a second reader never meets half a file. What a
killed process has left under a temporary name is taken away by the next one that writes there, or by `sweep`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import math
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fallow.core.content_hash import HASH, fill_hash, with_room
from fallow.core.errors import AdapterError, StorageError
from fallow.core.stored_weight import StoredWeight

PRECISIONS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# What the operating system refuses is for the user to put right: permissions, a full disk, a file in a folder's place.
REFUSED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EFBIG, errno.ENOTDIR, errno.EISDIR, errno.EDQUOT,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.EIO,
}  # fmt: skip
ABANDONED = 24 * 3600  # seconds after which a temporary file of another machine is taken for left behind
SPARE = 1 << 20  # bytes that must be left on a disk beside what is written
MARKED = 1024  # entries of a tensor that its mark hashes one by one
_SWEPT: set[Path] = set()  # folders that this process has looked through for what others left


# -- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there takes the name `path` when the block ends well.

    After an exception nothing is left behind and an older file is untouched. Folders above are made. StorageError
    where the system refuses: a full disk, a place that cannot be written.
    """
    path = Path(path)
    with _storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if (folder := path.parent.absolute()) not in _SWEPT:  # once: a folder may hold thousands of pictures
            sweep(folder)
            _SWEPT.add(folder)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path), suffix=".partial")
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            partial.chmod(0o666 & ~_umask())  # mkstemp and safetensors give 0600; a user's file has the user's mask
            _to_disk(partial)
            partial.replace(path)
            _to_disk(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary directory beside `path`; it takes the name `path`, in the place of an older one, at the end.

    The two change places in one step where the system can do that (Linux); elsewhere there is a moment in which
    neither has the name, and `sweep` then puts the older one back. After an exception nothing of the new one is left.
    StorageError as `atomic_write`.
    """
    path = Path(path)
    with _storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path), suffix=".partial"))
        try:
            partial.chmod(0o777 & ~_umask())
            yield partial
            for place in sorted(partial.rglob("*"), reverse=True):  # what is within a folder before the folder
                if place.is_file():  # safetensors writes 0600, which nobody else could read
                    place.chmod(0o666 & ~_umask())
                _to_disk(place)
            _to_disk(partial)
            _take_place(partial, path)
            _to_disk(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _take_place(new: Path, path: Path) -> None:
    """Give a directory the name `path`; what had it before is then under the temporary name, to be removed."""
    if not path.exists():
        new.replace(path)
    elif not _exchange(new, path):
        former = new.with_suffix(".former")
        path.replace(former)
        new.replace(path)
        shutil.rmtree(former, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where the system or the file system cannot."""
    call = _renameat2()
    if call is None:
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # no Linux, or an old C library
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    call.restype = ctypes.c_int
    found: Callable[..., int] = call
    return found


def remove_directory(folder: Path) -> None:
    """Remove a directory such that whoever is stopped in between leaves no half of it under its name."""
    gone = folder.with_name(f"{_prefix(folder)}{os.urandom(4).hex()}.partial")
    folder.replace(gone)
    shutil.rmtree(gone)


def _to_disk(place: Path) -> None:
    """fsync of a file or a directory: what is in it outlives a power cut. Systems that know none for it are passed."""
    try:
        handle = os.open(place, os.O_RDONLY)
    except OSError:
        if place.is_file():
            raise
        return  # Windows opens no directories
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -- what a killed process has left behind ----------------------------------------------------------------------------

_LEFT = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<process>\d+)-[^.]*\.(?P<kind>partial|former)", re.DOTALL)


def _prefix(path: Path) -> str:
    """Of a temporary name: the one it is for, and whose it is."""
    return f".{path.name}.{_host()}-{os.getpid()}-"


@functools.cache
def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def sweep(folder: Path, name: str | None = None, *, deep: bool = False, alone: bool = False) -> None:
    """Take away the temporary files and directories in a folder that processes which are gone have left.

    `name`: only those for this name. `deep`: in the folders within too. `alone`: the caller knows that nobody else
    writes there, so all of them go. An older directory whose successor never took its name gets it back.
    """
    inner = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as places:
        for place in places:
            match = _LEFT.fullmatch(place.name) if place.name.startswith(".") else None
            if match is None:
                if deep and place.is_dir(follow_symlinks=False):
                    inner.append(Path(place.path))
            elif name in (None, match["name"]) and (alone or _left_behind(match, place)):
                _take_away(folder / match["name"], Path(place.path), match["kind"])
    for within in inner:
        sweep(within, name, deep=True, alone=alone)


def _left_behind(match: re.Match[str], place: os.DirEntry[str]) -> bool:
    if match["host"] != _host():
        with contextlib.suppress(FileNotFoundError):
            return time.time() - place.stat(follow_symlinks=False).st_mtime > ABANDONED
        return False
    try:
        os.kill(int(match["process"]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # it lives, and is somebody else's
        return False
    return False


def _take_away(path: Path, left: Path, kind: str) -> None:
    if kind == "former" and not path.exists():
        left.replace(path)
    elif left.is_dir():
        shutil.rmtree(left, ignore_errors=True)
    else:
        left.unlink(missing_ok=True)


# -- what the system refuses ------------------------------------------------------------------------------------------


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    """Turn what the system says of a place that cannot be written into a StorageError."""
    try:
        yield
    except OSError as error:
        elsewhere = isinstance(error.filename, str) and path.parent not in Path(error.filename).parents
        if error.errno not in REFUSED or elsewhere:
            raise
        raise StorageError(not_written(path, error.strerror or str(error))) from error
    except SafetensorError as error:  # wraps what the system says: "... (os error 28)"
        number = re.search(r"os error (\d+)", str(error))
        if number is None or int(number[1]) not in REFUSED:
            raise
        raise StorageError(not_written(path, os.strerror(int(number[1])))) from error


def not_written(path: Path, reason: str) -> str:
    """What is said of a place that the system refuses."""
    return f"{path} cannot be written: {reason}; give a place that you may write to, with space left"


def refuse_full(folder: Path, size: int) -> None:
    """StorageError unless so many bytes fit on the disk of a folder (or of the nearest above it that is there)."""
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(above).free
    if free < size + SPARE:
        raise StorageError(
            f"{folder} has no room: {size / 1e6:,.1f} MB are to be written and {free / 1e6:,.1f} MB are free; make "
            "space, or give a place on another disk"
        )


# -- JSON and safetensors ---------------------------------------------------------------------------------------------


def parse_json(text: str | bytes) -> Any:
    """A JSON document as strict readers read it. ValueError, also where json would go on: a key that stands twice, a
    number that is none or too large, nesting without end.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_float=_number, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)[:60]!r} stands twice")
    return found


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:60]} is too large")
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def read_json(path: Path) -> Any:
    """`parse_json` of a file. OSError where it cannot be read, ValueError where it is no such document."""
    return parse_json(path.read_bytes())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON document, atomically; NaN and infinity, which strict readers refuse, raise ValueError."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, atomically. StorageError, before anything is written, where the disk has no room.

    A `modelspec.hash_sha256` among the metadata, whatever it says, is filled in: the hash of the tensors' bytes.
    """
    refuse_full(Path(path).parent, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    with atomic_write(path) as partial:
        told = with_room(metadata)
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, told)
        if HASH in told:
            fill_hash(partial)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file. AdapterError where it is missing, cut off or none."""
    path = Path(path)
    if not path.is_file():
        raise AdapterError(f"{path} does not exist; give an adapter: a .safetensors file or an adapter directory")
    with opened_tensors(path) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


@contextmanager
def opened_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file of which only the header has been read. AdapterError where it is cut off or none."""
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} cannot be read as safetensors ({error}); it may have been cut off: copy or train it again"
        ) from None


def refuse_not_finite(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """AdapterError where a value of a trained tensor is no number: a network with it would draw nothing."""
    for name, tensor in tensors.items():
        if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
            tensor = tensor.float()  # the eight-bit formats cannot be asked themselves
        if not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise AdapterError(
                f"{file} is of no use: {count:,} of the {tensor.numel():,} values of '{name}' are NaN or infinite; the "
                "file is damaged, or its training had failed: copy or train it again"
            )


# -- knowing a weight -------------------------------------------------------------------------------------------------


def fingerprint(tensor: Tensor) -> str:
    """What a base weight is known by: a hash of its values as float32, and as float16 and bfloat16.

    With the three, an adapter of a float32 base is recognised on the same base loaded in half precision, and one that
    was trained in half precision on the float32 original. Shape and dtype are not part of it. Reads the tensor once for
    each; about a second per 10^8 entries.
    """
    if isinstance(tensor, StoredWeight) and (known := tensor.store.known_as):
        return known  # of what was quantised
    return ",".join(f"{name}:{_digest(tensor, dtype)}" for name, dtype in PRECISIONS.items())


def matches(print_of_base: str, tensor: Tensor, trained_in: torch.dtype | None = None) -> bool:
    """Whether a weight is the one that was fingerprinted, up to its precision or that of the training."""
    parts = dict(part.split(":", 1) for part in print_of_base.split(",") if ":" in part)
    own = tensor.dtype if tensor.dtype in PRECISIONS.values() else torch.float32
    names = {dtype: name for name, dtype in PRECISIONS.items()}
    candidates = [own] if trained_in not in (torch.float16, torch.bfloat16) else [own, trained_in]
    if isinstance(tensor, StoredWeight) and (known := tensor.store.known_as):  # of what was quantised
        every = set(known.split(","))
        return any(f"{name}:{parts.get(name)}" in every for name in (names[dtype] for dtype in candidates))
    return any(parts.get(names[dtype]) == _digest(tensor, dtype) for dtype in dict.fromkeys(candidates))


def _digest(tensor: Tensor, dtype: torch.dtype) -> str:
    """16 hexadecimal digits of SHA-256 over the row-major values in this dtype."""
    values = tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().data).hexdigest()[:16]


def mark(tensor: Tensor) -> str:
    """What an unchanged weight is known by when a run goes on: the sum of all its bits, and a hash of 1,024 entries.

    The sum notices any single changed bit, the entries spread over the tensor most exchanges that keep the sum. Of the
    very values, so that the same weights in another dtype have another mark. Reads the tensor once where it lies, at
    the speed of memory: a twentieth of the time of one SHA-256.
    """
    flat = tensor.detach().contiguous().view(-1)
    some = flat[:: max(1, flat.numel() // MARKED)].contiguous().view(torch.uint8).cpu()
    octets = flat.view(torch.uint8)
    octets = octets.clone() if octets.storage_offset() % 8 else octets  # words begin at multiples of eight
    whole = octets.numel() // 8 * 8
    total = int(octets[:whole].view(torch.int64).sum()) if whole else 0
    rest = bytes(octets[whole:].cpu().tolist())
    told = hashlib.sha256(repr((tuple(tensor.shape), str(tensor.dtype), total, rest)).encode())
    told.update(some.numpy().data)
    return told.hexdigest()[:16]
