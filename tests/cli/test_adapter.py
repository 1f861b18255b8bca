"""`fallow adapter ...` as it is typed: what it prints for people and for machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from fallow.cli import app
from fallow.core.sparse import Entry, SparseDelta


def save(path: Path, index: list[int], values: list[float], **metadata) -> str:
    entry = Entry(torch.tensor(index, dtype=torch.int32), torch.tensor(values), (10, 10), "float32", "f32:1")
    other = Entry(torch.tensor([0], dtype=torch.int32), torch.tensor([2.0]), (4,), "float32", "f32:2")
    entries = {"down_blocks.0.attn.weight": entry, "conv_out.bias": other}
    return str(SparseDelta(entries, "delta", {"method": "sara", **metadata}).save(path))


@pytest.fixture
def two(tmp_path) -> tuple[str, str]:
    first = save(tmp_path / "a", [1, 5, 7, 9], [3.0, 0.0, 4.0, 0.0], learning_rate=5e-4, fraction=0.05)
    return first, save(tmp_path / "b.safetensors", [5, 7], [0.5, 2.0])


def run(*args: str):
    return CliRunner().invoke(app, ["adapter", *args], env={"COLUMNS": "120"})


def test_info_shows_facts_and_blocks_and_the_same_as_json(two):
    shown = run("info", two[0])
    assert shown.exit_code == 0, shown.output
    for text in ("sparse", "sara", "learning rate", "0.0005", "down_blocks.0", "conv_out", "4%", "25%"):
        assert text in shown.output, text
    row = next(line for line in shown.output.splitlines() if "down_blocks.0" in line)
    assert row.split() == ["down_blocks.0", "4", "4%", "5", "4"]
    found = json.loads(run("info", two[0], "--json").stdout)
    assert found["blocks"]["down_blocks.0"] == {"trained": 4, "numel": 100, "norm": 5.0, "largest": 4.0}
    assert found["facts"]["trained"] == 5


def test_diff_shows_overlap_and_likeness_in_all_and_by_tensor(two):
    shown = run("diff", *two)
    assert shown.exit_code == 0, shown.output
    assert "3: 60% of the first, 100% of the second" in " ".join(shown.output.split())
    row = next(line for line in shown.output.splitlines() if "down_blocks.0" in line)
    assert row.split() == ["down_blocks.0.attn.weight", "2", "50%", "100%", f"{8 / 5 / 4.25**0.5:.4g}"]
    found = json.loads(run("diff", *two, "--json").stdout)
    assert (found["kind"], found["shared"]) == ("adapters", 3)
    assert found["cosine"] == pytest.approx(12 / (29 * 8.25) ** 0.5)


def test_diff_of_checkpoints_shows_what_changed(tmp_path):
    one = {"a": torch.zeros(4), "b": torch.ones(2), "c": torch.ones(4), "zero": torch.zeros(2)}
    two = {**one, "b": torch.tensor([1.0, 3.0]), "c": 1.01 * one["c"], "zero": torch.ones(2)}
    save_file(one, tmp_path / "one.safetensors")
    save_file(two, tmp_path / "two.safetensors")
    shown = run("diff", str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors"))
    assert shown.exit_code == 0, shown.output
    assert "7 of 12" in shown.output
    rows = [line.split() for line in shown.output.splitlines() if line.split()[:1] in (["a"], ["b"], ["c"], ["zero"])]
    assert rows == [
        ["b", "1", "50%", f"{2**0.5:.4g}", "2"], ["c", "4", "100%", "0.01", "0.01"], ["zero", "2", "100%", "inf", "1"],
    ]  # fmt: skip


def test_combine_writes_the_sum_at_the_scales_given(two, tmp_path):
    shown = run("combine", f"{two[0]}:0.5", f"{two[1]}:2", "-o", str(tmp_path / "both.safetensors"))
    assert shown.exit_code == 0, shown.output
    made = SparseDelta.load(tmp_path / "both.safetensors").entries["down_blocks.0.attn.weight"]
    assert made.index.tolist() == [1, 5, 7, 9]
    assert made.values.tolist() == [1.5, 1.0, 6.0, 0.0]
    again = run("combine", two[0], "-o", str(tmp_path / "both.safetensors"))
    assert again.exit_code == 2
    assert "exists already" in again.stderr


@pytest.mark.parametrize("command", ["info", "diff"])
def test_a_path_that_is_not_there_is_the_users_mistake(command, two, tmp_path):
    missing = str(tmp_path / "nothing.safetensors")
    shown = run(command, missing, *([two[0]] if command == "diff" else []))
    assert shown.exit_code == 2
    assert "nothing.safetensors" in shown.stderr
    assert "Traceback" not in shown.stderr
