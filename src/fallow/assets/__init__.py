"""What ships with Fallow: mini-sd, the garment net that judges its pictures, five style sets and two concept sets.

    find("blueprint")       # the shipped set, upper or lower case: a folder with train/ and test/
    find("./my-pictures")   # a folder of the user's

How each was made and under which licence stands in the README.md and LICENSE beside it.
"""

from __future__ import annotations

from pathlib import Path

from fallow.core.errors import DataError, nearest

FOLDER = Path(__file__).resolve().parent
MINI_SD = FOLDER / "mini-sd"  # a diffusers StableDiffusionPipeline directory
GARMENT_NET = FOLDER / "garment-net"  # read by fallow.analysis.features.GarmentNet

STYLES = {name: FOLDER / "styles" / name for name in ("sunset", "blueprint", "halftone", "bronze", "mosaic")}
CONCEPTS = {name: FOLDER / "concepts" / name for name in ("bag", "ankle-boot")}  # garments mini-sd has never seen


def find(name_or_path: str | Path) -> Path:
    """The folder of a shipped set by its name, or a user's folder by its path (`~` is the home directory).

    A shipped name, upper or lower case, `ankle boot` as well as `ankle-boot`, always means the shipped set: what a
    command does never depends on the folder it is run in. A folder of that same name is given as `./sunset`.

    Raises DataError for a name that neither ships nor is a folder, and for a path that is a file.
    """
    text, shipped = str(name_or_path).strip(), STYLES | CONCEPTS
    name = text.lower().replace(" ", "-")
    if name in shipped:
        return shipped[name]
    if not text:
        raise DataError(f"data is empty; give a shipped set ({', '.join(shipped)}) or the path of a folder")
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise DataError(f"data {text} is a file; give the folder that holds it, or a shipped set: {', '.join(shipped)}")
    what = "is no shipped set and no folder" if folder.name == text else "is no folder"
    raise DataError(f"data {text} {what}{nearest(name, shipped)}; give a shipped set's name or the path of a folder")
