"""A folder of pictures with captions, as training and judging read it; and the batches that training draws from it.

    pictures = read_pictures(Path("my-pictures"), prompt="a photo of sks dog")
    sizes = fit(pictures, resolution=512, multiple=8)          # a bucket for each picture
    batches = Batches(sizes, batch_size=4, seed=0)             # endless; all pictures of a batch have one size
    pixels = torch.stack([to_pixels(open_picture(pictures[i].path), sizes[i]) for i in next(batches)])

Captions, the first that is there: a line of `metadata.jsonl` ({"file_name": ..., "text": ...}), a `.txt` file beside
the picture, the one `prompt` for all. Everything is read once before any work begins, so that a picture that is cut
off is found now and not after an hour.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fallow.core.errors import ConfigError, DataError
from fallow.core.files import parse_json
from fallow.recipes.masks import check_mask, is_mask, mask_beside, transparent

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SMALLEST = 8  # pixels of the shorter side: one latent of Stable Diffusion's autoencoder
CAPTION_KEYS = ("text", "caption", "prompt")  # of a line of metadata.jsonl
LONGEST_NAME = 255  # letters; systems take no more
LONGEST = 2.0  # the most that a bucket's longer side is of its shorter
ORIENTATION = 0x0112  # EXIF tag; 5 to 8 are turned by a quarter
HOW_TO_CAPTION = (
    'give a line {"file_name": ..., "text": ...} in metadata.jsonl, a .txt file of the same name, or one prompt for all'
)

Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True)
class Picture:
    """One picture on disk: width and height in pixels as it is looked at, after its EXIF orientation.

    `mask`: the file that says which places count, the picture itself for its transparency, None for all places.
    `repeats`: how often it is seen while others are seen once.
    """

    path: Path
    caption: str
    width: int
    height: int
    mask: Path | None = None
    repeats: int = 1


@dataclass(frozen=True)
class Reading:
    """How a folder is read. `lines`: keep a caption's lines apart (they are wordings to draw from).

    `masks`: look for mask files; `alpha`: take a picture's transparency where it has no such file. `unmasked_weight`:
    what the loss weighs where a mask is black; at 0 a mask that is all black is refused.
    """

    lines: bool = False
    masks: bool = False
    alpha: bool = False
    unmasked_weight: float = 0.0


def read_pictures(folder: str | Path, prompt: str | None = None, how: Reading | None = None) -> list[Picture]:
    """The pictures of a folder (not of folders within it, unless metadata.jsonl names them), sorted by name.

    `prompt`: the caption of those that have none of their own; "" where captions do not matter. Every picture is
    decoded once. Raises DataError, which names the file: a folder that is missing, no folder, unreadable or without
    pictures; a picture that is broken or has a side below 8 pixels; a caption that is missing; metadata.jsonl with a
    broken line, or one that names a file that is not there; a mask that does not fit its picture.
    """
    folder, how = Path(folder).expanduser(), how or Reading()
    files = _files(folder)
    told = _metadata(folder)
    files = sorted({*files, *told} - {mask for _, mask in told.values() if mask is not None})
    if not files:
        raise DataError(_none_in(folder))
    out = []
    for file in files:
        width, height = _checked(file)
        caption, named = told.get(file, ("", None))
        caption = caption or _caption_beside(file, prompt)
        mask = _mask(file, named, (width, height), how)
        out.append(Picture(file, caption if how.lines else " ".join(caption.splitlines()), width, height, mask))
    return out


def _mask(file: Path, named: Path | None, size: Size, how: Reading) -> Path | None:
    """Where the picture's mask is, as Picture has it; checked."""
    mask = (named or mask_beside(file, SUFFIXES)) if how.masks else None
    try:
        if mask is None and how.alpha and transparent(file):
            mask = file
        if mask is not None:
            check_mask(file, mask, size, how.unmasked_weight)
    except DataError:
        raise
    except _UNREADABLE as error:
        raise DataError(_broken(mask or file, error)) from None
    return mask


def _files(folder: Path) -> list[Path]:
    if not folder.exists():
        raise DataError(f"{folder} does not exist; give a folder of pictures")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; give the folder that the pictures are in")
    found = _pictures_in(folder)
    names = {file.stem for file in found}
    return [file for file in found if not is_mask(file, names)]


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def _pictures_in(folder: Path) -> list[Path]:
    try:
        return [file for file in folder.iterdir() if _is_picture(file)]
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); make it readable, or give another") from None


def has_pictures(folder: Path) -> bool:
    """Whether there are pictures right in a folder. DataError where it cannot be read."""
    return bool(_pictures_in(folder))


def _none_in(folder: Path) -> str:
    within = sorted({file.parent for file in folder.rglob("*") if _is_picture(file)})
    hint = f"; there are some in {within[0]}: give that folder" if within else ""
    return f"{folder} holds no picture ({', '.join(SUFFIXES)}){hint}"


