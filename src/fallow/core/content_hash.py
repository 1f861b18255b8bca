"""The hash of what a safetensors file holds, written into the file itself: ModelSpec's `modelspec.hash_sha256`.

It is the SHA-256 of all bytes behind the header, so that it stays the same whatever the metadata say. The header is
written with room for it, and the digits are put there when the file is complete.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

HASH = "modelspec.hash_sha256"
ROOM = "0x" + "0" * 64


def with_room(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """The metadata to write: where they ask for a hash (a key HASH, whatever it says), with room for its digits."""
    found = dict(metadata or {})
    if HASH in found:
        found[HASH] = ROOM
    return found


def fill_hash(file: Path) -> str:
    """Put the hash of a file's tensors into its header, in the place of ROOM; returns it."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length)
        digest = hashlib.sha256()
        while part := opened.read(1 << 20):
            digest.update(part)
        key = f'"{HASH}":"'.encode()
        opened.seek(8 + header.index(key + ROOM.encode()) + len(key))
        written = f"0x{digest.hexdigest()}"
        opened.write(written.encode())
    return written
