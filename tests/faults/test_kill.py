"""SIGKILL at any moment: what was complete stays, what was not goes, and the run goes on to the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fallow.core import files
from fallow.core.files import atomic_directory, atomic_write, sweep
from fallow.core.sparse import Entry, SparseDelta
from fallow.recipes.checkpoints import checkpoints, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
ROOT = Path(__file__).parents[2]


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weight": torch.full((40, 10), float(step)), "moments": [torch.arange(50) * step]}


def same(found: dict[str, Any], step: int) -> bool:
    return found["step"] == step and bool((found["weight"] == step).all()) and found["moments"][0][1] == step


def hidden(folder: Path) -> list[str]:
    return [place.name for place in folder.rglob(".*")]


def test_a_kill_at_any_call_of_a_checkpoint_leaves_the_one_before_or_the_new_one_whole(kill_and_resume):
    """With the removal of the oldest, which the new one replaces."""

    def prepare(run: Path) -> None:
        for step in (1, 2):
            save_checkpoint(run, step, state(step), keep=2)

    points, newest = 0, []
    for run in kill_and_resume.kill_at_every_call(prepare, lambda run: save_checkpoint(run, 3, state(3), keep=2)):
        points += 1
        before = load_checkpoint(run)["step"]  # without any cleaning up
        assert same(load_checkpoint(run), before)
        assert before in (2, 3)
        sweep(run, deep=True, alone=True)
        assert not hidden(run)
        assert same(load_checkpoint(run), before)
        assert [int(place.name[-1]) for place in checkpoints(run)] in ([1, 2], [1, 2, 3], [2, 3])
        save_checkpoint(run, 3, state(3), keep=2)
        assert [place.name[-1] for place in checkpoints(run)] == ["2", "3"]
        newest.append(before)
    assert points > 20
    assert newest == sorted(newest)  # from some call on it is the new one
    assert {2, 3} == set(newest)


def adapter(value: float) -> SparseDelta:
    index = torch.arange(0, 600, 3, dtype=torch.int32)
    entry = Entry(index, torch.full((200,), value), (30, 20), "float32", "")
    return SparseDelta({"weight": entry}, "delta", {"method": "test"})


@pytest.mark.parametrize("name", ["adapter", "adapter.safetensors"])
@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two steps"])
def test_a_kill_at_any_call_of_saving_an_adapter_leaves_the_old_one_or_the_new(
    kill_and_resume, monkeypatch, name, exchange
):
    if not exchange:
        monkeypatch.setattr(files, "_renameat2", lambda: None)
    points = gone = 0
    for folder in kill_and_resume.kill_at_every_call(
        lambda folder: adapter(1.0).save(folder / name), lambda folder: adapter(2.0).save(folder / name)
    ):
        points += 1
        gone += not (folder / name).exists()
        sweep(folder, alone=True)
        assert not hidden(folder)
        assert [place.name for place in folder.iterdir()] == [name]
        values = SparseDelta.load(folder / name).entries["weight"].values
        assert values.tolist() in ([1.0] * 200, [2.0] * 200)
    assert points > (10 if name == "adapter" else 4)
    assert gone == (1 if name == "adapter" and not exchange else 0)


@pytest.mark.parametrize("write", [atomic_write, atomic_directory])
def test_what_a_killed_writer_left_is_gone_when_the_next_one_writes_there(kill_and_resume, tmp_path, write):
    def action(tell: Callable[[str], None]) -> None:
        with write(tmp_path / "a"):
            tell("writing")
            os.kill(os.getpid(), 9)

    code, told = kill_and_resume.ended(*kill_and_resume.forked(action))
    assert (code, told) == (-9, ["writing"])
    assert len(hidden(tmp_path)) == 1
    files._SWEPT.discard(tmp_path)
    with atomic_directory(tmp_path / "b"):
        pass
    assert len(hidden(tmp_path)) == 1  # a name of its own has no business with those of others
    with atomic_write(tmp_path / "a"):
        pass
    assert not hidden(tmp_path)


@pytest.fixture(scope="module")
def three_kills() -> dict[str, Any]:
    """In a process of its own: torch cannot train in a fork of a process that has trained."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "kill_and_resume.py"), "--kills", "3", "--methods", "sara",
         "--no-page"],
        capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout[done.stdout.index("\n{") :])


def test_three_runs_killed_at_random_moments_end_in_the_weights_of_the_whole_run(three_kills):
    assert three_kills["kills"] == 3
    assert three_kills["tensors_equal"] == 3
    assert three_kills["losses_equal"] == 3
    assert three_kills["left_something_behind"] == 0


def test_the_driver_sees_a_run_that_ends_in_other_weights(kill_and_resume: ModuleType, tmp_path):
    for name, value in (("one", 1.0), ("other", 1.0), ("third", 1.0 + 2**-23)):
        adapter(value).save(tmp_path / f"{name}.safetensors")
    one, other, third = (tmp_path / f"{name}.safetensors" for name in ("one", "other", "third"))
    assert kill_and_resume.same_tensors(one, other)
    assert not kill_and_resume.same_tensors(one, third)
