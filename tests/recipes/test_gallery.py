"""Drawing into a folder: names, sheets, what each PNG says of itself, and that nothing is written over."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fallow.core.errors import AdapterError, ConfigError, ModelError
from fallow.recipes import gallery
from fallow.recipes.adapter_files import base_fingerprints, save_full
from fallow.recipes.gallery import GAP, HEADING, SHOWN, Drawing, draw, read_prompts, sheet
from fallow.recipes.pipelines import generate, load_pipeline


@pytest.fixture(scope="module")
def adapter(tiny_sd, tmp_path_factory) -> Path:
    unet = load_pipeline(str(tiny_sd), "cpu").unet
    prints = base_fingerprints(unet)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng))
    return save_full(unet, tmp_path_factory.mktemp("adapter") / "full", prints, {"method": "full"})


@pytest.fixture
def drawing(tiny_sd, tmp_path):
    def make(**settings) -> Drawing:
        plan = {"prompts": ["a dress"], "model": str(tiny_sd), "output": tmp_path / "out", "steps": 2, "device": "cpu"}
        return Drawing(**{**plan, **settings})

    return make


def pixels(picture: Path | Image.Image) -> np.ndarray:
    return np.array(picture if isinstance(picture, Image.Image) else Image.open(picture).convert("RGB")).astype(int)


def test_each_picture_is_a_file_that_says_what_made_it(drawing, adapter, tiny_sd):
    plan = drawing(
        prompts=["a Dress, new!", "ein Kleid für Käthe"], seeds=[3, 5], adapters=[(str(adapter), 0.5)], guidance=2.0,
        negative="a coat", command="fallow generate ...",
    )  # fmt: skip
    drawn = draw(plan)
    assert [path.name for path in drawn.pictures] == [
        "001-a-dress-new-seed3.png", "001-a-dress-new-seed5.png",
        "002-ein-kleid-f-r-k-the-seed3.png", "002-ein-kleid-f-r-k-the-seed5.png",
    ]  # fmt: skip
    assert sorted(p.name for p in plan.output.iterdir()) == sorted(p.name for p in drawn.pictures)
    story = Image.open(drawn.pictures[3]).text
    assert story["prompt"] == "ein Kleid für Käthe"
    assert (story["seed"], story["steps"], story["guidance"]) == ("5", "2", "2.0")
    assert (story["negative"], story["model"], story["command"]) == ("a coat", str(tiny_sd), "fallow generate ...")
    assert json.loads(story["adapters"]) == [{"path": str(adapter), "scale": 0.5}]
    assert story["software"].startswith("fallow ")
    assert drawn.sheets == []


def test_a_file_holds_the_picture_of_its_prompt_and_seed_whatever_the_batch(drawing, tiny_sd):
    drawn = draw(drawing(prompts=["a dress", "a coat"], seeds=[1, 2], batch=3, guidance=2.0))
    pipeline = load_pipeline(str(tiny_sd), "cpu")
    for path, (prompt, seed) in zip(
        drawn.pictures, [(p, s) for p in ("a dress", "a coat") for s in (1, 2)], strict=True
    ):
        expected = generate(pipeline, [prompt], seeds=[seed], steps=2, guidance=2.0)[0]
        assert abs(pixels(path) - pixels(expected)).max() <= 1


def test_a_sweep_draws_every_scale_and_sets_them_side_by_side(drawing, adapter):
    plan = drawing(adapters=[(str(adapter), 1.0)], scales=[0, 0.5, 1], seeds=[0, 1], grid=True)
    drawn = draw(plan)
    names = [f"001-a-dress-seed{seed}-x{scale}.png" for scale in ("0", "0.5", "1") for seed in (0, 1)]
    assert [path.name for path in drawn.pictures] == names
    assert [path.name for path in drawn.sheets] == ["grid.png", "scales.png"]
    base, _, half, _, whole, _ = map(pixels, drawn.pictures)
    plain = draw(drawing(output=plan.output / "plain"))
    assert (base == pixels(plain.pictures[0])).all()
    assert (half != base).any()
    assert (half != whole).any()
    factor = SHOWN // 32
    side = 32 * factor
    assert Image.open(drawn.sheets[1]).size == (3 * (side + GAP) - GAP, HEADING + 2 * (side + GAP) - GAP)
    scales = pixels(drawn.sheets[1])[HEADING:]
    assert (scales[:side:factor, :side:factor] == base).all()
    assert (scales[:side:factor, 2 * (side + GAP) :: factor] == whole).all()
    grid = pixels(drawn.sheets[0])[HEADING:]
    assert (grid[::factor, :side:factor] == whole).all()  # the scale nearest to 1


def test_beside_base_draws_without_the_adapters_too(drawing, adapter):
    drawn = draw(drawing(adapters=[(str(adapter), 1.0)], beside_base=True))
    assert [path.name for path in drawn.pictures] == ["001-a-dress-seed0-base.png", "001-a-dress-seed0-adapted.png"]
    assert [path.name for path in drawn.sheets] == ["beside-base.png"]
    assert json.loads(Image.open(drawn.pictures[0]).text["adapters"]) == []
    assert (pixels(drawn.pictures[0]) != pixels(drawn.pictures[1])).any()


def test_nothing_is_written_over_unless_told_and_nothing_is_loaded_before(drawing, monkeypatch):
    first = draw(drawing()).pictures[0]
    before = first.read_bytes()
    loaded = []
    monkeypatch.setattr(gallery, "load_pipeline", lambda *_, **__: loaded.append(1))
    with pytest.raises(ConfigError, match=r"001-a-dress-seed0\.png would be overwritten; .*--overwrite"):
        draw(drawing(steps=3))
    assert loaded == []
    assert first.read_bytes() == before
    monkeypatch.undo()
    draw(drawing(steps=3, overwrite=True))
    assert first.read_bytes() != before


def test_a_folder_that_is_a_file_is_told(drawing, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="file is a file; give a folder"):
        draw(drawing(output=tmp_path / "file" / "deeper"))


def test_mistakes_write_nothing(drawing, adapter, tmp_path):
    for wrong, kind in (
        ({"adapters": [(str(tmp_path / "none"), 1.0)]}, AdapterError),
        ({"model": str(tmp_path)}, ModelError),
        ({"width": 30}, ConfigError),
    ):
        with pytest.raises(kind):
            draw(drawing(**wrong))
        assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prompts": []}, "nothing to draw"),
        ({"prompts": ["x", " "]}, "prompt 2 is empty"),
        ({"steps": 0}, "steps=0"),
        ({"batch": 0}, "batch=0"),
        ({"seeds": []}, "no seed"),
        ({"scales": [1.0]}, "--scales compares with the base model"),
        ({"beside_base": True}, "--beside-base compares"),
    ],
)
def test_impossible_requests_are_refused(drawing, wrong, says):
    with pytest.raises(ConfigError, match=says):
        drawing(**wrong)


def test_a_sheet_has_rows_columns_and_headings():
    pictures = [Image.new("RGB", (64, 32), colour) for colour in ("red", "lime", "blue")]
    page = sheet(pictures, 2, ["one", "two"])
    assert page.size == (2 * (128 + GAP) - GAP, HEADING + 2 * (64 + GAP) - GAP)
    assert page.getpixel((10, HEADING + 10)) == (255, 0, 0)
    assert page.getpixel((140, HEADING + 10)) == (0, 255, 0)
    assert page.getpixel((10, HEADING + 64 + GAP + 10)) == (0, 0, 255)
    assert page.getpixel((140, HEADING + 64 + GAP + 10)) == (255, 255, 255)
    assert (np.array(page.crop((0, 0, 100, HEADING))) < 100).any()


def test_prompts_are_read_from_lines_without_comments(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# garments\na dress\n\n  a coat  \n")
    assert read_prompts(file) == ["a dress", "a coat"]
    file.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "gone.txt")
