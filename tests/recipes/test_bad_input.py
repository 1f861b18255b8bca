"""What a user gets wrong, through the real command: one clear error, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from typer.testing import CliRunner

import fallow
from fallow.cli import app
from fallow.core import files
from fallow.core.files import read_tensors, write_tensors
from fallow.recipes import text_to_image
from fallow.recipes.checkpoints import checkpoints

FEW = ("--steps", 2, "--batch-size", 2, "--samples", 0, "--sample-steps", 1, "--device", "cpu")


def refused(*words: Any) -> str:
    """What is said, with line breaks taken out; asserts how it is said."""
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("Error: ") == 1
    return result.stderr.replace("\n", " ")


@pytest.fixture
def train(tiny_sd: Path, pictures: Path, tmp_path: Path, quick: None) -> Any:
    """`train(*more)` says why it is refused; afterwards there must be no run directory."""

    def call(*more: Any, model: Any = tiny_sd, data: Any = pictures) -> str:
        said = refused("train", "--model", model, "--data", data, "--output", tmp_path / "run", *FEW, *more)
        assert not (tmp_path / "run").exists()
        return said

    return call


def test_a_folder_that_is_missing_empty_or_a_file(train, tmp_path):
    assert "nowhere is no folder" in train(data=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty holds no picture (.png, .jpg" in train(data=tmp_path / "empty")
    (tmp_path / "file.png").touch()
    assert "file.png is a file; give the folder" in train(data=tmp_path / "file.png")
    said = train(data="bluprint")
    assert "blueprint" in said


def test_a_folder_that_cannot_be_read(train, pictures, monkeypatch):
    real = Path.iterdir

    def denied(self: Path) -> Any:
        if self == pictures:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "iterdir", denied)
    assert f"{pictures} cannot be read (Permission denied)" in train()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read as a picture"),
        (b"no picture at all", "cannot be read as a picture"),
        ("half", "cannot be read as a picture"),
        ("one pixel", "2.png is 1x1 pixels; give pictures of at least 8x8"),
    ],
)
def test_a_picture_that_is_broken_cut_off_or_of_one_pixel(train, pictures, content, says):
    file = pictures / "2.png"
    if content == "one pixel":
        Image.new("RGB", (1, 1)).save(file)
    else:
        file.write_bytes(file.read_bytes()[:-800] if content == "half" else content)
    said = train()
    assert str(file) in said
    assert says in said


def test_a_missing_caption_and_a_broken_line(train, pictures):
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    (pictures / "metadata.jsonl").write_text("\n".join(lines[:-1]))
    assert "5.png has no caption; give a line" in train()
    (pictures / "metadata.jsonl").write_text("\n".join([*lines[:3], "{broken"]))
    assert "metadata.jsonl, line 4 is no JSON" in train()
    (pictures / "metadata.jsonl").write_text("\n".join([*lines, '{"file_name": "9.png", "text": "x"}']))
    assert "line 7 names 9.png, which is not there" in train()


def test_a_model_that_is_not_there_is_no_pipeline_or_is_cut_off(train, tiny_sd, tmp_path):
    assert "does not exist; give 'mini-sd', a pipeline directory" in train(model="./nowhere")
    (tmp_path / "odd").mkdir()
    assert "has no model_index.json" in train(model=tmp_path / "odd")
    whole, broken = tiny_sd, tmp_path / "broken"
    for file in whole.rglob("*"):
        if file.is_file():
            target = broken / file.relative_to(whole)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    weights = next((broken / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "a file is missing or cut off" in train(model=broken)
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "_class_name": "KandinskyPipeline"}))
    assert "is a KandinskyPipeline; Fallow works with Stable Diffusion" in train(model=broken)


def test_amounts_that_select_nothing_or_everything_or_cannot_be(train):
    assert "threshold=1e-30 selects no weight of" in train("--threshold", "1e-30", "--option", "include=weight")
    assert "threshold=100 selects every one of the" in train("--threshold", "100", "--lr", "1e-3")
    assert "fraction=1.5 is outside (0, 1]" in train("--fraction", "1.5")
    assert "give exactly one of" in train("--fraction", "0.1", "--budget", "10")


def test_unknown_methods_options_and_settings_with_the_nearest_that_exists(train, tmp_path):
    assert "method=sarah does not exist (did you mean 'sara'?)" in train("--method", "sarah")
    assert "has no option 'fractoin' (did you mean 'fraction'?)" in train("--option", "fractoin=0.1")
    config = tmp_path / "run.toml"
    config.write_text("bach_size = 3\n")
    assert "there is no setting 'bach_size' (did you mean 'batch_size'?)" in train("--config", config)
    config.write_text("accumulation = 'many'\n")
    assert "accumulation many: input should be a valid integer" in train("--config", config)


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="needs a place that even root cannot write to: Linux's /proc"
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(tiny_sd, pictures):
    said = refused("train", "--model", tiny_sd, "--data", pictures, "--output", "/proc/fallow-run", *FEW)
    assert "/proc/fallow-run cannot be made" in said


def test_an_output_in_use_keeps_every_file(tiny_sd, pictures, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    said = refused("train", "--model", tiny_sd, "--data", pictures, "--output", tmp_path / "run", *FEW)
    assert "is not empty; give another one" in said
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.fixture
def adapter(tiny_sd: Path, tmp_path: Path) -> Path:
    """A saved SaRA adapter of the tiny pipeline's UNet after a step."""
    unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
    optimizer = fallow.SaRA(unet, fraction=0.05, lr=1e-2)
    unet(torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 4, 16)).sample.square().mean().backward()
    optimizer.step()
    return optimizer.save(tmp_path / "adapter.safetensors")


