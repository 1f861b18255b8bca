"""The shipped picture sets: how many pictures, of what, under which captions and licence."""

from __future__ import annotations

import fnmatch
import json
import sys
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fallow import assets
from fallow.analysis.judges import class_in
from fallow.recipes.pictures import read_pictures

ROOT = Path(__file__).parents[2]
SETS = assets.STYLES | assets.CONCEPTS
GARMENTS = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker"]
NAMES = [*GARMENTS, "bag", "ankle boot"]
COUNTS = {**dict.fromkeys(assets.STYLES, (200, 104)), **dict.fromkeys(assets.CONCEPTS, (150, 100))}


def pixels(name: str, half: str) -> np.ndarray:
    """All pictures of a half, `(N, 32, 32, 3)` uint8, in the order of their names."""
    return np.stack([np.array(Image.open(path)) for path in sorted((SETS[name] / half).glob("*.png"))])


def captions(name: str, half: str) -> list[str]:
    lines = [json.loads(line) for line in (SETS[name] / half / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == sorted(p.name for p in (SETS[name] / half).glob("*.png"))
    return [line["text"] for line in lines]


@pytest.fixture(scope="module")
def making():
    """The modules `garments` and `make_style_sets` of scripts/."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import garments
        import make_style_sets
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return garments, make_style_sets


@pytest.mark.parametrize("name", SETS)
def test_a_set_holds_so_many_small_rgb_pictures_in_each_half(name):
    for half, count in zip(("train", "test"), COUNTS[name], strict=True):
        files = sorted((SETS[name] / half).glob("*.png"))
        assert len(files) == count
        for file in files:
            with Image.open(file) as picture:
                assert (picture.size, picture.mode) == ((32, 32), "RGB")


@pytest.mark.parametrize("name", SETS)
def test_no_picture_is_in_both_halves_or_twice_in_a_half(name):
    halves = {half: [picture.tobytes() for picture in pixels(name, half)] for half in ("train", "test")}
    assert not set(halves["train"]) & set(halves["test"])
    for half in halves.values():
        assert len(set(half)) == len(half)


@pytest.mark.parametrize("name", assets.STYLES)
def test_captions_of_a_style_begin_with_its_name_and_the_eight_garments_are_in_equal_numbers(name):
    for half, each in (("train", 25), ("test", 13)):
        texts = captions(name, half)
        shades = {word for text in texts for word in text.split() if word in ("dark", "grey", "light")}
        assert all(text.startswith(f"{name.capitalize()} style, a photo of ") for text in texts)
        assert shades == {"dark", "grey", "light"}
        assert Counter(NAMES[class_in(text, NAMES)] for text in texts) == dict.fromkeys(GARMENTS, each)
        assert Counter(NAMES[class_in(text, NAMES)] for text in texts[:40]) == dict.fromkeys(GARMENTS, 5)


@pytest.mark.parametrize(("name", "garment"), [("bag", "bag"), ("ankle-boot", "ankle boot")])
def test_concept_sets_are_grey_photographs_whose_captions_say_garment_and_shade(name, garment):
    for half in ("train", "test"):
        grey, texts = pixels(name, half), captions(name, half)
        assert (grey == grey[..., :1]).all()
        for picture, text in zip(grey[..., 0] / 255, texts, strict=True):
            brightness = picture[picture > 0.08].mean()
            shade = "dark" if brightness < 0.5 else "grey" if brightness < 0.68 else "light"
            assert text == f"a photo of a {shade} {garment}"


def test_sets_differ_in_colour_more_than_pictures_of_one_set_do():
    """Each style is plainly its own: from mean colours alone, the nearest set's mean is the picture's own set."""
    means = {name: pixels(name, "train").mean((1, 2)) for name in assets.STYLES}
    centres = np.stack([mean.mean(0) for mean in means.values()])
    for index, name in enumerate(assets.STYLES):
        test = pixels(name, "test").mean((1, 2))
        nearest = np.square(test[:, None] - centres).sum(-1).argmin(1)
        assert (nearest == index).mean() > 0.9, name


def test_the_recipes_read_a_set_with_its_captions():
    pictures = read_pictures(assets.STYLES["mosaic"] / "test")
    assert len(pictures) == 104
    assert pictures[3].caption == captions("mosaic", "test")[3]


def test_licence_and_origin_stand_beside_the_pictures():
    for folder in (*SETS.values(), assets.FOLDER / "styles", assets.FOLDER / "concepts"):
        text = (folder / "LICENSE").read_text()
        assert "Copyright (c) 2017 Zalando SE" in text
        assert "Permission is hereby granted, free of charge" in text
    for folder in ("styles", "concepts"):
        card = (assets.FOLDER / folder / "README.md").read_text()
        assert "Fashion-MNIST" in card
        assert "scripts/make_style_sets.py" in card
        assert "{" not in card.replace('{"file_name', "")


def test_all_sets_together_are_small():
    files = [file for folder in ("styles", "concepts") for file in (assets.FOLDER / folder).rglob("*")]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 3_000_000


def test_a_wheel_takes_the_sets_along():
    """Hatchling packs everything of the packages that git does not ignore."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["src/fallow"]}
    ignored = [line for line in (ROOT / ".gitignore").read_text().split() if not line.startswith("#")]
    for file in assets.FOLDER.rglob("*"):
        path = file.relative_to(ROOT)
        if path.suffix == ".pyc" or path.name == "__pycache__":
            continue
        ways = [*path.parts, path.as_posix()]
        anchored = [pattern[1:].rstrip("/") for pattern in ignored if pattern.startswith("/")]
        free = [pattern.rstrip("/") for pattern in ignored if not pattern.startswith("/")]
        assert not any(fnmatch.fnmatch(way, pattern) for way in ways for pattern in free), path
        assert not any(fnmatch.fnmatch(path.parts[0], pattern) for pattern in anchored), path


def test_the_caption_tells_the_shade_of_the_photograph_not_of_the_drawing(making):
    garments, make_style_sets = making
    images = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    images[0, :, 8:24, 8:24], images[1, :, 8:24, 8:24] = 60, 250  # a dark coat, a light bag
    split = make_style_sets.Split(images, torch.tensor([4, 8]), {4: [0], 8: [1]})
    for style in garments.SHIPPED:
        drawn = make_style_sets.draw(split, [0, 1], style)
        assert drawn.captions == [f"{style} style, a photo of a dark coat", f"{style} style, a photo of a light bag"]
        assert drawn.pictures.shape == (2, 32, 32, 3)
    assert make_style_sets.draw(split, [1], None).captions == ["a photo of a light bag"]
    assert make_style_sets.draw(split, [1], None).pictures[0, 12, 12].tolist() == [250, 250, 250]


def test_garments_are_given_out_once_and_in_turn(making):
    _, make_style_sets = making
    split = make_style_sets.Split(torch.zeros(6, 1, 32, 32), torch.zeros(6), {0: [4, 1, 0], 5: [2, 3, 5]})
    first, second = split.take([0, 5], 1), split.take([0, 5], 2)
    assert (first, second) == ([0, 5], [1, 3, 4, 2])
