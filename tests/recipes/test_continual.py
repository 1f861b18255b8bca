"""`fallow continual`: a whole job of a few steps, its files, its table, what it does not do twice, what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fallow.cli import app
from fallow.core.errors import ConfigError, DataError
from fallow.recipes import continual as module
from fallow.recipes.classifiers import make_classifier
from fallow.recipes.continual import ContinualConfig, continual
from fallow.recipes.continual_data import task_list
from fallow.recipes.continual_metrics import figures
from fallow.recipes.continual_tasks import TaskSequence

FEW: dict[str, Any] = {"steps": 3, "base_steps": 4, "seeds": [0], "lrs": [1e-2], "device": "cpu"}


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_several_methods_learn_digits_that_turn_and_are_set_side_by_side(tmp_path: Path) -> None:
    config = ContinualConfig(
        **{**FEW, "lrs": [1e-3, 1e-2], "seeds": [0, 1]}, methods=["codyra", "lora:2", "full"],
        options={"codyra": {"gate_init": "ones"}}, gate_factors={"codyra": 10.0}, output=tmp_path / "job",
    )  # fmt: skip
    folder = continual(config, command="fallow continual")
    told = result(folder)
    assert told["status"] == "finished"
    assert told["tasks"] == ["90", "180", "270"]
    assert [method["label"] for method in told["methods"]] == ["codyra", "lora:2", "full"]
    for method in told["methods"]:
        assert method["lr"] in config.lrs
        assert len(method["runs"]) == 2
        for run in method["runs"]:
            assert np.array(run["matrix"]).shape == (4, 3)
            assert {name: run[name] for name in ("last", "average", "transfer")} == pytest.approx(
                {name: figures(run["matrix"])[name] for name in ("last", "average", "transfer")}
            )
            assert run["known_each"][0] == run["known_before"]
        assert method["figures"]["last"]["mean"] == pytest.approx(sum(run["last"] for run in method["runs"]) / 2)
    codyra, lora, full = told["methods"]
    assert lora["trained_numbers"] == 2 * ((64 + 128) + 2 * (128 + 128) + (128 + 10))
    assert codyra["trained_numbers"] == 16 * ((64 + 128 + 1) + 2 * (128 + 128 + 1)) + 10 * (128 + 10 + 1)
    assert full["trained_numbers"] == told["total_parameters"]
    assert (full["figures"]["mean_rank"]["mean"], lora["figures"]["mean_rank"]["mean"]) == (None, 2.0)
    page = (folder / "report.html").read_text()
    assert all(text in page for text in ("codyra", "lora:2", "What it knew before", "after 270"))
    assert "<script" not in page
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["task"] for line in lines} == {"90", "180", "270"}
    assert sorted(path.name for path in (folder / "tasks" / "lora-2" / "seed-1").iterdir()) == [
        "180.safetensors", "270.safetensors", "90.safetensors", "sequence.json",
    ]  # fmt: skip


def test_the_files_of_the_tasks_make_the_judged_model_again(tmp_path: Path) -> None:
    folder = continual(ContinualConfig(**FEW, methods=["codyra"], output=tmp_path / "job"))
    run = result(folder)["methods"][0]["runs"][0]
    job = module._Job(ContinualConfig(**FEW, methods=["codyra"]), module.Console(quiet=True))
    classifier, listed = job._fresh(0)
    tasks = TaskSequence.load(classifier.network, folder / "tasks" / "codyra" / "seed-0")
    assert [classifier.accuracy(task.test) for task in listed.tasks] == pytest.approx(run["matrix"][3], abs=0.003)
    for name in ("270", "180", "90"):
        tasks.remove_task(name)
    assert classifier.accuracy(listed.known.test) == pytest.approx(run["known_before"], abs=0.003)


def test_a_stopped_job_goes_on_where_it_was_and_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ContinualConfig(**FEW, methods=["lora:1", "lora:2"], output=tmp_path / "job")
    made: list[str] = []
    original = module._Job._run

    def counted(self: Any, contestant: Any, *more: Any) -> Any:
        made.append(contestant.label)
        if len(made) == 2:
            raise KeyboardInterrupt
        return original(self, contestant, *more)

    monkeypatch.setattr(module._Job, "_run", counted)
    with pytest.raises(KeyboardInterrupt):
        continual(config)
    assert result(tmp_path / "job")["status"] == "running"
    continual(config)
    assert made == ["lora:1", "lora:2", "lora:2"]
    assert result(tmp_path / "job")["status"] == "finished"
    with pytest.raises(ConfigError, match="holds a job of other settings"):
        continual(config.model_copy(update={"steps": 4}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        continual(config.model_copy(update={"output": tmp_path / "other"}))


def test_a_rate_that_fails_is_not_chosen_and_a_method_that_fails_is_told(tmp_path: Path) -> None:
    settings = {**FEW, "lrs": [1e-3, 1e30], "steps": 60}
    folder = continual(ContinualConfig(**settings, methods=["lora:2"], output=tmp_path / "job"))
    (method,) = result(folder)["methods"]
    assert method["lr"] == 1e-3
    assert [one["value"] is None for one in method["sweep"]] == [False, True]
    failing = {**FEW, "lrs": [1e30], "steps": 60}
    folder = continual(ContinualConfig(**failing, methods=["lora:2"], output=tmp_path / "bad"))
    (method,) = result(folder)["methods"]
    assert "nan" in method["runs"][0]["failed"] or "inf" in method["runs"][0]["failed"]
    assert method["figures"]["last"]["mean"] is None
    assert "failed</b>" in (folder / "report.html").read_text()


def test_thresholds_that_follow_the_rate_follow_the_cosine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    original = module.condition
    monkeypatch.setattr(
        module, "condition", lambda net, lr_share: told.append(lr_share) or original(net, lr_share=lr_share)
    )
    options = {"codyra": {"threshold_mode": "lr"}}
    settings = {**FEW, "steps": 4}
    continual(ContinualConfig(**settings, methods=["codyra"], options=options, output=tmp_path / "job", order=["90"]))
    assert told == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])


@pytest.fixture
def folder_of_tasks(tmp_path: Path) -> Path:
    """Tasks with classes of their own: animals (cat, dog), plants (oak, rose), and colours, taught before."""
    for task, names in (("animals", ("cat", "dog")), ("plants", ("oak", "rose")), ("colours", ("cat", "rose"))):
        for number, name in enumerate(names):
            (tmp_path / "data" / task / name).mkdir(parents=True)
            for at in range(10):
                pixels = np.random.default_rng(100 * number + at).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / task / name / f"{at}.png")
    return tmp_path / "data"


def test_folders_with_new_classes_train_a_classifier_of_all_whose_change_is_kept(
    folder_of_tasks: Path, tiny_vit: Callable, tmp_path: Path
) -> None:
    from transformers import ViTImageProcessor

    tiny_vit().save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    config = ContinualConfig(
        **FEW, data=str(folder_of_tasks), model=str(tmp_path / "vit"), methods=["codyra"], resolution=8,
        order=["plants", "animals"], shots=3, output=tmp_path / "job",
    )  # fmt: skip
    told = result(continual(config))
    assert told["classes"] == ["cat", "dog", "oak", "rose"]
    assert told["tasks"] == ["plants", "animals"]
    from safetensors.torch import load_file

    head = load_file(tmp_path / "job" / "tasks" / "codyra" / "seed-0" / "plants.safetensors")["classifier.weight.whole"]
    assert head[:2].abs().sum() == 0  # cat and dog are another task's
    assert (head[2:].abs().sum(1) > 0).all()


def test_a_small_network_needs_something_to_know_first(folder_of_tasks: Path, tmp_path: Path) -> None:
    given = {**FEW, "data": str(folder_of_tasks), "model": "mlp", "methods": ["lora:2"], "resolution": 8}
    with pytest.raises(ConfigError, match="model=mlp has to be taught something first"):
        continual(ContinualConfig(**given, output=tmp_path / "job"))
    assert not (tmp_path / "job").exists()
    told = result(continual(ContinualConfig(**given, source="colours", output=tmp_path / "job")))
    assert told["tasks"] == ["animals", "plants"]
    assert told["methods"][0]["figures"]["known_before"]["mean"] is not None


def test_the_built_in_sequences_are_what_they_say(tmp_path: Path) -> None:
    turned = task_list("turned-digits", 0, tmp_path)
    upright, first = turned.known.test.batch(torch.arange(5)), turned.tasks[0].test.batch(torch.arange(5))
    assert torch.equal(first[0], upright[0].rot90(1, (2, 3)))
    assert torch.equal(first[1], upright[1])
    styles = task_list("styles", 0, tmp_path, order=["bronze", "sunset"])
    assert [task.name for task in styles.tasks] == ["bronze", "sunset"]
    assert styles.known is None
    for bad, message in (
        ({"data": "digit"}, r"data=digit is neither a folder nor a set that is built in"),
        ({"data": "turned-digits", "order": ["91"]}, "order names '91', which is no task"),
        (
            {"data": "styles", "order": ["bronce"]},
            r"order names 'bronce', which is no shipped style \(did you mean 'bronze'",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            task_list(bad["data"], 0, tmp_path, order=bad.get("order", ()))
    with pytest.raises(DataError, match="dataset-fashion-mnist"):
        task_list("garments-digits", 0, tmp_path)


def test_garments_come_before_digits_of_two_halves_and_shuffled_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from fallow.recipes import continual_data
    from fallow.recipes.labelled import digits

    monkeypatch.setattr(continual_data, "garments", lambda folder: digits())
    listed = task_list("garments-digits", 0, Path())
    assert [task.name for task in listed.tasks] == ["digits-0-4", "digits-5-9", "shuffled"]
    assert [task.classes for task in listed.tasks] == [list(range(5)), list(range(5, 10)), list(range(10))]
    whole = listed.tasks[2].test.read(torch.arange(20))
    plain = continual_data.split("digits", digits(), 0).test.read(torch.arange(20))
    assert not torch.equal(whole, plain)
    assert torch.equal(whole.flatten(1).sort(1).values, plain.flatten(1).sort(1).values)


def test_the_shipped_network_takes_styles_with_a_convolution_adapted(tmp_path: Path) -> None:
    config = ContinualConfig(
        **{**FEW, "steps": 2}, data="styles", order=["bronze"], methods=["codyra"], output=tmp_path / "job"
    )
    told = result(continual(config))
    ranks = told["methods"][0]["runs"][0]["ranks"]
    assert {"body.0.0", "body.8", "classifier"} <= set(ranks[0])
    assert told["methods"][0]["figures"]["known"]["mean"] is None
    assert told["methods"][0]["runs"][0]["matrix"][0][0] > 0.5
    assert make_classifier("garment-net", told["classes"], 32, 3).fresh_head is False


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": ["lora:2", "lora:2"]}, "names one of them twice"),
        ({"methods": ["lorra"]}, r"'lorra' is no method \(did you mean 'lora'"),
        ({"methods": ["lora:x"]}, "'lora:x' needs a whole number behind the colon"),
        ({"methods": ["linear"]}, "'linear' is none of this job"),
        ({"methods": ["full:2"]}, "'full' has neither rank nor options"),
        ({"methods": ["a/b=lora"]}, "'a/b' must be of letters"),
        ({"options": {"sora": {}}}, "options are given for sora"),
        ({"options": {"codyra": {"max_kapa": 1}}}, "'codyra' has no option max_kapa=1"),
        ({"gate_factors": {"lora:1": 2.0}}, "gate_factors: lora:1=2.0 must be above 0 and for one of"),
        ({"lrs": [0.0]}, "must all be above 0"),
        ({"seeds": [1, 1]}, "holds one of them twice"),
        ({"order": ["a", "b"], "source": "a"}, "source=a is among order"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    from fallow.recipes.settings import make_config

    with pytest.raises(ConfigError, match=message):
        make_config(ContinualConfig, given)


def test_a_method_that_cannot_be_kept_apart_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method='dora' changes a weight in a way that is no product"):
        continual(ContinualConfig(**FEW, methods=["dora"], output=tmp_path / "job"))
    assert not (tmp_path / "job").exists()


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    words = ["continual", "--methods", "lora:1,two=lora:2", "--steps", "2", "--base-steps", "2", "--seeds", "0"]
    words += ["--lrs", "1e-3", "--device", "cpu", "--output", str(tmp_path / "job")]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    row = next(line for line in shown.stdout.splitlines() if line.strip().startswith("two"))
    assert row.split()[1] == "0.001"
    assert str(tmp_path / "job" / "report.html") in "".join(shown.stdout.split())  # long paths are broken
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert told["folder"] == str(tmp_path / "job")
    assert [method["label"] for method in told["methods"]] == ["lora:1", "two"]
    refused = CliRunner().invoke(app, ["continual", "--steps", "0"])
    assert refused.exit_code == 2
    assert "--steps 0" in refused.stderr


def test_the_walkthrough_learns_keeps_and_takes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "walkthroughs" / "continual.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(block.replace("range(100)", "range(4)").replace("steps=100", "steps=4"), names)
    assert list(names["tasks"].tasks) == ["animals", "cars"]
    assert sorted(path.name for path in (tmp_path / "tasks").iterdir()) == [
        "animals.safetensors", "cars.safetensors", "sequence.json",
    ]  # fmt: skip
    assert type(names["network"][0]) is torch.nn.Linear
