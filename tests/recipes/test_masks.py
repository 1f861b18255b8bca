"""Masks: found, refused, and cut exactly as their pictures are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fallow.core.errors import DataError
from fallow.recipes.masks import latent_mask, mask_beside
from fallow.recipes.pictures import SUFFIXES, Reading, read_pictures, to_pixels


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (32, 32), colour: object = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


@pytest.mark.parametrize("name", ["a.mask.png", "a-masklabel.png", "masks/a.png", "masks/a.mask.jpg"])
def test_masks_are_found_by_their_name_and_are_no_pictures_themselves(tmp_path, name):
    save(tmp_path / "a.jpg")
    mask = save(tmp_path / name, "L", colour=255)
    assert mask_beside(tmp_path / "a.jpg", SUFFIXES) == mask
    (read,) = read_pictures(tmp_path, "a bag", Reading(masks=True))
    assert (read.path.name, read.mask) == ("a.jpg", mask)
    (read,) = read_pictures(tmp_path, "a bag")
    assert (read.path.name, read.mask) == ("a.jpg", None)


def test_a_picture_that_is_only_named_like_a_mask_stays_a_picture(tmp_path):
    save(tmp_path / "carnival.mask.png")
    assert [picture.path.name for picture in read_pictures(tmp_path, "a mask")] == ["carnival.mask.png"]


def test_metadata_may_name_the_mask(tmp_path):
    save(tmp_path / "a.png")
    mask = save(tmp_path / "where.png", "L", colour=255)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a", "mask": "where.png"}))
    (read,) = read_pictures(tmp_path, None, Reading(masks=True))
    assert (read.path.name, read.mask) == ("a.png", mask)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a", "mask": "gone.png"}))
    with pytest.raises(DataError, match=r"line 1 names the mask 'gone\.png', which is not there"):
        read_pictures(tmp_path, None, Reading(masks=True))


def test_transparency_is_the_mask_of_pictures_that_have_one_and_no_mask_file(tmp_path):
    save(tmp_path / "a.png", "RGBA", colour=(9, 9, 9, 128))
    save(tmp_path / "b.png")
    save(tmp_path / "c.png", "RGBA", colour=(9, 9, 9, 128))
    mask = save(tmp_path / "c.mask.png", "L", colour=255)
    read = read_pictures(tmp_path, "a bag", Reading(masks=True, alpha=True))
    assert [picture.mask for picture in read] == [tmp_path / "a.png", None, mask]
    assert latent_mask(read[0].path, read[0].path, (32, 32), (32, 32), (4, 4), False).unique().tolist() == [
        pytest.approx(128 / 255)
    ]


def test_a_mask_that_is_black_everywhere_is_refused_unless_black_weighs_something(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "a.mask.png", "L")
    with pytest.raises(DataError, match=r"a\.mask\.png as a mask is black everywhere.*unmasked_weight above 0"):
        read_pictures(tmp_path, "a bag", Reading(masks=True))
    assert read_pictures(tmp_path, "a bag", Reading(masks=True, unmasked_weight=0.1))[0].mask is not None


def test_a_mask_of_another_shape_or_that_is_broken_is_refused(tmp_path):
    save(tmp_path / "a.png", size=(64, 32))
    save(tmp_path / "a.mask.png", "L", (32, 32), 255)
    with pytest.raises(DataError, match=r"as a mask is 32x32 pixels and its picture 64x32"):
        read_pictures(tmp_path, "a bag", Reading(masks=True))
    (tmp_path / "a.mask.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"a\.mask\.png cannot be read as a picture"):
        read_pictures(tmp_path, "a bag", Reading(masks=True))


@pytest.mark.parametrize("mirror", [False, True])
def test_a_mask_is_cut_and_mirrored_as_its_picture(tmp_path, mirror):
    """A picture that is itself black and white is its own mask: what training sees of both must lie on each other."""
    grey = np.zeros((48, 96), dtype=np.uint8)
    grey[:, 40:72] = 255
    Image.fromarray(grey).convert("RGB").save(tmp_path / "a.png")
    Image.fromarray(grey).save(tmp_path / "a.mask.png")
    picture = Image.open(tmp_path / "a.png")
    pixels = to_pixels(ImageOps.mirror(picture) if mirror else picture, (48, 48))
    wanted = (pixels[:1] / 2 + 0.5).view(1, 6, 8, 6, 8).mean((2, 4))
    found = latent_mask(tmp_path / "a.png", tmp_path / "a.mask.png", (96, 48), (48, 48), (6, 6), mirror)
    assert found.shape == (1, 6, 6)
    assert torch.allclose(found, wanted, atol=0.01)
    assert not torch.equal(found, found.flip(2))


def test_a_mask_of_another_size_but_the_same_shape_is_enlarged(tmp_path):
    grey = np.zeros((16, 16), dtype=np.uint8)
    grey[:8] = 255
    save(tmp_path / "a.png", size=(64, 64))
    Image.fromarray(grey).save(tmp_path / "a.mask.png")
    found = latent_mask(tmp_path / "a.png", tmp_path / "a.mask.png", (64, 64), (32, 32), (4, 4), False)
    assert found[0, :, 0].tolist() == [1.0, pytest.approx(1.0, abs=0.1), pytest.approx(0.0, abs=0.1), 0.0]
