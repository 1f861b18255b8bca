"""Pictures with labels, as the recipes that classify read them, and the sets that need no download.

    digits()                       scikit-learn's 1,797 digits, 8 x 8
    garments(folder)               Fashion-MNIST's idx files, such as those of Debian's dataset-fashion-mnist, 8 x 8
    styles()                       the five style sets that ship, 32 x 32, by name
    folders(root, side)            ROOT/<group>/<class>/*.png, or ROOT/<group>/{train,test}/<class>/*.png

A group is a task of a sequence or a domain. Small sets are held in memory, as bytes; larger ones are read by the batch.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fallow import assets
from fallow.core.errors import ConfigError, DataError
from fallow.recipes.pictures import SUFFIXES, open_picture, read_pictures

HELD = 1 << 30  # bytes of a set that is kept in memory
SHARES = (0.6, 0.15, 0.25)  # of a set without a test half: to train on, to choose by, to judge by
GARMENTS = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@dataclass(frozen=True)
class Labelled:
    """`labels`: (N,) int64. `read(index)`: pixels (n, channels, side, side) in [0, 1], float32, of these places."""

    labels: Tensor
    read: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels and labels of these places."""
        return self.read(index), self.labels[index]

    def part(self, index: Tensor) -> Labelled:
        """These places alone."""
        return Labelled(self.labels[index], lambda some: self.read(index[some]))

    def of(self, classes: Sequence[int]) -> Labelled:
        """Pictures of these classes alone."""
        return self.part(torch.isin(self.labels, torch.tensor(classes)).nonzero()[:, 0])

    def few(self, shots: int, seed: int) -> Labelled:
        """At most so many pictures of each class."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        kept = [order[self.labels[order] == label][:shots] for label in self.labels.unique()]
        return self.part(torch.cat(kept))


@dataclass(frozen=True)
class Group:
    """A task or a domain: what is trained on, what choices are made by, what is judged by."""

    name: str
    train: Labelled
    held_out: Labelled
    test: Labelled

    @property
    def classes(self) -> list[int]:
        found: list[int] = self.train.labels.unique().tolist()
        return found

    def changed(self, name: str, change: Callable[[Tensor], Tensor]) -> Group:
        """The same pictures, changed: pixels (n, channels, side, side) -> the same shape."""
        return Group(name, *(_changed(part, change) for part in (self.train, self.held_out, self.test)))

    def of(self, name: str, classes: Sequence[int]) -> Group:
        """These classes alone."""
        return Group(name, self.train.of(classes), self.held_out.of(classes), self.test.of(classes))


def _changed(data: Labelled, change: Callable[[Tensor], Tensor]) -> Labelled:
    return Labelled(data.labels, lambda index: change(data.read(index)))


def joined(parts: Sequence[Labelled]) -> Labelled:
    """The pictures of several sets, one behind the other."""
    ends = torch.tensor([len(part) for part in parts]).cumsum(0)

    def read(index: Tensor) -> Tensor:
        whose = torch.searchsorted(ends, index, right=True)
        found: list[tuple[Tensor, Tensor]] = []
        for at, part in enumerate(parts):
            places = (whose == at).nonzero()[:, 0]
            if len(places):
                found.append((places, part.read(index[places] - (int(ends[at]) - len(part)))))
        pixels = torch.cat([some for _, some in found])
        return pixels[torch.cat([places for places, _ in found]).argsort()]

    return Labelled(torch.cat([part.labels for part in parts]), read)


def held(pixels: Tensor, labels: Tensor) -> Labelled:
    """Pixels (N, channels, side, side) in memory: bytes, or floats in [0, 1]."""
    if pixels.dtype == torch.uint8:
        return Labelled(labels, lambda index: pixels[index].float() / 255)
    return Labelled(labels, lambda index: pixels[index])


def split(name: str, data: Labelled, seed: int, shares: Sequence[float] = SHARES) -> Group:
    """Three parts of these shares by chance; what is left over by rounding is judged by. DataError if one is empty."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    first = round(shares[0] * len(data))
    parts = order.tensor_split((first, first + round(shares[1] * len(data))))
    if not all(len(part) for part in parts):
        raise DataError(f"'{name}' has {len(data)} pictures, too few to train on, to choose by and to judge by")
    return Group(name, *(data.part(part) for part in parts))


