"""A layer as budgets know it: by its name and its shape. Statistics are asked of it as of a Site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fallow.core.statistics import LayerStatistics, Statistics


@dataclass(frozen=True)
class Layer:
    name: str
    shape: tuple[int, int]
    rows: slice | None = None

    @property
    def layer(self) -> str:
        return self.name


def found_at(statistics: Statistics, shapes: Mapping[str, tuple[int, int]], need: str) -> dict[str, LayerStatistics]:
    """What was found in each of these layers. DataError, by name, where `need` was not."""
    return {name: statistics.at(Layer(name, shape), need) for name, shape in shapes.items()}
