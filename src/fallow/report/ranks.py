"""Where the rank went: a map of an adapter's layers and their modules, as a figure.

    fallow.rank_figure(model, "ranks.png")

One row for each layer, one column for each type of module in it, the rank in the field and in its shade. What has no
adapter is an empty field. Ranks that do nothing (closed gates, triplets not in use) are not counted, unless none of the
adapter does anything yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import nn

from fallow.budgets.diffora import place_of
from fallow.core.delta import Delta
from fallow.core.errors import ConfigError
from fallow.core.files import atomic_write
from fallow.core.trimming import adapters
from fallow.report.plots import _STYLE, MUTED, canvas

SHADES = LinearSegmentedColormap.from_list("ranks", ["#fbf3e8", "#a8560f"])
LIGHT, DARK = "#2b2724", "white"  # figures on light and on dark fields
KINDS = (".png", ".svg", ".pdf")


def rank_figure(model: nn.Module, path: str | Path, name: str = "default") -> dict[str, int]:
    """Draw the ranks of an adapter of either host into a .png, .svg or .pdf file; returns them by module.

    ConfigError for another kind of file, and where there is no such adapter or its method has no ranks.
    """
    path = Path(path)
    if path.suffix not in KINDS:
        raise ConfigError(f"path={str(path)!r} must end in {', '.join(KINDS)}")
    found = ranks_of(model, name)
    with atomic_write(path) as partial:
        rank_map(found).savefig(partial, format=path.suffix[1:], dpi=200)
    return found


def ranks_of(model: nn.Module, name: str = "default") -> dict[str, int]:
    """The ranks in use, by module; those that there are where none is in use yet."""
    deltas = dict(adapters(model, name))
    used = {key: _used(delta) for key, delta in deltas.items()}
    return used if any(used.values()) else {key: len(delta.importance()) for key, delta in deltas.items()}


def _used(delta: Delta) -> int:
    if hasattr(delta, "stage"):  # of which some may wait in reserve
        return int(((delta.stage == 2) & (delta.importance() > 0)).sum())
    return delta.used_ranks()


@rc_context(_STYLE)
def rank_map(ranks: Mapping[str, int], title: str = "") -> Figure:
    """The figure of ranks by module."""
    places = {name: place_of(name) for name in ranks}
    layers = list(dict.fromkeys(layer for layer, _ in places.values()))
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    most = max(1, *ranks.values())
    field: list[list[float]] = [[float("nan")] * len(kinds) for _ in layers]
    widest = max(len(layer) for layer in layers)
    figure, axes = canvas(1.2 + 0.06 * widest + 0.62 * len(kinds), 1.3 + 0.24 * len(layers))
    for name, (layer, kind) in places.items():
        row, column = layers.index(layer), kinds.index(kind)
        field[row][column] = ranks[name]
        colour = DARK if ranks[name] > 0.6 * most else LIGHT if ranks[name] else MUTED
        axes.text(column, row, str(ranks[name]), ha="center", va="center", color=colour, fontsize=7.5)
    edges = [i - 0.5 for i in range(len(kinds) + 1)], [i - 0.5 for i in range(len(layers) + 1)]
    axes.pcolormesh(*edges, field, cmap=SHADES, vmin=0, vmax=most, edgecolors="white", linewidth=1.0)
    axes.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(layers)), [layer or "(model)" for layer in layers])
    axes.set_xlim(-0.5, len(kinds) - 0.5)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    total, mean = sum(ranks.values()), sum(ranks.values()) / len(ranks)
    axes.set_title(title or f"rank {total} over {len(ranks)} modules, {mean:.1f} on average")
    return figure