@pytest.fixture
def generate(tiny_sd: Path, tmp_path: Path) -> Any:
    def call(adapter: Any, *more: Any) -> str:
        out = tmp_path / "pictures-out"
        few = ("--model", tiny_sd, "--adapter", adapter, "--steps", 1, "--output", out, "--device", "cpu")
        said = refused("generate", "a bag", *few, *more)
        assert not list(out.glob("*.png"))
        return said

    return call


def test_an_adapter_of_another_base_or_network_or_cut_off(generate, adapter, tmp_path):
    tensors, header = read_tensors(adapter)
    foreign = tmp_path / "foreign.safetensors"
    told = json.loads(header["fallow"])
    name = next(iter(told["tensors"]))
    told["tensors"][name]["base"] = "f32:0000000000000000,f16:0000000000000000,bf16:0000000000000000"
    write_tensors(foreign, tensors, {**header, "fallow": json.dumps(told)})
    assert f"trained on another base: '{name}' holds other values" in generate(foreign)
    told["tensors"]["strange.weight"] = told["tensors"].pop(name)
    moved = {key.replace(name, "strange.weight"): value for key, value in tensors.items()}
    write_tensors(foreign, moved, {**header, "fallow": json.dumps(told)})
    assert "changes 'strange.weight', which UNet2DConditionModel lacks" in generate(foreign)
    foreign.write_bytes(adapter.read_bytes()[:-100])
    assert "it may have been cut off" in generate(foreign)
    foreign.write_bytes(b"PK\x03\x04 a zip of pickles")
    assert "cannot be read as safetensors" in generate(foreign)
    assert "does not exist; give an adapter directory" in generate(tmp_path / "nowhere")
    assert "scale" in generate(f"{adapter}:nan")


