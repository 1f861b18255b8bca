"""A run of two processes is, picture for picture, the run of one; only the first writes, and one error ends all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fallow.core.distributed import rank
from fallow.core.errors import ConfigError, DataError
from fallow.core.files import read_tensors
from fallow.recipes import processes, text_to_image
from fallow.recipes.checkpoints import checkpoints
from fallow.recipes.processes import Ended, cause, check_count, wait_for
from fallow.recipes.text_to_image import train
from fallow.recipes.train_config import TrainConfig
from ranks import run_ranks

EPS = {"eps": 1e-3}  # so that AdamW does not blow the rounding of a gradient that is next to zero up to whole steps
SARA = {"fraction": 0.3, "reselect_at": 2, "rank_weight": 0}
METHODS: dict[str, dict[str, Any]] = {
    "sara": {"method": "sara", "options": SARA | EPS, "batch_size": 3},
    "lora": {"method": "lora", "options": {"rank": 2} | EPS, "batch_size": 2, "accumulation": 2, "ema": True},
    "largest": {"method": "largest", "options": EPS, "batch_size": 1},  # the second process has no picture
}


def config(model: str, data: str, folder: Path, **more: Any) -> TrainConfig:
    few = {"steps": 3, "warmup": 1, "lr": 1e-2, "samples": 2, "sample_steps": 1, "log_every": 2, "save_every": 0}
    return TrainConfig(model=model, data=data, output=folder, device="cpu", **few | more)


def no_page() -> None:
    text_to_image.write_run_report = lambda folder: folder / "report.html"


def interrupt_first(step: int) -> None:
    """Only one of the processes hears of it."""
    if step == 2 and rank() == 1:
        os.kill(os.getpid(), signal.SIGINT)


def on_a_rank(model: str, data: str, place: str) -> dict[str, Any]:
    no_page()
    found: dict[str, Any] = {"main": []}
    for name, settings in METHODS.items():
        outcome = train(config(model, data, Path(place) / name, **settings))
        found["main"].append(outcome.main)
    stopped = Path(place) / "stopped"
    try:
        train(config(model, data, stopped, **METHODS["sara"]), after_step=interrupt_first)
    except KeyboardInterrupt as error:
        found["stopped"] = str(error)
    torch.distributed.barrier()
    found["checkpoints"] = [folder.name for folder in checkpoints(stopped)]
    train(TrainConfig(resume=stopped))
    try:
        train(config(model, data, Path(place) / "sara"))
    except ConfigError as error:
        found["taken"] = str(error)
    try:
        train(config(model, str(Path(place) / "nothing"), Path(place) / "never"))
    except DataError as error:
        found["no data"] = str(error)
    return found


@pytest.fixture
def one_and_two(tiny_sd: Path, pictures: Path, tmp_path: Path, quick: None) -> tuple[Path, Path, list[dict[str, Any]]]:
    for name, settings in METHODS.items():
        train(config(str(tiny_sd), str(pictures), tmp_path / "one" / name, **settings))
    found = run_ranks(on_a_rank, str(tiny_sd), str(pictures), str(tmp_path / "two"))
    return tmp_path / "one", tmp_path / "two", found


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(run / "adapter" / "adapter_model.safetensors")[0]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_make_the_run_of_one(one_and_two):
    one, two, found = one_and_two
    for name in METHODS:
        assert max(float(value.abs().max()) for key, value in adapter(one / name).items() if "idx" not in key) > 2e-3
        for tensor, mine in adapter(one / name).items():
            theirs = adapter(two / name)[tensor]
            if mine.is_floating_point():
                torch.testing.assert_close(theirs, mine, atol=1e-5, rtol=0, msg=f"{name} {tensor}")
            else:
                assert torch.equal(theirs, mine), f"{name} {tensor}: the same entries"
        for here, there in zip(lines(one / name), lines(two / name), strict=True):
            if "loss" in here:
                assert there["loss"] == pytest.approx(here["loss"], abs=1e-5)
                assert there["grad_norm"] == pytest.approx(here["grad_norm"], rel=1e-3)
        assert (one / name / "samples" / "after.png").exists()
        assert sorted(p.name for p in (one / name).iterdir()) == sorted(p.name for p in (two / name).iterdir())
    assert found[0]["main"] == [True] * 3
    assert found[1]["main"] == [False] * 3

    for told in found:
        assert "stopped after step 2 of 3, which is saved" in told["stopped"]
        assert str(two / "stopped") in told["stopped"]
        assert told["checkpoints"] == ["step-000002"]
        assert "is not empty" in told["taken"]
        assert "nothing" in told["no data"]
    assert not (two / "never").exists()
    for tensor, mine in adapter(two / "sara").items():
        assert torch.equal(adapter(two / "stopped")[tensor], mine), "resumed to the last bit"


def start(*arguments: str, **more: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fallow", "train", *arguments], env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **more,
    )  # fmt: skip


def test_the_command_starts_processes_and_ends_them_with_one_error(tiny_sd, pictures, tmp_path):
    common = ["--model", str(tiny_sd), "--device", "cpu", "--samples", "0", "--batch-size", "2", "--processes", "2"]
    wrong = start("--data", str(tmp_path / "nothing"), "--output", str(tmp_path / "wrong"), *common)
    endless = ["--steps", "100000", "--output", str(tmp_path / "run"), "--log-every", "1"]
    running = start("--data", str(pictures), *common, *endless)
    out, err = wrong.communicate(timeout=200)
    assert (wrong.returncode, out) == (2, "")
    assert err.count("Error:") == 1
    assert "nothing" in err
    assert "Traceback" not in err
    assert not (tmp_path / "wrong").exists()

    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=200)
    assert running.returncode == 130, err
    assert err.count("Interrupted") == 1
    assert "fallow train --resume" in err
    assert len(checkpoints(tmp_path / "run")) == 1


def ended(monkeypatch: pytest.MonkeyPatch, folder: Path, *scripts: str) -> Ended:
    monkeypatch.setattr(processes, "PATIENCE", 0.3)
    running = [subprocess.Popen(["sh", "-c", script], start_new_session=True) for script in scripts]
    return cause(running, wait_for(running), folder)


def test_the_cause_is_told_and_not_what_followed_from_it(monkeypatch, tmp_path):
    def report(number: int, when: float, code: int, message: str) -> None:
        told = {"time": when, "title": "Error", "message": message, "code": code}
        (tmp_path / f"{number}.json").write_text(json.dumps(told))

    assert ended(monkeypatch, tmp_path, "exit 0", "exit 0").code == 0
    killed = ended(monkeypatch, tmp_path, "sleep 100", "kill -9 $$")
    assert killed.code == 1
    assert killed.message.startswith("process 1 of 2 was ended by SIGKILL (the system does so where memory runs out)")
    report(1, 10.0, 2, "no pictures")
    report(0, 10.5, 1, "connection closed by peer")
    assert ended(monkeypatch, tmp_path, "sleep 0.2; exit 1", "exit 2") == Ended(2, "Error", "no pictures")


def test_impossible_numbers_of_processes_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="processes=0 makes no run"):
        check_count(0, None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="processes=2 need a GPU each, and there is 1; give at most 1, or --device"):
        check_count(2, None)
    check_count(2, "cpu")
    check_count(1, None)
