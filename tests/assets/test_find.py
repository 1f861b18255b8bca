"""Shipped sets by name, folders by path, and what is said of anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from fallow import assets
from fallow.core.errors import DataError


def test_five_styles_and_two_concepts_ship_each_with_a_training_and_a_test_half():
    assert list(assets.STYLES) == ["sunset", "blueprint", "halftone", "bronze", "mosaic"]
    assert list(assets.CONCEPTS) == ["bag", "ankle-boot"]
    for folder in (assets.STYLES | assets.CONCEPTS).values():
        assert sorted(place.name for place in folder.iterdir() if place.is_dir()) == ["test", "train"]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("sunset", "styles/sunset"),
        ("Sunset", "styles/sunset"),
        (" BRONZE ", "styles/bronze"),
        ("ankle-boot", "concepts/ankle-boot"),
        ("Ankle Boot", "concepts/ankle-boot"),
    ],
)
def test_a_shipped_set_is_found_by_its_name_in_upper_or_lower_case(name, folder):
    assert assets.find(name) == assets.FOLDER / folder


def test_a_folder_is_found_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "my-pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.find(str(tmp_path / "my-pictures")) == tmp_path / "my-pictures"
    assert assets.find(tmp_path / "my-pictures") == tmp_path / "my-pictures"
    assert assets.find("my-pictures") == Path("my-pictures")
    assert assets.find("~/my-pictures") == tmp_path / "my-pictures"


def test_a_shipped_name_means_the_shipped_set_and_a_path_the_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "sunset").mkdir()
    monkeypatch.chdir(tmp_path)
    assert assets.find("sunset") == assets.STYLES["sunset"]
    assert assets.find("./sunset").resolve() == (tmp_path / "sunset").resolve()
    assert assets.find(tmp_path / "sunset") == tmp_path / "sunset"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("blueprnt", r"data blueprnt is no shipped set and no folder \(did you mean 'blueprint'\?\)"),
        (
            "zebra",
            r"allowed: sunset, blueprint, halftone, bronze, mosaic, bag, ankle-boot\); .* or the path of a folder",
        ),
        ("pictures/zebra", r"data pictures/zebra is no folder"),
        ("", r"data is empty; give a shipped set \(sunset, "),
    ],
)
def test_what_is_neither_is_refused_with_the_nearest_name_and_the_other_way(wrong, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=says):
        assets.find(wrong)


def test_a_file_is_refused_and_its_folder_asked_for(tmp_path):
    (tmp_path / "one.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"one.png is a file; give the folder that holds it"):
        assets.find(tmp_path / "one.png")
