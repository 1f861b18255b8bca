"""A run that is stopped and resumed is, to the last bit, the run that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from fallow.core.errors import AdapterError, ConfigError
from fallow.core.files import _host, read_tensors
from fallow.recipes.checkpoints import checkpoints, join, load_checkpoint, save_checkpoint, split
from fallow.recipes.pipelines import load_pipeline
from fallow.recipes.run_directory import alone
from fallow.recipes.text_to_image import train, weight_marks
from fallow.recipes.train_config import TrainConfig

METHODS: dict[str, dict[str, Any]] = {
    "sara": {"method": "sara", "options": {"reselect_at": [3, 9], "rank_weight": 5e-3, "rank_min_side": 15}},
    "sara, averaged": {"method": "sara", "options": {"reselect_at": 9}, "ema": True, "lr": 0.01},
    "shira": {"method": "shira", "ema": True},
    "lora": {"method": "lora", "options": {"rank": 2, "lora_dropout": 0.3}, "precision": "fp16"},
    "full": {"method": "full", "ema": True, "precision": "bf16"},
}


def interrupt_at(step: int) -> Callable[[int], None]:
    return lambda done: os.kill(os.getpid(), signal.SIGINT) if done == step else None


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def assert_same_file(one: Path, other: Path) -> None:
    """Bit for bit, but for the order of the metadata, which safetensors leaves to chance."""
    (tensors, told), (others, also_told) = read_tensors(one), read_tensors(other)
    assert told == also_told
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


@pytest.fixture
def settings(tiny_sd: Path, pictures: Path, quick: None) -> Callable[..., TrainConfig]:
    def make(**more: Any) -> TrainConfig:
        few = {"steps": 12, "batch_size": 2, "accumulation": 2, "warmup": 2, "samples": 0, "log_every": 3}
        return TrainConfig(model=str(tiny_sd), data=str(pictures), device="cpu", **few | more)

    return make


@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_at_step_7_and_resumed_is_the_whole_run_bit_for_bit(settings, tmp_path, method):
    whole = train(settings(**METHODS[method], output=tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt, match=r"after step 7 of 12, which is saved.*--resume .*parts"):
        train(settings(**METHODS[method], output=tmp_path / "parts"), after_step=interrupt_at(7))
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["status"] == "stopped"
    parts = train(TrainConfig(resume=tmp_path / "parts"))
    assert losses(parts.folder) == losses(whole.folder)
    assert sorted(losses(parts.folder)) == list(range(1, 13))
    assert_same_file(parts.adapter / "adapter_model.safetensors", whole.adapter / "adapter_model.safetensors")
    assert parts.info["status"] == "finished"
    assert parts.info["steps"] == 12
    if method == "sara":
        events = [json.loads(line) for line in (parts.folder / "metrics.jsonl").read_text().splitlines()]
        told = [(e["event"], e["step"]) for e in events if "event" in e]
        assert told == [("reselect", 3), ("resume", 7), ("reselect", 9)]


def test_what_a_killed_run_did_after_its_last_checkpoint_is_done_again(settings, tmp_path):
    def die(step: int) -> None:
        if step == 6:
            raise RuntimeError("the power is gone")

    whole = train(settings(output=tmp_path / "whole"))
    with pytest.raises(RuntimeError):
        train(settings(output=tmp_path / "parts", save_every=4, log_every=1), after_step=die)
    assert sorted(losses(tmp_path / "parts")) == [1, 2, 3, 4, 5, 6]
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    parts = train(TrainConfig(resume=tmp_path / "parts"))
    assert losses(parts.folder) == losses(whole.folder)


def test_a_finished_run_goes_on_to_more_steps(settings, tmp_path):
    first = train(settings(output=tmp_path / "run", steps=3, schedule="constant"))
    more = train(TrainConfig(resume=first.folder, steps=5))
    whole = train(settings(output=tmp_path / "whole", steps=5, schedule="constant", options={"reselect_at": 2}))
    assert losses(more.folder) == losses(whole.folder)
    assert [folder.name for folder in checkpoints(more.folder)] == ["step-000003", "step-000005"]


def test_other_settings_are_refused_by_name_and_free_ones_are_not(settings, tmp_path):
    run = train(settings(output=tmp_path / "run", steps=2)).folder
    with pytest.raises(ConfigError, match="batch_size is 3, was 2"):
        train(TrainConfig(resume=run, batch_size=3))
    with pytest.raises(ConfigError, match="steps=1 lies behind the 2 steps already made"):
        train(TrainConfig(resume=run, steps=1))
    with pytest.raises(ConfigError, match="two directories"):
        train(TrainConfig(resume=run, output=tmp_path / "other"))
    assert train(TrainConfig(resume=run, batch_size=2, steps=3, keep=1)).info["steps"] == 3
    assert [folder.name for folder in checkpoints(run)] == ["step-000003"]


def test_other_pictures_are_refused(settings, tmp_path, pictures):
    run = train(settings(output=tmp_path / "run", steps=2)).folder
    (pictures / "0.png").unlink()
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    (pictures / "metadata.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(ConfigError, match=r"buckets=\[6\], this one has buckets=\[5\]"):
        train(TrainConfig(resume=run, steps=3))


def test_what_is_no_run_or_has_no_checkpoint_or_a_broken_one_is_told(settings, tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        train(TrainConfig(resume=tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.toml"):
        train(TrainConfig(resume=tmp_path / "empty"))
    run = train(settings(output=tmp_path / "run", steps=2, save_every=0)).folder
    with pytest.raises(ConfigError, match="no checkpoint"):
        train(TrainConfig(resume=run))
    save_checkpoint(run, 1, {"step": 1}, 0)
    save_checkpoint(run, 2, {"step": 2}, 0)
    file = run / "checkpoints" / "step-000002" / "state.json"
    file.write_text(file.read_text()[:5])
    with pytest.raises(
        AdapterError, match=r"step-000002 is damaged.*delete .*step-000002 to go on from the one before"
    ):
        train(TrainConfig(resume=run))
    file.write_text('{"dict": 3}')
    with pytest.raises(AdapterError, match="step-000002 is damaged"):
        train(TrainConfig(resume=run))
    save_checkpoint(run, 2, {"step": 2}, 0)
    with pytest.raises(AdapterError, match=r"last checkpoint of .*run does not fit this run \(KeyError: 'base'\)"):
        train(TrainConfig(resume=run))
    with (run / "config.toml").open("a") as config:
        config.write("[extra]\na = 1\n")
    with pytest.raises(ConfigError, match=r"run/config.toml: there is no setting 'extra'"):
        train(TrainConfig(resume=run))
    assert [folder.name for folder in checkpoints(run)] == ["step-000001", "step-000002"]


def test_a_resumed_run_tells_every_command_and_how_to_go_on_can_be_pasted(settings, tmp_path):
    run = tmp_path / "my run"
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(settings(output=run), command="fallow train --steps 12", after_step=interrupt_at(2))
    assert str(stopped.value).endswith(f"--resume '{run}'")
    with pytest.raises(ConfigError, match=f"--resume '{run}'"):
        train(settings(output=run))
    info = train(TrainConfig(resume=run, steps=12), command="fallow train --resume 'my run'").info
    assert info["command"] == "fallow train --steps 12\nfallow train --resume 'my run'"


def test_a_nested_state_survives_as_tensors_and_json(tmp_path):
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 1: {}},
        "groups": [
            {"betas": (0.9, 0.99), "params": [0, 1], "fused": True, "lr": 1e-4, "name": None, "most": float("inf")}
        ],
        "half": torch.randn(3).bfloat16(), "index": torch.arange(3, dtype=torch.int32), "empty": torch.zeros(0),
    }  # fmt: skip
    tensors, rest = split(state)
    again = join(tensors, json.loads(json.dumps(rest)))
    assert again["groups"] == state["groups"]
    assert list(again["state"]) == [0, 1]
    save_checkpoint(tmp_path, 5, state, 0)
    read = load_checkpoint(tmp_path)
    assert read["groups"] == state["groups"]
    for name in ("half", "index", "empty"):
        assert read[name].dtype == state[name].dtype
        assert torch.equal(read[name], state[name])
    assert torch.equal(read["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    assert {file.name for file in (tmp_path / "checkpoints" / "step-000005").iterdir()} == {
        "state.json", "state.safetensors",
    }  # fmt: skip
    with pytest.raises(TypeError, match="a set"):
        split({"a": {1}})


def test_the_newest_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    assert load_checkpoint(tmp_path) == {"step": 3}


def test_a_run_whose_base_has_been_exchanged_is_not_resumed(settings, tiny_sd, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_sd, model)
    with pytest.raises(KeyboardInterrupt):
        train(settings(output=tmp_path / "run").model_copy(update={"model": str(model)}), after_step=interrupt_at(4))
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.01)
    unet.save_pretrained(model / "unet")
    with pytest.raises(ConfigError, match=r"begun on another base: 'unet.conv_in.weight' of .* holds other values now"):
        train(TrainConfig(resume=tmp_path / "run"))
    assert checkpoints(tmp_path / "run")


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew_in_its_place(settings, tmp_path):
    whole = train(settings(output=tmp_path / "whole", steps=3))
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(whole.folder / "config.toml", run)  # killed in its start-up: this is all there is
    (run / f".config.toml.{_host()}-1-x.partial").touch()
    parts = train(TrainConfig(resume=run))
    assert losses(parts.folder) == losses(whole.folder)
    assert_same_file(parts.adapter / "adapter_model.safetensors", whole.adapter / "adapter_model.safetensors")
    assert not list(run.rglob(".*"))


def test_two_runs_cannot_write_into_one_directory(settings, tmp_path):
    (tmp_path / "run").mkdir()
    with alone(tmp_path / "run"):
        for more in ({"output": tmp_path / "run"}, {"output": tmp_path / "run", "steps": 3}):
            with pytest.raises(ConfigError, match=rf"run is being written by another run \(process {os.getpid()} on "):
                train(settings(**more))
    assert not list((tmp_path / "run").iterdir())
    with alone(tmp_path / "run"):
        pass


def test_one_changed_bit_of_any_weight_of_any_part_is_another_base(tiny_sd):
    pipeline = load_pipeline(str(tiny_sd), device="cpu")
    known = weight_marks(pipeline)
    assert {name.split(".")[0] for name in known} == {"unet", "vae", "text_encoder"}
    assert len(known) == sum(len(list(p.parameters())) for p in (pipeline.unet, pipeline.vae, pipeline.text_encoder))
    for part in ("unet", "vae", "text_encoder"):
        name, weight = list(getattr(pipeline, part).named_parameters())[-1]
        weight.data.view(-1).view(torch.int32)[-1] ^= 1
        now = weight_marks(pipeline)
        assert [one for one in known if now[one] != known[one]] == [f"{part}.{name}"]
        weight.data.view(-1).view(torch.int32)[-1] ^= 1
    assert weight_marks(pipeline) == known


def test_a_checkpoint_of_which_a_bit_has_changed_is_not_read(tmp_path):
    folder = save_checkpoint(tmp_path, 1, {"step": 1, "weight": torch.randn(50)}, 0)
    for name, where in (("state.safetensors", -3), ("state.json", -20)):
        whole = (folder / name).read_bytes()
        other = bytearray(whole)
        other[where] ^= 1
        (folder / name).write_bytes(other)
        with pytest.raises(AdapterError, match="is damaged"):
            load_checkpoint(tmp_path)
        (folder / name).write_bytes(whole)
    assert load_checkpoint(tmp_path)["step"] == 1
