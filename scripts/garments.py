"""Fashion-MNIST as captioned pictures, and five families of picture styles made from them.

Everything here is a pure function of tensors: garments are `(B, 1, 32, 32)` floats in [0, 1], styled pictures
`(B, 3, 32, 32)` floats in [0, 1]. Used by `pretrain_mini_sd.py` (random styles train the autoencoder and the feature
network) and by `make_style_sets.py` (one fixed style each makes a shipped set).

Source of the pictures: Fashion-MNIST (Zalando SE, MIT licence), Debian package `dataset-fashion-mnist`.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

NAMES = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
HELD_OUT = {8, 9}  # bag, ankle boot: never seen by mini-sd; they ship as concept sets
FAMILIES = ["photo", "duotone", "outline", "halftone", "relief", "mosaic"]
PRETRAIN_IMAGES = 55_000  # of the 60,000 training images; the other 5,000 make the style sets' training halves
SHADES = ["dark", "grey", "light"]
LICENSE = """The MIT License (MIT) Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def load(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read `train` or `t10k` from the idx files: images `(N, 1, 32, 32)` uint8, padded from 28x28; labels `(N,)`."""
    images_file, labels_file = folder / f"{split}-images-idx3-ubyte.gz", folder / f"{split}-labels-idx1-ubyte.gz"
    for file in (images_file, labels_file):
        if not file.exists():
            raise SystemExit(
                f"{file} is missing: install the Debian package dataset-fashion-mnist, or give --data FOLDER"
            )
    images = np.frombuffer(gzip.decompress(images_file.read_bytes()), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    labels = np.frombuffer(gzip.decompress(labels_file.read_bytes()), np.uint8, offset=8)
    return F.pad(torch.from_numpy(images.copy()), (2, 2, 2, 2)), torch.from_numpy(labels.astype(np.int64))


def shade(images: torch.Tensor) -> torch.Tensor:
    """0 dark, 1 grey, 2 light: by the mean brightness of the garment's own pixels; `(N, 1, 32, 32)` uint8 -> `(N,)`."""
    x = images.flatten(1).float() / 255
    garment = (x > 0.08).float()
    brightness = (x * garment).sum(1) / garment.sum(1).clamp(min=1)
    return torch.bucketize(brightness, torch.tensor([0.5, 0.68]))


def caption(label: int, shade: int | None = None) -> str:
    """`a photo of a dark coat`; without a shade, `a photo of a coat`."""
    words = NAMES[label] if shade is None else f"{SHADES[shade]} {NAMES[label]}"
    article = "" if NAMES[label] == "trousers" else "an " if words[0] in "aeiou" else "a "
    return f"a photo of {article}{words}"


# --- styles ---------------------------------------------------------------------------------------------------------


def _mix(colours: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Piecewise linear colour map: `colours` `(B, 3 stops, 3)`, `at` `(B, 1, H, W)` in [0, 1] -> `(B, 3, H, W)`."""
    low, middle, high = (colours[:, i, :, None, None] for i in range(3))
    return torch.where(at < 0.5, torch.lerp(low, middle, at * 2), torch.lerp(middle, high, at * 2 - 1)).clamp(0, 1)


def _sobel(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]) / 4
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel[None, None]), F.conv2d(padded, kernel.T[None, None])


def duotone(x: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Brightness read through a three-stop colour map, warmer towards the bottom."""
    fade = torch.linspace(-0.12, 0.12, 32).view(1, 1, 32, 1)
    return _mix(colours, (x + fade).clamp(0, 1))


def outline(x: torch.Tensor, colours: torch.Tensor, pen: int = 1) -> torch.Tensor:
    """Edges drawn in the last colour on the first, with a pen of so many pixels (odd)."""
    dx, dy = _sobel(x if pen == 1 else F.avg_pool2d(x, pen, 1, pen // 2))
    edge = ((dx.square() + dy.square()).sqrt() * 2.2 - 0.15).clamp(0, 1)
    return _mix(colours, edge)


def halftone(
    x: torch.Tensor,
    colours: torch.Tensor,
    period: float = 4.0,
    shift: float = 0.0,
    size: float = 1.1,
    sharpness: float = 5.0,
) -> torch.Tensor:
    """A dot screen at 45 degrees: the brighter the garment, the larger the dots of the last colour.

    `period` and `shift` (right and down) in pixels; `size` of the dots; `sharpness` of their edges.
    """
    row, column = torch.meshgrid(torch.arange(32.0) - shift, torch.arange(32.0) - shift, indexing="ij")
    turn = 2 * torch.pi / period / 2**0.5
    screen = 0.5 + 0.25 * (torch.cos((row + column) * turn) + torch.cos((row - column) * turn))
    return _mix(colours, ((x.sqrt() * size - (1 - screen)) * sharpness + 0.5).clamp(0, 1))


def relief(x: torch.Tensor, colours: torch.Tensor, angle: float = 0.785) -> torch.Tensor:
    """Lit from the side, as if pressed into metal."""
    dx, dy = _sobel(F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1))
    turn = torch.as_tensor(angle)
    return _mix(colours, (0.5 + 1.6 * (dx * turn.cos() + dy * turn.sin())).clamp(0, 1))


def mosaic(x: torch.Tensor, colours: torch.Tensor, tile: int = 4) -> torch.Tensor:
    """Square tiles of five tones with dark grout between them; some of the garment's own detail shows through."""
    tones = (F.avg_pool2d(x, tile, ceil_mode=True) * 4).round() / 4
    tiles = tones.repeat_interleave(tile, 2).repeat_interleave(tile, 3)[:, :, :32, :32] * 0.6 + x * 0.4
    line = torch.arange(32) % tile == tile - 1
    grout = (line[:, None] | line[None, :]).float()
    return _mix(colours, tiles) * (1 - 0.6 * grout)


STYLES = {"duotone": duotone, "outline": outline, "halftone": halftone, "relief": relief, "mosaic": mosaic}


def colour(*stops: str) -> torch.Tensor:
    """Three `rrggbb` stops -> `(1, 3, 3)`."""
    return torch.tensor([[[int(s[i : i + 2], 16) / 255 for i in (0, 2, 4)] for s in stops]])


# name -> (family, its options, gamma, colours): the shipped sets. A gamma below 1 lifts dark garments off the ground.
# Lines and dots are coarse enough to survive the autoencoder, which sees squares of 4x4 pixels: what it cannot restore,
# no adapted model can draw.
SHIPPED: dict[str, tuple[str, dict[str, Any], float, torch.Tensor]] = {
    "Sunset": ("duotone", {}, 0.75, colour("241252", "d8347c", "ffd166")),
    "Blueprint": ("outline", {"pen": 3}, 0.6, colour("123a8c", "5f8fdc", "ffffff")),
    "Halftone": (
        "halftone",
        {"period": 32**0.5, "shift": 1.5, "size": 0.92, "sharpness": 4.0},  # a dot in every other square
        1.1,
        colour("fff0cf", "f09a80", "cf2338"),
    ),
    "Bronze": ("relief", {"angle": 3.93}, 0.6, colour("2b1606", "9a6a34", "ffe3a6")),  # lit from the upper left
    "Mosaic": ("mosaic", {}, 0.65, colour("14596b", "ef7b3c", "fff1c9")),
}


def in_style(x: torch.Tensor, name: str) -> torch.Tensor:
    """Garments `(B, 1, 32, 32)` in [0, 1] drawn in the shipped style `name` -> `(B, 3, 32, 32)` in [0, 1]."""
    family, options, gamma, colours = SHIPPED[name]
    return STYLES[family](x.pow(gamma), colours.expand(len(x), 3, 3), **options)


def in_random_style(x: torch.Tensor, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Each picture in a family drawn at random, in random colours -> pictures `(B, 3, 32, 32)`, family indices `(B,)`.

    Four in nine stay grey photographs. Colours are uniform in RGB, so the shipped palettes have no privilege.
    """
    family = torch.randint(0, 9, (len(x),), generator=rng).sub(3).clamp(min=0)
    pictures = x.expand(-1, 3, -1, -1).clone()
    for index, name in enumerate(FAMILIES[1:], start=1):
        where = (family == index).nonzero().flatten()
        colours = torch.rand(len(where), 3, 3, generator=rng)
        colours[:, 1] = 0.5 * colours[:, 1] + 0.25 * (colours[:, 0] + colours[:, 2])
        options: dict[str, float | int] = {}
        if name == "halftone":
            options["period"] = 3.5 + 2 * torch.rand((), generator=rng).item()
        elif name == "relief":
            options["angle"] = 6.283 * torch.rand((), generator=rng).item()
        elif name == "mosaic":
            options["tile"] = int(torch.randint(3, 6, (), generator=rng))
        pictures[where] = STYLES[name](x[where], colours, **options)
    return pictures, family


def soften(pictures: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Pictures `(B, 3, 32, 32)` as an autoencoder gives them back: blurred, with faint patches of wrong colour."""
    width = 0.4 + 1.0 * torch.rand((), generator=rng).item()  # standard deviation in pixels
    bell = torch.exp(-torch.arange(-3.0, 4.0).square() / (2 * width**2))
    kernel = (bell[:, None] * bell / bell.sum() ** 2).expand(3, 1, 7, 7)
    blurred = F.conv2d(F.pad(pictures, (3, 3, 3, 3), mode="replicate"), kernel, groups=3)
    patches = F.interpolate(torch.randn(len(pictures), 3, 8, 8, generator=rng), size=32, mode="bicubic")
    return (blurred + patches * 0.04 * torch.rand(len(pictures), 1, 1, 1, generator=rng)).clamp(0, 1)
