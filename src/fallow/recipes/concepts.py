"""What is trained on: one folder of pictures, or several, each seen as often as asked for.

    my-pictures/                 pictures, captions: see fallow.recipes.pictures
    my-concepts/10_sks dog/      a folder that holds no pictures but folders named as kohya's sd-scripts name them:
    my-concepts/2_blue vase/     N_CAPTION, seen N times each, with CAPTION where a picture has none of its own

Further folders are named as FOLDER or FOLDER:REPEATS.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fallow.core.errors import ConfigError, DataError
from fallow.recipes.pictures import Picture, Reading, Size, has_pictures, read_pictures

REPEATED = re.compile(r"(\d+)_(.+)")


def read_concepts(
    folder: str | Path, further: Sequence[str] = (), prompt: str | None = None, how: Reading | None = None
) -> list[Picture]:
    """The pictures of a folder and of the further ones, with their repeats, in that order.

    Raises DataError as `read_pictures`, and where masks are asked for and no picture has one; ConfigError for repeats
    that are no whole number above 0.
    """
    how = how or Reading()
    pictures = _read(Path(folder).expanduser(), prompt, how)
    for told in further:
        place, repeats = split_repeats(told)
        pictures += [replace(p, repeats=p.repeats * repeats) for p in _read(place, prompt, how)]
    if (how.masks or how.alpha) and not any(picture.mask for picture in pictures):
        raise DataError(
            f"{folder} holds no mask; put NAME.mask.png beside NAME.png, or in masks/, or name it in metadata.jsonl"
            + ("; no picture has a transparency either" if how.alpha else " (or take transparency with alpha_mask)")
        )
    return pictures


def split_repeats(told: str) -> tuple[Path, int]:
    """`FOLDER:REPEATS` taken apart; 1 where there is no number behind the last colon."""
    place, colon, number = told.rpartition(":")
    if not colon or not number.strip().lstrip("-").isdecimal() or Path(told).expanduser().exists():
        return Path(told).expanduser(), 1
    if int(number) < 1:
        raise ConfigError(f"concepts: {told} repeats its pictures {number} times; give 1 or more, or leave it out")
    return Path(place).expanduser(), int(number)


def repeated_folders(folder: Path) -> list[tuple[Path, int, str]]:
    """(folder, N, caption) of the folders named N_CAPTION within one that holds no pictures itself; N 0 is left out."""
    if not folder.is_dir() or has_pictures(folder) or (folder / "metadata.jsonl").exists():
        return []
    found = [(place, REPEATED.fullmatch(place.name)) for place in sorted(folder.iterdir()) if place.is_dir()]
    named = [(place, int(match[1]), match[2].strip()) for place, match in found if match]
    return [(place, repeats, caption) for place, repeats, caption in named if repeats]


def _read(folder: Path, prompt: str | None, how: Reading) -> list[Picture]:
    named = repeated_folders(folder)
    if not named:
        return read_pictures(folder, prompt, how)
    return [
        replace(picture, repeats=repeats)
        for place, repeats, caption in named
        for picture in read_pictures(place, caption, how)
    ]


def seen(pictures: Sequence[Picture], sizes: Sequence[Size]) -> tuple[list[int], list[Size]]:
    """Which picture stands at each place of a round, each as often as it is repeated, and the size there."""
    order = [number for number, picture in enumerate(pictures) for _ in range(picture.repeats)]
    return order, [sizes[number] for number in order]
