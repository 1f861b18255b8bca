"""The picture at the top of the README: what is drawn with what, and where it stands on the page."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fallow import assets
from fallow.core.errors import DataError
from fallow.core.files import write_json
from fallow.recipes.evaluate import opened
from fallow.recipes.pictures import read_pictures


@pytest.fixture(scope="module")
def readme():
    """The module `readme_picture` of scripts/."""
    folder = str(Path(__file__).parents[2] / "scripts")
    sys.path.insert(0, folder)
    try:
        import readme_picture
    finally:
        sys.path.remove(folder)
    return readme_picture


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.toml").write_text('data = "bronze"\nmodel = "some/model"\nsample_steps = 7\nguidance = 2.0\n')
    info = {
        "status": "finished", "method": "sara", "steps": 500, "seconds": 144, "trained_parameters": 50,
        "total_parameters": 1000, "hardware": {"threads": 2},
    }  # fmt: skip
    write_json(tmp_path / "run.json", info)
    return tmp_path


@pytest.fixture
def calls(readme, monkeypatch):
    """A base model that draws black and an adapter that makes it white; every call is noted."""
    noted = []

    def generate(pipeline, prompts, **how):
        noted.append(("drawn", tuple(prompts), how))
        return [Image.new("RGB", (32, 32), pipeline["colour"]) for _ in prompts]

    def apply(pipeline, adapters):
        noted.append(("adapted", adapters))
        pipeline["colour"] = "white"

    monkeypatch.setattr(readme, "load_pipeline", lambda model: noted.append(("loaded", model)) or {"colour": "black"})
    monkeypatch.setattr(readme, "generate", generate)
    monkeypatch.setattr(readme, "apply_adapters", apply)
    return noted


def test_base_and_adapted_model_draw_the_captions_of_the_test_half_from_the_same_noise(readme, run, calls):
    row = readme.make_row(run, first=4, seed=10)
    chosen = read_pictures(assets.STYLES["bronze"] / "test")[4:8]
    loaded, base, adapted, again = calls
    assert loaded == ("loaded", "some/model")
    assert base == again == ("drawn", tuple(p.caption for p in chosen), base[2])
    assert base[2] == {"seeds": [14, 15, 16, 17], "steps": 7, "guidance": 2.0}
    assert adapted == ("adapted", [(run / "adapter", 1.0)])
    assert [p.tobytes() for p in row.real] == [p.tobytes() for p in opened(chosen)]
    assert row.base[0].getpixel((0, 0)) == (0, 0, 0)
    assert row.adapted[0].getpixel((0, 0)) == (255, 255, 255)
    assert (row.style, row.method) == ("Bronze", "SaRA")
    assert row.cost == "500 steps, 2.4 minutes on 2 CPU threads, 5% of the weights"


def test_pictures_stand_on_the_page_three_times_enlarged_with_sharp_pixels(readme, run, calls):
    row = readme.make_row(run, first=0, seed=0)
    one, two = readme.page([row]), readme.page([row, row])
    assert one.width == two.width == 1400
    assert two.height > one.height
    page = np.array(one)
    left, top = 40 + 2 * (4 * 96 + 3 * 8 + 48), 40 + readme.TITLE + readme.LABEL
    first = page[top : top + 96, left : left + 96]
    assert (first == np.array(row.real[0]).repeat(3, 0).repeat(3, 1)).all()
    assert (page[top : top + 96, 40 : 40 + 96] == 0).all()


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("Sunset style, a photo of a dark coat", "dark coat"),
        ("a photo of an ankle boot", "ankle boot"),
        ("a very long-winded description of things", "things"),
        ("an uncommonly long subject", "uncommonly long…"),
    ],
)
def test_below_a_picture_stands_the_subject_of_its_prompt(readme, prompt, subject):
    assert readme.short(prompt) == subject


def test_a_run_that_is_missing_or_not_finished_is_refused_before_anything_is_drawn(readme, run, calls):
    write_json(run / "run.json", {"status": "stopped"})
    with pytest.raises(DataError, match=r"is not finished \(status stopped\); go on with: fallow train --resume"):
        readme.make_row(run, first=0, seed=0)
    with pytest.raises(DataError, match="nowhere is no folder"):
        readme.make_row(run / "nowhere", first=0, seed=0)
    assert calls == []
