"""Sequences of tasks, from sets that need no download, and from folders.

    turned-digits      known: upright digits; tasks: turned by 90, 180 and 270 degrees; classes 0-9 in each
    garments-digits    known: garments (Fashion-MNIST, 8 x 8); tasks: digits 0-4, digits 5-9, digits of shuffled pixels
    styles             tasks: the garments of the five shipped style sets, for the shipped garment-net
    FOLDER             FOLDER/<task>/<class>/*.png, or with train/ and test/ in between; see `fallow.recipes.labelled`

All classes of all tasks share one set of labels, and no task is named when a picture is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fallow import assets
from fallow.core.errors import ConfigError, nearest
from fallow.recipes.labelled import GARMENTS, Group, digits, folders, garments, split, styles, turned

BUILT_IN = ("turned-digits", "garments-digits", "styles")
SHUFFLED = 0  # the seed of the order of the pixels


@dataclass(frozen=True)
class TaskList:
    """`known`: what the network has learned before, where that is known. `side`, `channels`: of the pictures."""

    classes: list[str]
    tasks: list[Group]
    known: Group | None
    side: int
    channels: int


def task_list(
    data: str, seed: int, garments_folder: Path, side: int = 32, order: Sequence[str] = (), source: str | None = None
) -> TaskList:
    """The tasks of a set; see the top of this file. `order`: the names of those that are wanted, in their order.

    `source`: a folder beside the tasks that the network is taught before them. ConfigError, DataError for what is not
    there.
    """
    if data == "turned-digits":
        upright = split("upright", digits(), seed)
        tasks = [upright.changed(str(angle), partial(turned, degrees=angle)) for angle in (90, 180, 270)]
        return TaskList([str(i) for i in range(10)], _ordered(tasks, order), upright, 8, 1)
    if data == "garments-digits":
        return _garments_then_digits(garments_folder, seed, order)
    if data == "styles":
        chosen = list(order) or list(assets.STYLES)
        for name in chosen:
            if name not in assets.STYLES:
                raise ConfigError(f"order names '{name}', which is no shipped style{nearest(name, assets.STYLES)}")
        return TaskList(list(GARMENTS), styles(chosen, seed), None, 32, 3)
    place = Path(data).expanduser()
    if not place.is_dir():
        raise ConfigError(f"data={data} is neither a folder nor a set that is built in{nearest(data, BUILT_IN)}")
    groups, classes = folders(place, side, 3, seed, [*order, *([source] if order and source else [])])
    known = next((group for group in groups if group.name == source), None)
    if source is not None and known is None:
        raise ConfigError(f"source={source} is no folder of {place}; it has {', '.join(g.name for g in groups)}")
    tasks = [group for group in groups if group is not known]
    return TaskList(classes, tasks, known, side, 3)


def _garments_then_digits(folder: Path, seed: int, order: Sequence[str]) -> TaskList:
    known = split("garments", garments(folder), seed, (0.8, 0.1, 0.1))
    every = split("digits", digits(), seed)
    places = torch.randperm(64, generator=torch.Generator().manual_seed(SHUFFLED))
    tasks = [
        every.of("digits-0-4", range(5)),
        every.of("digits-5-9", range(5, 10)),
        every.changed("shuffled", lambda x: x.flatten(1)[:, places].view_as(x)),
    ]
    return TaskList([str(i) for i in range(10)], _ordered(tasks, order), known, 8, 1)


def _ordered(tasks: list[Group], order: Sequence[str]) -> list[Group]:
    named = {task.name: task for task in tasks}
    for name in order:
        if name not in named:
            raise ConfigError(f"order names '{name}', which is no task{nearest(name, named)}")
    return [named[name] for name in order] if order else tasks
