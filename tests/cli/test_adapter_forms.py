"""`fallow adapter extract | resize | convert`: from flags to files, tables and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fallow import assets
from fallow.cli import app


def run(*words: object, code: int = 0) -> str:
    """What the command says: on stdout, or on stderr where it shall fail."""
    found = CliRunner().invoke(app, ["adapter", *map(str, words)])
    assert found.exit_code == code, found.output
    return found.stderr if code else found.stdout


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """mini-sd's UNet with a change of rank 1 in one layer, and noise in a convolution."""
    tensors = load_file(next((assets.MINI_SD / "unet").glob("*.safetensors")))
    torch.manual_seed(0)
    name = next(key for key in tensors if key.endswith("attn1.to_q.weight"))
    out, inner = tensors[name].shape
    tensors[name] = (tensors[name].float() + 0.1 * torch.randn(out, 1) @ torch.randn(1, inner)).to(tensors[name])
    conv = "conv_in.weight"
    tensors[conv] = (tensors[conv].float() + 0.1 * torch.randn(tensors[conv].shape)).to(tensors[conv])
    file = tmp_path_factory.mktemp("tuned") / "unet.safetensors"
    save_file(tensors, file)
    return file


def test_extract_resize_convert_and_info_tell_the_same_story(tuned, tmp_path):
    made = json.loads(run("extract", "mini-sd", tuned, "--rank", 4, "-o", tmp_path / "lora", "--json"))
    assert made["format"] == "peft"
    assert len(made["layers"]) == 2
    small = tmp_path / "small"
    found = json.loads(run("resize", tmp_path / "lora", "--rank", 1, "-o", small, "--json"))
    assert {(one["was"], one["rank"]) for one in found["layers"].values()} == {(4, 1)}
    kohya = tmp_path / "small.safetensors"
    shown = run("convert", small, "--to", "kohya", "-o", kohya)
    assert "kohya" in shown
    assert str(kohya) in "".join(shown.split())  # long paths fold
    facts = json.loads(run("info", kohya, "--json"))
    assert facts["facts"]["format"] == "kohya"
    assert facts["facts"]["ranks"] == [1]
    assert facts["facts"]["base"] == "mini-sd"
    assert {one["layer"] for one in facts["layers"]} == made["layers"].keys()
    assert "conv_in.weight" in run("info", kohya)


def test_a_sparse_adapter_is_extracted_shown_as_a_table_and_made_smaller(tuned, tmp_path):
    file = tmp_path / "style.safetensors"
    shown = run("extract", "mini-sd", tuned, "--kind", "sara", "--budget", 200, "-o", file)
    assert "relative error" in shown
    assert "200" in shown
    found = json.loads(run("resize", file, "--fraction", 0.1, "-o", tmp_path / "tiny.safetensors", "--json"))
    assert found["trained"] == 20
    assert "exists already" in run("resize", file, "--fraction", 0.1, "-o", tmp_path / "tiny.safetensors", code=2)
    run("resize", file, "--fraction", 0.2, "-o", tmp_path / "tiny.safetensors", "--overwrite")
    run("convert", file, "--to", "lycoris-diff", "-o", tmp_path / "diff.safetensors")
    assert all(key.startswith("lora_unet_") for key in load_file(tmp_path / "diff.safetensors"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-rank", 4), "--energy or --ratio"),
        (("--rank", 2, "--energy", 0.5), "rank and energy"),
        (("--energy", 2), "energy=2.0"),
        (("--rank", 2, "--dtype", "int8"), "dtype=int8"),
    ],
)
def test_flags_that_contradict_each_other_are_refused_by_name(tuned, tmp_path, words, message):
    assert message in run("extract", "mini-sd", tuned, "-o", tmp_path / "lora", *words, code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["extract", "resize", "convert"])
def test_each_command_shows_an_example(command):
    assert "Example: fallow adapter" in run(command, "--help")
