"""Several folders of pictures in one run, each seen as often as asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from fallow.core.errors import ConfigError, DataError
from fallow.recipes.concepts import read_concepts, seen
from fallow.recipes.pictures import Batches, Reading


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32)).save(path)


def test_folders_named_as_kohya_names_them_give_repeats_and_captions(tmp_path):
    save(tmp_path / "10_sks dog" / "a.png")
    save(tmp_path / "2_blue vase" / "b.png")
    (tmp_path / "2_blue vase" / "b.txt").write_text("a vase on a table")
    save(tmp_path / "0_left out" / "c.png")
    save(tmp_path / "notes" / "d.png")
    read = read_concepts(tmp_path, prompt="a thing")
    assert [(p.path.name, p.caption, p.repeats) for p in read] == [
        ("a.png", "sks dog", 10),
        ("b.png", "a vase on a table", 2),
    ]


def test_a_folder_with_pictures_is_itself_the_concept(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "10_dog" / "b.png")
    assert [picture.path.name for picture in read_concepts(tmp_path, prompt="a dog")] == ["a.png"]


def test_further_folders_have_repeats_behind_a_colon(tmp_path):
    save(tmp_path / "one" / "a.png")
    save(tmp_path / "two" / "b.png")
    save(tmp_path / "three" / "4_vase" / "c.png")
    read = read_concepts(tmp_path / "one", [f"{tmp_path / 'two'}:3", f"{tmp_path / 'three'}:2"], "a thing")
    assert [(p.path.name, p.caption, p.repeats) for p in read] == [
        ("a.png", "a thing", 1), ("b.png", "a thing", 3), ("c.png", "vase", 8),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"two:0 repeats its pictures 0 times; give 1 or more"):
        read_concepts(tmp_path / "one", [f"{tmp_path / 'two'}:0"], "a thing")
    with pytest.raises(DataError, match="four does not exist"):
        read_concepts(tmp_path / "one", [str(tmp_path / "four")], "a thing")


def test_repeated_pictures_are_drawn_in_their_proportion(tmp_path):
    save(tmp_path / "3_a" / "a.png")
    save(tmp_path / "1_b" / "b.png")
    read = read_concepts(tmp_path)
    order, sizes = seen(read, [(32, 32)] * 2)
    batches = Batches(sizes, 2, seed=0)
    counts = Counter(order[place] for _ in range(10) for place in next(batches))
    names = [picture.path.name for picture in read]
    assert {names[i]: n for i, n in counts.items()} == {"a.png": 15, "b.png": 5}


def test_masks_that_are_asked_for_must_be_there(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"holds no mask; put NAME\.mask\.png beside NAME\.png"):
        read_concepts(tmp_path, prompt="a dog", how=Reading(masks=True))
