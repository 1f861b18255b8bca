"""Batches that may be gone through several times, and by which values they are known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fallow.core.errors import ConfigError
from fallow.core.probing.batches import named

EMPTY = "batches is empty; give fallow.probe 8 to 64 batches like those of the training"


class Source:
    """Batches that may be gone through several times: a list, a DataLoader, or a function that returns an iterator.

    What is an iterator itself can be gone through once. `most`: batches of each pass.
    """

    def __init__(self, batches: Any, most: int | None = None) -> None:
        if isinstance(batches, Tensor | Mapping | str) or not (isinstance(batches, Iterable) or callable(batches)):
            raise ConfigError(
                f"batches is {named(batches)}; give a list of batches, a loader, or a function that returns an "
                "iterator over them"
            )
        self.batches, self.most = batches, most
        self.once = isinstance(batches, Iterator)

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batches() if callable(self.batches) else self.batches), self.most)

    @property
    def length(self) -> int | None:
        """How many there are, where that is known."""
        try:
            known = len(self.batches)
        except TypeError:
            return None
        return known if self.most is None else min(known, self.most)

    def needed_again(self, why: str) -> None:
        """ConfigError where they can be gone through only once."""
        if self.once:
            raise ConfigError(
                f"{why} goes through the batches more than once, and {named(self.batches)} is used up by the first "
                "time; give a list, a loader, or a function that returns a new iterator"
            )


def digest_of(batch: Any) -> str:
    """A hash of all values of a batch. ConfigError where it holds something that has none."""
    found = hashlib.sha256()
    _hash_into(found, batch)
    return found.hexdigest()[:16]


def _hash_into(found: Any, value: Any) -> None:
    if hasattr(value, "__array__") and not isinstance(value, Tensor):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        found.update(repr((tuple(value.shape), str(value.dtype))).encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        found.update(b"{")
        for key, part in value.items():
            found.update(repr(key).encode())
            _hash_into(found, part)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        found.update(f"[{len(value)}".encode())
        for part in value:
            _hash_into(found, part)
    elif value is None or isinstance(value, str | bytes | bool | int | float):
        found.update(repr(value).encode())
    else:
        raise ConfigError(
            f"the cache cannot tell batches apart that hold {named(value)}; give data='a name for these batches'"
        )