def test_a_forced_adapter_of_another_base_is_taken(tiny_sd, adapter, tmp_path):
    tensors, header = read_tensors(adapter)
    foreign = tmp_path / "foreign.safetensors"
    told = json.loads(header["fallow"])
    told["tensors"][next(iter(told["tensors"]))]["base"] = "f32:0,f16:0,bf16:0"
    write_tensors(foreign, tensors, {**header, "fallow": json.dumps(told)})
    words = ["generate", "a bag", "--model", tiny_sd, "--adapter", foreign, "--steps", 1, "--output", tmp_path / "out"]
    result = CliRunner().invoke(app, [str(word) for word in [*words, "--device", "cpu", "--force"]])
    assert result.exit_code == 0, result.output
    picture = np.array(Image.open(next((tmp_path / "out").glob("*.png"))))
    assert picture.shape == (32, 32, 3)


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="needs a place that even root cannot write to: Linux's /proc"
)
def test_pictures_and_merged_models_are_refused_a_place_that_cannot_be_written(tiny_sd, adapter):
    few = ("--model", tiny_sd, "--adapter", adapter, "--steps", 1, "--device", "cpu")
    assert "cannot be written" in refused("generate", "a bag", "--output", "/proc/pictures", *few)
    assert "cannot be written" in refused("adapter", "merge", adapter, "--model", tiny_sd, "--output", "/proc/merged")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`full_disk(n)`: the n-th file or folder that is brought to the disk, and all after it, find it full."""
    real = files._to_disk

    def fill(number: int) -> None:
        left = [number]

        def refuse(place: Path) -> None:
            left[0] -= 1
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(place)

        monkeypatch.setattr(files, "_to_disk", refuse)

    return fill


@pytest.mark.parametrize("number", [1, 4, 12, 26])
def test_a_disk_that_fills_up_ends_a_run_with_one_error_and_keeps_what_was_complete(
    tiny_sd, pictures, tmp_path, quick, full_disk, monkeypatch, number
):
    """Before the first step there is then no directory; later the checkpoints are whole, and the run can go on."""
    run = tmp_path / "run"
    words = ("train", "--model", tiny_sd, "--data", pictures, "--output", run, *FEW, "--save-every", 1, "--steps", 3)
    full_disk(number)
    assert "No space left on device; give a place that you may write to, with space left" in refused(*words)
    assert not list(tmp_path.rglob(".*"))
    monkeypatch.undo()
    if number < 5:
        assert not run.exists()
        return
    monkeypatch.setattr(text_to_image, "write_run_report", lambda folder: folder / "report.html")
    result = CliRunner().invoke(app, ["train", "--resume", str(run)])
    assert result.exit_code == 0, result.output
    assert [place.name for place in checkpoints(run)] == ["step-000002", "step-000003"]
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


def test_a_full_disk_ends_every_command_that_writes_with_one_error(tiny_sd, adapter, tmp_path, full_disk):
    full_disk(1)
    few = ("--model", tiny_sd, "--adapter", adapter, "--steps", 1, "--device", "cpu")
    for words in (
        ("generate", "a bag", "--output", tmp_path / "out", *few),
        ("adapter", "merge", adapter, "--model", tiny_sd, "--output", tmp_path / "merged"),
        ("adapter", "combine", adapter, "--output", tmp_path / "both.safetensors"),
        ("adapter", "combine", adapter, "--output", tmp_path / "both"),
    ):
        assert "cannot be written: No space left on device" in refused(*words)
    left = {place.name for place in tmp_path.iterdir()}
    assert left <= {"adapter.safetensors", "out"}
    assert not list((tmp_path / "out").iterdir())


def test_a_network_that_gives_no_numbers_ends_a_run_with_one_error(tiny_sd, pictures, tmp_path, quick, monkeypatch):
    def nothing(run: Any, _: Any) -> torch.Tensor:
        return sum(parameter.sum() for parameter in run.network.parameters()) * math.nan

    monkeypatch.setattr(text_to_image.Run, "loss", nothing)
    said = refused("train", "--model", tiny_sd, "--data", pictures, "--output", tmp_path / "run", *FEW)
    assert "the loss is nan at step 1, so the run has stopped; there was no checkpoint yet. Lower lr=" in said
    assert not (tmp_path / "run" / "adapter").exists()


def test_hostile_adapters_are_refused_by_every_command_that_reads_one(adapter, tmp_path):
    tensors, header = read_tensors(adapter)
    name = next(key for key in tensors if key.endswith(".delta"))
    told = json.loads(header["fallow"])
    told["tensors"][name.removesuffix(".delta")]["shape"] = [10**12, 10**6]
    other = tensors[name].clone()
    other[0] = math.nan
    hostile = {
        "nan": ({**tensors, name: other}, header, "NaN or infinite"),
        "huge": (tensors, {**header, "fallow": json.dumps(told)}, "is that of no tensor"),
        "deep": (tensors, {**header, "fallow": "[" * 100_000}, "nested too deeply"),
        "extra": ({**tensors, "../../x": torch.ones(1)}, header, "holds '../../x'"),
    }
    for kind, (held, metadata, says) in hostile.items():
        file = tmp_path / f"{kind}.safetensors"
        write_tensors(file, held, metadata)
        for words in (
            ("adapter", "info", file), ("adapter", "diff", file, adapter),
            ("adapter", "combine", file, "--output", tmp_path / "x"),
            ("generate", "a bag", "--adapter", file, "--output", tmp_path / "out", "--steps", 1, "--device", "cpu"),
            ("adapter", "merge", file, "--output", tmp_path / "merged"),
        ):  # fmt: skip
            assert says in refused(*words), (kind, words)
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "merged").exists()
