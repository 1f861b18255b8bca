"""Pictures with labels: splits, turning, folders, idx files, the sets that ship."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fallow.core.errors import ConfigError, DataError
from fallow.recipes import labelled
from fallow.recipes.labelled import GARMENTS, digits, folders, garments, held, joined, split, styles, turned


def test_digits_are_split_into_parts_that_share_no_picture():
    data = digits()
    assert data.read(torch.arange(2)).shape == (2, 1, 8, 8)
    assert float(data.read(torch.arange(len(data))).max()) == 1.0
    group = split("digits", data, seed=3)
    assert [len(part) for part in (group.train, group.held_out, group.test)] == [1078, 270, 449]
    every = [part.read(torch.arange(len(part))).sum((1, 2, 3)) for part in (group.train, group.held_out, group.test)]
    assert float(torch.cat(every).sum()) == pytest.approx(float(data.read(torch.arange(1797)).sum()))
    assert group.classes == list(range(10))
    again = split("digits", data, seed=3)
    assert torch.equal(again.test.labels, group.test.labels)
    assert not torch.equal(split("digits", data, seed=4).test.labels, group.test.labels)
    with pytest.raises(DataError, match="'few' has 2 pictures, too few"):
        split("few", data.part(torch.arange(2)), 0)


def test_parts_classes_and_few_pictures_keep_pixels_with_their_labels():
    data = held(torch.arange(12.0).view(12, 1, 1, 1), torch.arange(12) % 3)
    part = data.part(torch.tensor([5, 3, 8, 1])).of([2, 1])
    pixels, labels = part.batch(torch.arange(len(part)))
    assert pixels.flatten().tolist() == [5.0, 8.0, 1.0]
    assert labels.tolist() == [2, 2, 1]
    few = data.few(2, seed=0)
    assert sorted(few.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    pixels, labels = few.batch(torch.arange(6))
    assert (pixels.flatten().long() % 3).tolist() == labels.tolist()


def test_joined_sets_give_any_order_of_places():
    one, two = (
        held(torch.zeros(3, 1, 2, 2) + 1, torch.zeros(3).long()),
        held(torch.zeros(2, 1, 2, 2) + 2, torch.ones(2).long()),
    )
    both = joined([one, two])
    pixels, labels = both.batch(torch.tensor([4, 0, 3, 2]))
    assert pixels[:, 0, 0, 0].tolist() == [2.0, 1.0, 2.0, 1.0]
    assert labels.tolist() == [1, 0, 1, 0]


def test_quarters_are_exact_and_other_angles_agree_with_them():
    pixels = torch.rand(3, 1, 8, 8)
    assert torch.equal(turned(pixels, 90), pixels.rot90(1, (2, 3)))
    assert torch.equal(turned(pixels, 0), pixels)
    by_grid = turned(pixels, torch.tensor([90.0, 180.0, 270.0]))
    for at, quarter in enumerate((1, 2, 3)):
        torch.testing.assert_close(by_grid[at], pixels[at].rot90(quarter, (1, 2)), rtol=1e-4, atol=1e-4)


def picture(file: Path, value: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((10, 12, 3), value, np.uint8)).save(file)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two groups: one with train/ and test/, one without; classes cat and dog."""
    for half, number in (("train", 5), ("test", 2)):
        for at in range(number):
            for value, name in ((50, "cat"), (200, "dog")):
                picture(tmp_path / "sketch" / half / name / f"{at}.png", value)
    for at in range(10):
        picture(tmp_path / "photo" / "cat" / f"{at}.png", 50)
        picture(tmp_path / "photo" / "dog" / f"{at}.png", 200)
    return tmp_path


@pytest.mark.parametrize("in_memory", [True, False])
def test_folders_of_classes_are_groups(root: Path, in_memory: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(labelled, "HELD", labelled.HELD if in_memory else 0)
    groups, classes = folders(root, side=8, channels=3, seed=0)
    assert classes == ["cat", "dog"]
    assert [group.name for group in groups] == ["photo", "sketch"]
    photo, sketch = groups
    assert [len(part) for part in (photo.train, photo.held_out, photo.test)] == [12, 3, 5]
    assert [len(part) for part in (sketch.train, sketch.held_out, sketch.test)] == [8, 2, 4]
    pixels, labels = photo.train.batch(torch.arange(12))
    assert pixels.shape == (12, 3, 8, 8)
    torch.testing.assert_close(pixels[:, 0, 0, 0], torch.where(labels == 0, 50 / 255, 200 / 255))
    (only,), _ = folders(root, side=8, channels=1, seed=0, names=["sketch"])
    assert only.train.read(torch.arange(2)).shape == (2, 1, 8, 8)


def test_folders_that_are_laid_out_otherwise_are_refused_by_name(root: Path, tmp_path: Path):
    with pytest.raises(DataError, match="is no folder; give one that holds a folder for each task"):
        folders(root / "none", 8, 3, 0)
    with pytest.raises(DataError, match="has no folder 'cartoon'; it has photo, sketch"):
        folders(root, 8, 3, 0, ["cartoon"])
    (root / "photo" / "cat" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"bad\.png"):
        folders(root, 8, 3, 0)
    (tmp_path / "flat" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="has no pictures in folders of classes"):
        folders(tmp_path / "flat", 8, 3, 0)


def test_a_broken_picture_of_a_large_set_is_found_before_training(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(labelled, "HELD", 0)
    (root / "photo" / "cat" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"bad\.png cannot be read as a picture"):
        folders(root, 8, 3, 0)


def test_garments_are_read_from_idx_files_and_made_as_small_as_digits(tmp_path: Path):
    pixels = np.zeros((3, 28, 28), np.uint8)
    pixels[1, 2:6, 2:6] = 255  # four by four pixels of the padded picture: rows 4 to 7
    for name, array in (("images-idx3", pixels), ("labels-idx1", np.array([1, 9, 4], np.uint8))):
        head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    data = garments(tmp_path)
    found, labels = data.batch(torch.arange(3))
    assert found.shape == (3, 1, 8, 8)
    assert labels.tolist() == [1, 9, 4]
    assert found[1].nonzero().tolist() == [[0, 1, 1]]
    assert float(found[1, 0, 1, 1]) == 1.0
    with pytest.raises(DataError, match="install Debian's dataset-fashion-mnist"):
        garments(tmp_path, "t10k")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"x")
    with pytest.raises(DataError, match="is no idx file"):
        garments(tmp_path)


def test_shipped_styles_name_their_garments():
    (group,) = styles(["bronze"], seed=0)
    assert [len(part) for part in (group.train, group.held_out, group.test)] == [180, 20, 104]
    assert group.classes == list(range(8))
    assert GARMENTS[group.classes[0]] == "t-shirt"
    assert group.test.read(torch.arange(2)).shape == (2, 3, 32, 32)


def test_digits_without_scikit_learn_are_refused(monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        digits()
