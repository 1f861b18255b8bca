"""Clips of frames, as the recipe for video models reads and shows them.

    clips = read_clips(Path("my-clips"), prompt="a flag in the wind")
    frames = frames_of(clips[0].path)

A clip is an animated file (GIF, WebP, PNG) with its caption as pictures have it, or a folder of pictures, its frames in
the order of their names, with its caption in NAME.txt beside it or in `prompt`. Video files are not read: take their
frames out first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageSequence

from fallow.core.errors import ConfigError, DataError
from fallow.recipes.pictures import Picture, Reading, open_picture, read_pictures, rgb

ANIMATED = (".gif", ".webp", ".png")
SHOWN_MILLISECONDS = 125  # each frame of a GIF: 8 in a second, as AnimateDiff was trained


def read_clips(folder: str | Path, prompt: str | None = None) -> list[Picture]:
    """The clips of a folder, sorted by name; width and height are those of the first frame.

    Raises DataError as `read_pictures`, and for a clip of one frame.
    """
    folder = Path(folder).expanduser()
    try:
        inner = [place for place in sorted(folder.iterdir()) if place.is_dir() and not place.name.startswith(".")]
        single = any(place.suffix.lower() in ANIMATED for place in folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); give a folder of clips") from None
    found = read_pictures(folder, prompt) if single or not inner else []
    for place in inner:
        first = read_pictures(place, prompt="")[0]
        beside = place.with_name(f"{place.name}.txt")
        told = " ".join(beside.read_text(encoding="utf-8-sig").split()) if beside.is_file() else prompt
        if told is None:
            raise DataError(
                f"{place} has no caption; write it into {beside.name} beside it, or give one prompt for all"
            )
        found.append(replace(first, path=place, caption=told))
    for clip in found:
        if count(clip.path) < 2:
            raise DataError(f"{clip.path} has one frame; give clips: animated files, or folders of frames")
    return found


def clips_alone(
    folder: Path, concepts: Sequence[str], prompt: str | None, reading: Reading | None = None
) -> list[Picture]:
    """As `read_clips`; ConfigError for further folders or masks, which are for pictures."""
    if concepts:
        raise ConfigError(f"concepts={list(concepts)} are for models that draw pictures; put all clips into one folder")
    if reading is not None and (reading.masks or reading.alpha):
        raise ConfigError("masks and alpha_mask are for models that draw pictures; leave them out for clips")
    return read_clips(folder, prompt)


def count(path: Path) -> int:
    """How many frames a clip has."""
    if path.is_dir():
        return len(read_pictures(path, prompt=""))
    with Image.open(path) as image:
        return int(getattr(image, "n_frames", 1))


def frames_of(path: Path) -> list[Image.Image]:
    """All frames in RGB. DataError where one cannot be read."""
    if path.is_dir():
        return [open_picture(picture.path) for picture in read_pictures(path, prompt="")]
    try:
        with Image.open(path) as image:
            return [rgb(frame.copy()) for frame in ImageSequence.Iterator(image)]
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise DataError(f"{path} cannot be read as a clip ({error}); copy it again, or take it out") from None


def strip(frames: Sequence[Image.Image]) -> Image.Image:
    """The frames beside each other as one picture; a single frame is the picture."""
    if len(frames) == 1:
        return frames[0]
    width, height = frames[0].size
    page = Image.new("RGB", (width * len(frames), height))
    for at, frame in enumerate(frames):
        page.paste(frame, (at * width, 0))
    return page


def write_gif(frames: Sequence[Image.Image], path: Path) -> None:
    """The frames as an animated GIF that plays for ever."""
    frames[0].save(
        path, format="GIF", save_all=True, append_images=list(frames[1:]), duration=SHOWN_MILLISECONDS, loop=0
    )
