"""The two main commands from the command line to the files they leave."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from fallow.cli import app


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def test_train_says_what_it_does_and_refuses_to_write_over_a_run(tiny_sd, pictures, tmp_path, quick):
    few = ("--steps", 2, "--batch-size", 2, "--samples", 1, "--sample-steps", 1, "--device", "cpu")
    folder = tmp_path / "run"
    result = run("train", "--model", tiny_sd, "--data", pictures, "--output", folder, *few)
    assert result.exit_code == 0, result.output
    assert "sara on" in result.stdout
    assert "step 2 of 2" in result.stderr
    again = run("train", "--config", folder / "config.toml", "--output", folder)
    assert again.exit_code == 2
    assert f"fallow train --resume {folder}" in again.stderr.replace("\n", "")
    more = run("train", "--resume", folder, "--steps", 3, "--json")
    assert more.exit_code == 0, more.output
    assert json.loads(more.stdout)["steps"] == 3
    other = run("train", "--resume", folder, "--lr", 0.5)
    assert other.exit_code == 2
    assert "cannot go on with other settings: lr is 0.5, was None" in other.stderr


def test_a_run_that_diverges_ends_with_exit_code_2(tiny_sd, pictures, tmp_path, quick):
    few = ("--steps", 6, "--batch-size", 2, "--samples", 0, "--device", "cpu", "--warmup", 0, "--lr", 1e30)
    result = run(
        "train", "--model", tiny_sd, "--data", pictures, "--output", tmp_path / "run", "--method", "full", *few
    )
    assert result.exit_code == 2
    assert "Lower lr=1e+30" in result.stderr.replace("\n", " ")


@pytest.mark.timeout(120)
def test_compare_takes_methods_with_commas_and_leaves_a_page(tiny_sd, pictures, tmp_path, quick, grey_judge):
    rates = [word for name in ("sara", "lora") for word in ("--lrs", f"{name}=1e-3")]
    few = ("--steps", 2, "--images", 2, "--prior-images", 0, "--sample-steps", 1, "--seeds", 0, "--device", "cpu")
    where = ("--model", tiny_sd, "--data", pictures, "--output", tmp_path / "c")
    result = run("compare", "--methods", "sara,lora", "--train", "samples=0", *where, *rates, *few)
    assert result.exit_code == 0, result.output
    assert {line.split()[0] for line in result.stdout.splitlines() if line.strip()} >= {"sara", "lora", "page"}
    assert (tmp_path / "c" / "comparison.html").is_file()