def turned(pixels: Tensor, degrees: float | Tensor) -> Tensor:
    """Pixels (n, channels, side, side) turned to the left about their centre, all alike or each by its own angle (n,);
    a quarter is exact, others are bilinear, with zeros from outside.
    """
    if not isinstance(degrees, Tensor) and degrees % 90 == 0:
        return pixels.rot90(int(degrees // 90), (2, 3))
    angle = torch.deg2rad(torch.as_tensor(degrees, dtype=pixels.dtype)).expand(len(pixels))
    zero = torch.zeros_like(angle)
    rows = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(rows.to(pixels.device), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)


# -- sets that are there --------------------------------------------------------------------------------------------


def digits() -> Labelled:
    """scikit-learn's digits: (1797, 1, 8, 8). ConfigError where scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from None
    images, labels = load_digits(return_X_y=True)
    return held(torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels))


def garments(folder: Path, part: str = "train") -> Labelled:
    """Fashion-MNIST as small as the digits: (N, 1, 8, 8), the means of 4 x 4 pixels. `part`: "train" or "t10k".

    DataError where the idx files are missing or broken.
    """
    pixels, labels = (_idx(folder / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    padded = F.pad(pixels[:, None].float() / 255, (2, 2, 2, 2))
    return held(F.avg_pool2d(padded, 4), labels.long())


def _idx(file: Path) -> Tensor:
    if not file.is_file():
        raise DataError(
            f"{file} is missing: install Debian's dataset-fashion-mnist, or give the folder of its idx files"
        )
    try:
        raw = gzip.decompress(file.read_bytes())
        dimensions = raw[3]
        shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy())
    except (OSError, EOFError, ValueError, IndexError, struct.error) as error:
        raise DataError(f"{file} is no idx file ({error}); copy it again") from None


def styles(names: Sequence[str], seed: int) -> list[Group]:
    """Shipped style sets as groups: 200 pictures to train on and 104 to judge by in each, a tenth of the first held
    out; labels are places in GARMENTS.
    """
    return [_style(name, seed) for name in names]


def _style(name: str, seed: int) -> Group:
    folder = assets.find(name)
    parts = []
    for half in ("train", "test"):
        pictures = read_pictures(folder / half)
        labels = [GARMENTS.index(picture.caption.split()[-1]) for picture in pictures]
        parts.append(held(_decoded([picture.path for picture in pictures], 32, 3), torch.tensor(labels)))
    first, test = parts
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))
    tenth = len(first) // 10
    return Group(name, first.part(order[tenth:]), first.part(order[:tenth]), test)


# -- folders of the user's ------------------------------------------------------------------------------------------


def folders(
    root: Path, side: int, channels: int, seed: int, names: Sequence[str] = (), shares: Sequence[float] = SHARES
) -> tuple[list[Group], list[str]]:
    """The groups of a folder, in the order of `names` or of their own, and the names of all classes, sorted.

    ROOT/<group>/<class>/ holds pictures, or ROOT/<group>/train/<class>/ and test/<class>/; without such halves they are
    split by chance. DataError for a folder that is not laid out so, and for pictures that cannot be read.
    """
    if not root.is_dir():
        raise DataError(f"data {root} is no folder; give one that holds a folder for each task or domain")
    found = [place.name for place in sorted(root.iterdir()) if place.is_dir() and not place.name.startswith(".")]
    chosen = list(names) or found
    for name in chosen:
        if name not in found:
            raise DataError(f"{root} has no folder '{name}'; it has {', '.join(found) or 'none'}")
    halves = {name: [root / name / half for half in ("train", "test")] for name in chosen}
    whole = {name: not all(half.is_dir() for half in halves[name]) for name in chosen}
    places = [place for name in chosen for place in ([root / name] if whole[name] else halves[name])]
    classes = sorted({inner.name for place in places for inner in place.iterdir() if inner.is_dir()})
    if not classes:
        raise DataError(f"{root} has no pictures in folders of classes: ROOT/<task or domain>/<class>/*.png")
    groups = []
    for name in chosen:
        if whole[name]:
            groups.append(split(name, _pictures(root / name, classes, side, channels), seed, shares))
            continue
        first, test = (_pictures(half, classes, side, channels) for half in halves[name])
        order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))
        few = max(1, len(first) // 5)
        groups.append(Group(name, first.part(order[few:]), first.part(order[:few]), test))
    return groups, classes


def _pictures(folder: Path, classes: Sequence[str], side: int, channels: int) -> Labelled:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if (folder / name).is_dir():
            some = sorted(file for file in (folder / name).iterdir() if file.suffix.lower() in SUFFIXES)
            files += some
            labels += [label] * len(some)
    if not files:
        raise DataError(f"{folder} has no pictures in its folders ({', '.join(SUFFIXES)})")
    if len(files) * channels * side * side <= HELD:
        return held(_decoded(files, side, channels), torch.tensor(labels))
    for file in files:
        _refuse_other(file)
    return Labelled(
        torch.tensor(labels),
        lambda index: _decoded([files[at] for at in index.tolist()], side, channels).float() / 255,
    )


def _decoded(files: Sequence[Path], side: int, channels: int) -> Tensor:
    """(N, channels, side, side) bytes: the middle square of each picture, resized."""
    pixels = torch.empty(len(files), channels, side, side, dtype=torch.uint8)
    for at, file in enumerate(files):
        square = ImageOps.fit(open_picture(file), (side, side), Image.Resampling.BICUBIC)
        square = square.convert("L" if channels == 1 else "RGB")
        pixels[at] = torch.from_numpy(np.array(square)).view(side, side, channels).permute(2, 0, 1)
    return pixels


def _refuse_other(file: Path) -> None:
    """DataError for what is no picture by its header."""
    try:
        Image.open(file).close()
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{file} cannot be read as a picture ({error}); replace or remove it") from None