def _metadata(folder: Path) -> dict[Path, tuple[str, Path | None]]:
    """Picture -> caption and mask, as metadata.jsonl says; empty where there is no such file."""
    source = folder / "metadata.jsonl"
    if not source.exists():
        return {}
    try:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise DataError(f"{source} cannot be read: {reason}") from None
    found: dict[Path, tuple[str, Path | None]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise DataError(f'{where} is no JSON ({error}); write {{"file_name": ..., "text": ...}}') from None
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise DataError(f'{where} has no file_name; write {{"file_name": ..., "text": ...}}')
        file = folder / entry["file_name"]
        if Path(entry["file_name"]).is_absolute() or ".." in Path(entry["file_name"]).parts:
            raise DataError(f"{where} names {entry['file_name']}, which is not in the folder; move the picture there")
        if "\0" in entry["file_name"] or len(entry["file_name"]) > LONGEST_NAME or not file.is_file():
            raise DataError(f"{where} names {entry['file_name']:.200}, which is not there; add it or remove the line")
        if file in found:
            raise DataError(f"{where} names {entry['file_name']} again; keep one line for each picture")
        caption = next((entry[key] for key in CAPTION_KEYS if entry.get(key) is not None), "")
        if not isinstance(caption, str):
            raise DataError(f"{where}: the caption {caption!r} is no text; write it in quotation marks")
        found[file] = (caption.strip(), _named_mask(folder, entry.get("mask"), where))
    return found


def _named_mask(folder: Path, named: Any, where: str) -> Path | None:
    if named is None:
        return None
    if not isinstance(named, str) or not (folder / named).is_file():
        raise DataError(f"{where} names the mask {named!r}, which is not there; add the file or remove the key")
    return folder / named


def _caption_beside(file: Path, prompt: str | None) -> str:
    beside = file.with_suffix(".txt")
    if beside.is_file():
        try:
            lines = beside.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
            raise DataError(f"{beside} cannot be read: {reason}") from None
        if text := "\n".join(" ".join(line.split()) for line in lines if line.strip()):
            return text
    if prompt is None:
        raise DataError(f"{file} has no caption; {HOW_TO_CAPTION}")
    return prompt


def _checked(file: Path) -> Size:
    """Width and height as looked at; DataError where the picture cannot be decoded to its end, or is too small."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION, 1) >= 5
            image.draft("RGB", (width // 8, height // 8))  # a JPEG is then decoded at an eighth, still to its end
            image.load()
    except _UNREADABLE as error:
        raise DataError(_broken(file, error)) from None
    if min(width, height) < SMALLEST:
        raise DataError(
            f"{file} is {width}x{height} pixels; give pictures of at least {SMALLEST}x{SMALLEST}, or take it out"
        )
    return (height, width) if turned else (width, height)


# What Pillow's decoders raise for files that are no pictures, cut off, damaged, or bombs.
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError)


def _broken(file: Path, error: BaseException) -> str:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0].replace(f" '{file}'", "")
    return f"{file} cannot be read as a picture ({reason}); copy it again, or take it out of the folder"


def open_picture(path: str | Path) -> Image.Image:
    """The pixels in RGB: turned as EXIF says, on white where transparent, 16 bits brought to 8. Raises DataError."""
    try:
        with Image.open(path) as image:
            turned = ImageOps.exif_transpose(image)
            return rgb(turned)
    except _UNREADABLE as error:
        raise DataError(_broken(Path(path), error)) from None


def rgb(image: Image.Image) -> Image.Image:
    """In RGB: on white where transparent, 16 bits brought to 8."""
    if image.mode.startswith("I"):  # Pillow would cut 16-bit grey off at 255
        deep = np.asarray(image).astype(np.float64)
        image = Image.fromarray((deep / (257 if deep.max(initial=0) > 255 else 1)).clip(0, 255).round().astype("uint8"))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        above = image.convert("RGBA")
        below = Image.new("RGBA", above.size, "white")
        return Image.alpha_composite(below, above).convert("RGB")
    return image.convert("RGB")


# -- sizes ------------------------------------------------------------------------------------------------------------


def buckets(resolution: int, multiple: int = 8) -> list[Size]:
    """Sizes of about `resolution`^2 pixels, sides multiples of `multiple`, from 1:2 over the square to 2:1.

    Raises ConfigError where `resolution` is not a multiple itself.
    """
    if resolution < multiple or resolution % multiple:
        below = max(multiple, resolution // multiple * multiple)
        raise ConfigError(
            f"resolution={resolution} is not a multiple of {multiple}, which the model's autoencoder needs; give "
            f"{below} or {below + multiple}"
        )
    sizes = {(resolution, resolution)}
    for width in range(multiple, 2 * resolution, multiple):
        height = round(resolution**2 / width / multiple) * multiple
        if max(width, height) <= LONGEST * min(width, height):
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def fit(pictures: Sequence[Picture], resolution: int, multiple: int = 8, *, bucket: bool = True) -> list[Size]:
    """The size each picture is trained at: the bucket whose shape is nearest to its own, or always the square.

    Warns (UserWarning) where most of the pictures have fewer pixels than they are trained at: enlarged pictures teach
    blur. Raises ConfigError as `buckets`.
    """
    shapes = buckets(resolution, multiple)
    shapes = shapes if bucket else [(resolution, resolution)]
    sizes = [_nearest(picture.width / picture.height, shapes) for picture in pictures]
    enlarged = [p for p, (w, h) in zip(pictures, sizes, strict=True) if p.width < w or p.height < h]
    if 2 * len(enlarged) > len(pictures):
        first = enlarged[0]
        warnings.warn(
            f"{len(enlarged)} of {len(pictures)} pictures are smaller than resolution={resolution} (such as "
            f"{first.path.name}, {first.width}x{first.height}) and are enlarged, which teaches blur; lower it",
            stacklevel=2,
        )
    return sizes


def _nearest(ratio: float, shapes: Sequence[Size]) -> Size:
    return min(shapes, key=lambda size: (abs(math.log(ratio * size[1] / size[0])), size))


def to_pixels(image: Image.Image, size: Size) -> Tensor:
    """Resized until it covers `size` (width, height), then its centre: `(3, H, W)` float32 in [-1, 1]."""
    fitted = ImageOps.fit(image, size, Image.Resampling.LANCZOS) if image.size != size else image
    return torch.from_numpy(np.array(fitted, dtype=np.float32)).permute(2, 0, 1).div(127.5).sub(1).contiguous()


# -- batches ----------------------------------------------------------------------------------------------------------


class Batches(Iterator[list[int]]):
    """Endless batches of indices into `sizes`; all pictures of a batch have one size, and every batch is full.

    Each bucket is an endless stream: its pictures in an order drawn from (seed, bucket, round), then again in another.
    A batch takes the next `batch_size` of one bucket's stream, over the end of a round where it must, so that nothing
    is dropped, no batch is short, and within a bucket every picture is seen equally often. Which bucket is next is no
    chance: the one that is furthest behind its share of the pictures. So the batch of a step is a function of the
    sizes, the batch size, the seed and the step alone, and a resumed run goes on exactly where it stood.

    Raises ConfigError where there is no picture or `batch_size` < 1.
    """

    def __init__(self, sizes: Sequence[Size], batch_size: int, seed: int = 0) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} is no batch; give 1 or more")
        if not sizes:
            raise ConfigError("there is no picture to draw batches from; give one or more")
        by_size: dict[Size, list[int]] = {}
        for index, size in enumerate(sizes):
            by_size.setdefault((size[0], size[1]), []).append(index)
        self.members = [by_size[size] for size in sorted(by_size)]
        self.batch_size, self.seed, self.pictures = batch_size, seed, len(sizes)
        self.step = 0
        self._drawn = [0] * len(self.members)  # batches of each bucket so far
        self._order: dict[int, tuple[int, list[int]]] = {}  # bucket -> (round, order), the one in use

    def __next__(self) -> list[int]:
        bucket = self._next_bucket()
        begin = self._drawn[bucket] * self.batch_size
        out = [self._at(bucket, place) for place in range(begin, begin + self.batch_size)]
        self._advance(bucket)
        return out

    def __len__(self) -> int:
        """Batches in which about every picture is seen once."""
        return -(-self.pictures // self.batch_size)

    def _next_bucket(self) -> int:
        behind = [
            len(members) * (self.step + 1) - self.pictures * drawn
            for members, drawn in zip(self.members, self._drawn, strict=True)
        ]
        return behind.index(max(behind))

    def _advance(self, bucket: int) -> None:
        self._drawn[bucket] += 1
        self.step += 1

    def _at(self, bucket: int, place: int) -> int:
        turn, within = divmod(place, len(self.members[bucket]))
        if self._order.get(bucket, (-1, []))[0] != turn:
            rng = np.random.default_rng([self.seed % 2**63, bucket, turn])
            self._order[bucket] = (turn, rng.permutation(self.members[bucket]).tolist())
        return self._order[bucket][1][within]

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: `step`, and what that depends on."""
        return {"step": self.step, **self._depends_on()}

    def _depends_on(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "buckets": [len(members) for members in self.members],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after `state`. Raises ConfigError where pictures, batch size or seed are others: no going on then."""
        for name, value in self._depends_on().items():
            if state.get(name) != value:
                raise ConfigError(
                    f"the run to resume drew its batches with {name}={state.get(name)}, this one has {name}={value}; "
                    "resume with the same pictures and settings, or start a new run"
                )
        self.step, self._drawn = 0, [0] * len(self.members)
        while self.step < state["step"]:
            self._advance(self._next_bucket())
