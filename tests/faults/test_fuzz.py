"""Damaged and hostile files are read or refused, and nothing else happens; the fuzzer sees it where something does."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from fallow.core.errors import AdapterError, DataError
from fallow.recipes.pictures import read_pictures

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="forks, and reads Linux's /proc")
MUTANTS, PARTS = 300, 6


@pytest.fixture(scope="module")
def fuzz(fuzz_files: ModuleType, kill_and_resume: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("fuzz")
    model, data = (make(place / name) for name, make in (
        ("model", kill_and_resume.tiny_pipeline), ("data", kill_and_resume.pictures)
    ))  # fmt: skip
    return fuzz_files.Fuzz(0, model, data, place)


@pytest.mark.parametrize("part", range(PARTS))
def test_mutants_of_every_format_are_read_or_refused(fuzz, part):
    done, size = fuzz.done, MUTANTS // PARTS
    fuzz.run(part * size, (part + 1) * size)
    assert fuzz.done - done == size
    assert fuzz.wrong == []
    assert fuzz.most < 200  # megabytes, whatever a header claims


def test_some_mutants_are_read_and_some_refused(fuzz):
    fuzz.run(0, 2 * len(fuzz.samples))
    ends = fuzz.result()["ends"]
    assert set(ends) == {"read", "refused"}
    assert len(fuzz.by_kind) == len(fuzz.samples)


@pytest.mark.parametrize(
    ("use", "end"),
    [
        (lambda place: (place / "new").write_text(""), "forbidden"),
        (lambda place: os.system("true"), "forbidden"),
        (lambda place: __import__("antigravity"), "forbidden"),
        (lambda place: compile("import os; os.abort()", "x", "exec"), "forbidden"),
        (lambda place: os.abort(), "crash"),
        (lambda place: time.sleep(60), "hang"),
        (lambda place: json.loads("{"), "exception"),
        (lambda place: torch.empty(10**12), "exception"),
        (lambda place: _nan(), "not finite"),
        (lambda place: _refuse(), "refused"),
        (lambda place: _refuse(""), "mute"),
        (lambda place: [], "read"),
    ],
)
def test_the_fuzzer_sees_what_must_not_be(fuzz_files, tmp_path, monkeypatch, use, end):
    monkeypatch.setattr(fuzz_files, "SECONDS", 2)
    sample = fuzz_files.Sample("a", {"a": b"1"}, ["a"], use)
    known = {name.split(".")[0] for name in __import__("sys").modules}

    def actions() -> Any:
        watch = fuzz_files.Watch(known)
        yield lambda: fuzz_files.judge(sample, tmp_path / "place", sample.files, watch)

    assert next(fuzz_files.in_a_process(actions(), 1))["end"] == end


def _nan() -> list[nn.Module]:
    module = nn.Linear(1, 1)
    nn.init.constant_(module.weight, float("nan"))
    return [module]


def _refuse(text: str = "no") -> Any:
    raise AdapterError(text)


def test_every_mutator_changes_a_file_and_depends_on_the_seed_alone(fuzz_files, fuzz):
    for sample in fuzz.samples:
        changed = 0
        for number in range(20):
            one, other = (fuzz_files.mutate(sample, random.Random(number)) for _ in range(2))
            assert one == other
            changed += one[1] != sample.files
        assert changed > 10, sample.kind


@pytest.mark.parametrize("name", ["../other/1.png", "/etc/passwd", "a/../../1.png"])
def test_a_picture_outside_its_folder_is_not_read(tmp_path, name):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    with pytest.raises(DataError, match=rf"line 1 names {name}, which is not in the folder"):
        read_pictures(folder)
