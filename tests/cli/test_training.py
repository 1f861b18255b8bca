"""`fallow train` and `fallow compare` from the command line to what they print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from fallow.cli import app, training
from fallow.recipes import compare as compare_module
from fallow.recipes import text_to_image
from fallow.recipes.text_to_image import Outcome
from fallow.recipes.train_config import TrainConfig

INFO = {
    "method": "lora", "model": "some/model", "data": "things", "trained_parameters": 1000, "total_parameters": 50_000,
    "adapter_bytes": 4321, "seconds": 12.5, "steps": 30, "peak_memory_bytes": 7_000_000, "memory_measured": "all of it",
    "prompts": ["a red dress"], "trained_where": {"conv_in.weight": [1, 2]}, "status": "finished",
}  # fmt: skip


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What train was called with; it does nothing."""
    noted = SimpleNamespace(config=None, command=None)

    def train(config: TrainConfig, console: Any, command: str) -> Outcome:
        noted.config, noted.command = config, command
        run = Path("runs") / "lora-things-1"
        return Outcome(run, run / "adapter", run / "report.html", dict(INFO))

    monkeypatch.setattr(text_to_image, "train", train)
    return noted


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})


def test_without_arguments_it_is_sara_on_what_ships(seen):
    assert run("train").exit_code == 0
    assert seen.config == TrainConfig()
    assert (seen.config.model, seen.config.data, seen.config.method) == ("mini-sd", "blueprint", "sara")


def test_flags_reach_the_settings_and_the_methods_own_arguments_its_options(seen, monkeypatch):
    line = "train --method lora --rank 4 -O lora_dropout=0.1 --steps 7 --no-flip --lr 1e-3 --precision bf16 --ema"
    monkeypatch.setattr(sys, "argv", ["/bin/fallow", *line.split(), "--sample-prompts", "a dress"])
    result = run(*sys.argv[1:])
    assert result.exit_code == 0, result.output
    wanted = TrainConfig(
        method="lora", options={"rank": 4, "lora_dropout": 0.1}, steps=7, flip=False, lr=1e-3, precision="bf16",
        sample_prompts=["a dress"], ema=True,
    )  # fmt: skip
    assert seen.config == wanted
    assert seen.command == f"fallow {line} --sample-prompts 'a dress'"


def test_a_run_is_resumed_with_nothing_but_what_is_given(seen, tmp_path):
    assert run("train", "--resume", str(tmp_path), "--steps", "9").exit_code == 0
    assert seen.config.model_fields_set == {"resume", "steps"}
    assert seen.config.resume == tmp_path
    both = run("train", "--resume", str(tmp_path), "--config", str(tmp_path / "config.toml"))
    assert both.exit_code == 2
    assert "leave --config out" in both.stderr


def test_what_was_made_is_told_with_a_command_that_draws_with_it(seen):
    told = run("train").stdout
    for text in ("lora on things", "runs/lora-things-1/report.html", "4.32 kB", "1,000 of 50,000 parameters (2%)",
                 "12 s for 30 steps", "7 MB (all of it)",
                 "fallow generate 'a red dress' --model some/model --adapter runs/lora-things-1/adapter"):  # fmt: skip
        assert text in told, text


def test_json_is_one_document_without_the_long_list_of_weights(seen):
    told = json.loads(run("train", "--json").stdout)
    assert told["adapter"] == "runs/lora-things-1/adapter"
    assert (told["status"], told["steps"]) == ("finished", 30)
    assert "trained_where" not in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "saraa"], "method=saraa does not exist (did you mean 'sara'?)"),
        (["-O", "fractoin=0.1"], "the method sara has no option 'fractoin' (did you mean 'fraction'?)"),
        (["--steps", "many"], "--steps many: input should be a valid integer"),
        (["--fraction", "2.0"], "fraction=2.0"),
        (["--stpes", "3"], "--steps"),
        (["--config", "nowhere.toml"], "there is no such file"),
    ],
)
def test_mistakes_are_told_with_exit_code_2_and_without_a_traceback(seen, words, said):
    result = run("train", *words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert seen.config is None


def test_a_comparison_is_shown_as_a_table_and_as_json(monkeypatch, tmp_path):
    figures = {
        "label": "sara", "lr": 6e-4, "frechet": 12.345, "alignment": 0.9, "prior_frechet": 1.5, "vlhi": 1.25,
        "trained_parameters": 1300.0, "seconds": 42.0, "peak_memory_bytes": 9.5e8, "adapter_bytes": 5200.0,
    }  # fmt: skip
    failed = dict.fromkeys(figures) | {"label": "lora"}
    (tmp_path / "comparison.json").write_text(json.dumps({"methods": [figures, failed], "status": "finished"}))
    given = []
    monkeypatch.setattr(compare_module, "compare", lambda config, console: given.append(config) or tmp_path)
    result = run("compare", "--methods", "sara,lora", "--lrs", "sara=1e-3,2e-3", "--seeds", "0,1")
    assert result.exit_code == 0, result.output
    assert (given[0].methods, given[0].lrs, given[0].seeds) == (["sara", "lora"], {"sara": [1e-3, 2e-3]}, [0, 1])
    row = next(line for line in result.stdout.splitlines() if line.strip().startswith("sara"))
    assert row.split() == [
        "sara",
        "0.0006",
        "12.35",
        "0.9",
        "1.5",
        "1.25",
        "1,300",
        "42",
        "s",
        "950",
        "MB",
        "5.2",
        "kB",
    ]
    row = next(line for line in result.stdout.splitlines() if line.strip().startswith("lora"))
    assert row.split() == ["lora", *["-"] * 7, "?", "?"]
    assert str(tmp_path / "comparison.html") in result.stdout
    told = json.loads(run("compare", "--json").stdout)
    assert told["folder"] == str(tmp_path)
    assert told["methods"][0]["frechet"] == 12.345


def test_the_help_shows_every_setting_under_one_heading():
    under = [name for names in training.HEADINGS.values() for name in names.split()]
    assert sorted(under) == sorted(set(TrainConfig.model_fields) - {"options", "resume"})
    shown = run("train", "--help").output
    assert [line.split("─ ")[1].split(" ─")[0] for line in shown.splitlines() if "╭─ " in line] == [
        "Options", training.OWN_ARGUMENTS, *training.HEADINGS
    ]  # fmt: skip
