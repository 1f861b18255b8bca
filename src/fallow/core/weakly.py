"""Weak references by name that follow a copy: of a model that is copied or unpickled they show the copy's own parts."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class Weakly(Generic[Item]):
    """{name: item} of those items that still exist; it keeps none of them."""

    def __init__(self, items: Mapping[str, Item]) -> None:
        self._refs = {name: weakref.ref(item) for name, item in items.items()}

    def items(self) -> Iterator[tuple[str, Item]]:
        for name, ref in list(self._refs.items()):
            if (item := ref()) is None:
                del self._refs[name]
            else:
                yield name, item

    def values(self) -> Iterator[Item]:
        return (item for _, item in self.items())

    def discard(self, name: str) -> None:
        self._refs.pop(name, None)

    def known_to(self, memo: dict[int, Any]) -> Weakly[Item]:
        """In a deepcopy of `memo`: the copies of what it has copied already, and the others as they are."""
        return Weakly({name: memo.get(id(item), item) for name, item in self.items()})

    def __getstate__(self) -> dict[str, Any]:
        return {"items": dict(self.items())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["items"])  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Weakly[Item]:
        return Weakly({name: copy.deepcopy(item, memo) for name, item in self.items()})
