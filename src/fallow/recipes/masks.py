"""Masks: which places of a picture the loss looks at, white for "learn this", black for "ignore".

A picture's mask is, the first that is there: the `mask` of its line in metadata.jsonl; `name.mask.png` or
`name-masklabel.png` beside it; `masks/name.png` in the folder beside it (any kind of picture file); or, where asked
for, its own transparency, opaque being white. It is cut, resized and mirrored exactly as the picture is, then averaged
over the area of each latent.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from fallow.core.errors import DataError

BESIDE = (".mask", "-masklabel")  # behind the picture's own name: sd-scripts' and OneTrainer's way of naming masks
FOLDER = "masks"
SAME_SHAPE = 0.02  # how much the ratio of the sides may differ, for masks that were made at another size


def is_mask(file: Path, names: set[str]) -> bool:
    """Whether a file is the mask of a picture beside it; `names`: those of all files of the folder, without suffix."""
    return any(file.stem.endswith(end) and file.stem.removesuffix(end) in names for end in BESIDE)


def mask_beside(picture: Path, suffixes: tuple[str, ...]) -> Path | None:
    """The mask file that belongs to a picture by its name, if there is one."""
    places = [(picture.parent, picture.stem + end) for end in BESIDE]
    places += [(picture.parent / FOLDER, stem) for stem in (picture.stem, *(picture.stem + end for end in BESIDE))]
    for folder, stem in places:
        for suffix in suffixes:
            if (file := folder / f"{stem}{suffix}").is_file() and file != picture:
                return file
    return None


def transparent(picture: Path) -> bool:
    """Whether a picture has a transparency of its own."""
    with Image.open(picture) as image:
        return "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info


def open_mask(picture: Path, mask: Path) -> Image.Image:
    """The mask of a picture as grey, turned as EXIF says; its own transparency where `mask` is the picture itself.

    Raises OSError and what else Pillow raises for files that cannot be decoded.
    """
    with Image.open(mask) as image:
        turned = ImageOps.exif_transpose(image)
        if mask == picture:
            return turned.convert("RGBA").getchannel("A")
        return turned.convert("RGB").convert("L")


def check_mask(picture: Path, mask: Path, size: tuple[int, int], unmasked_weight: float) -> None:
    """DataError where the mask has another shape than its picture (`size`: width, height), or is black everywhere."""
    shown = open_mask(picture, mask)
    where = f"the transparency of {picture}" if mask == picture else str(mask)
    if abs(shown.width * size[1] / (shown.height * size[0]) - 1) > SAME_SHAPE:
        raise DataError(
            f"{where} as a mask is {shown.width}x{shown.height} pixels and its picture {size[0]}x{size[1]}; give one "
            "of the same shape"
        )
    if unmasked_weight == 0 and shown.getextrema()[1] == 0:
        raise DataError(
            f"{where} as a mask is black everywhere, so that nothing of the picture would be learnt; paint white what "
            "counts, take the picture out, or give unmasked_weight above 0"
        )


def latent_mask(
    picture: Path, mask: Path, own: tuple[int, int], size: tuple[int, int], latent: tuple[int, int], mirror: bool
) -> Tensor:
    """(1, h, w) float32 in [0, 1]: the mask of a picture of `own` (width, height) pixels that is trained at `size`.

    `latent`: h and w of its latents.
    """
    shown = open_mask(picture, mask)
    if shown.size != own:
        shown = shown.resize(own, Image.Resampling.BILINEAR)
    if mirror:
        shown = ImageOps.mirror(shown)
    fitted = ImageOps.fit(shown, size, Image.Resampling.BILINEAR) if shown.size != size else shown
    pixels = torch.from_numpy(np.array(fitted, dtype=np.float32)).div(255)
    return adaptive_avg_pool2d(pixels[None, None], latent)[0]
