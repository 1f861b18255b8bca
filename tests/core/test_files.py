from __future__ import annotations

import errno
import math
import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fallow.core import files
from fallow.core.errors import AdapterError, StorageError
from fallow.core.files import (
    _host,
    atomic_directory,
    atomic_write,
    fingerprint,
    mark,
    matches,
    parse_json,
    read_tensors,
    refuse_not_finite,
    sweep,
    write_json,
    write_tensors,
)


def test_a_file_is_whole_or_absent(tmp_path):
    target = tmp_path / "deep" / "a.txt"
    with atomic_write(target) as partial:
        partial.write_text("first")
        assert not target.exists()
        assert partial.parent == target.parent

    def fail() -> None:
        with atomic_write(target) as partial:
            partial.write_text("half of the sec")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "first"
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]
    plain = tmp_path / "plain.txt"
    plain.write_text("")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_directory_takes_the_place_of_the_old_one_only_when_it_is_complete(tmp_path):
    target = tmp_path / "run"
    for text in ("old", "new"):
        with atomic_directory(target) as partial:
            (partial / text).write_text(text)
            assert target.exists() == (text == "new")

    def fail() -> None:
        with atomic_directory(target) as partial:
            (partial / "broken").write_text("")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_safetensors_files_can_be_read_by_those_who_may_read_other_files(tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_text("")
    write_tensors(tmp_path / "one.safetensors", {"a": torch.ones(2)})
    with atomic_directory(tmp_path / "model") as partial:
        (partial / "unet").mkdir()
        save_file({"a": torch.ones(2)}, partial / "unet" / "two.safetensors")
    for written in (tmp_path / "one.safetensors", tmp_path / "model" / "unet" / "two.safetensors"):
        assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_json_that_strict_readers_refuse_is_not_written(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": math.nan})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 1\n}\n'


def test_missing_cut_off_and_foreign_files_are_adapter_errors(tmp_path):
    file = tmp_path / "a.safetensors"
    with pytest.raises(AdapterError, match="does not exist"):
        read_tensors(file)
    write_tensors(file, {"x": torch.arange(100.0)}, {"k": "v"})
    tensors, metadata = read_tensors(file)
    assert torch.equal(tensors["x"], torch.arange(100.0))
    assert metadata == {"k": "v"}
    whole = file.read_bytes()
    for broken in (whole[:-40], whole[:20], b"", b"\x80\x02}q\x00."):
        file.write_bytes(broken)
        with pytest.raises(AdapterError, match="cannot be read as safetensors"):
            read_tensors(file)


def test_a_base_is_recognised_in_the_precision_it_is_loaded_in():
    base = torch.randn(40, 30)
    known = fingerprint(base)
    assert matches(known, base, torch.float32)
    assert matches(known, base.half(), torch.float32)
    assert matches(known, base.bfloat16(), torch.float32)
    assert matches(known, base.t().contiguous().t(), torch.float32)  # another memory format of the same values
    assert not matches(known, base + 1e-3, torch.float32)
    assert not matches(known, (base + 1e-1).half(), torch.float32)
    low = fingerprint(base.half())
    assert matches(low, base.half(), torch.float16)
    assert matches(low, base.half().float(), torch.float16)
    assert matches(low, base, torch.float16)  # the original from which the half-precision base was made
    assert not matches(low, base, torch.float32)
    one_bit = base.clone()
    one_bit.view(torch.int32)[3, 4] ^= 1
    assert not matches(known, one_bit, torch.float32)


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for number, kind in ((dead.pid, "partial"), (os.getppid(), "partial")):
        (tmp_path / f".a.txt.{_host()}-{number}-x.{kind}").touch()
    (tmp_path / f".adapter.{_host()}-{dead.pid}-y.partial").mkdir()
    old = tmp_path / f".b.{'0' * 8}-1-z.partial"  # of another machine, a day and a second old
    old.touch()
    os.utime(old, (time.time() - 86401,) * 2)
    fresh = tmp_path / f".c.{'0' * 8}-1-z.partial"
    fresh.touch()
    sweep(tmp_path)
    assert {place.name for place in tmp_path.iterdir()} == {f".a.txt.{_host()}-{os.getppid()}-x.partial", fresh.name}
    sweep(tmp_path, alone=True)
    assert not list(tmp_path.iterdir())


def test_a_directory_whose_successor_never_took_its_name_gets_it_back(tmp_path):
    """Where two directories cannot change places in one step, a kill can come between two renames."""
    former = tmp_path / f".adapter.{_host()}-1-x.former"
    former.mkdir()
    (former / "weights").write_text("trained for weeks")
    (tmp_path / f".adapter.{_host()}-1-x.partial").mkdir()
    sweep(tmp_path, alone=True)
    assert (tmp_path / "adapter" / "weights").read_text() == "trained for weeks"
    assert [place.name for place in tmp_path.iterdir()] == ["adapter"]


def test_directories_change_places_in_two_steps_where_one_is_not_to_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_renameat2", lambda: None)
    for text in ("old", "new"):
        with atomic_directory(tmp_path / "run") as partial:
            (partial / text).write_text(text)
    assert [place.name for place in (tmp_path / "run").iterdir()] == ["new"]
    assert [place.name for place in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["mkstemp", "fsync", "replace"])
def test_what_the_system_refuses_is_a_storage_error_and_leaves_the_older_file(tmp_path, monkeypatch, number, call):
    target = tmp_path / "a.json"
    write_json(target, {"old": 1})

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    owner = {"mkstemp": files.tempfile, "fsync": files.os, "replace": Path}[call]
    monkeypatch.setattr(owner, call, refuse)
    with pytest.raises(StorageError, match=rf"a\.json cannot be written: {os.strerror(number)}; give a place"):
        write_json(target, {"new": 2})
    assert target.read_text() == '{\n  "old": 1\n}\n'
    assert [place.name for place in tmp_path.iterdir()] == ["a.json"]


def test_tensors_that_do_not_fit_on_the_disk_are_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=files.SPARE + 399))
    with pytest.raises(StorageError, match=r"has no room: 0\.0 MB are to be written and 1\.0 MB are free"):
        write_tensors(tmp_path / "deep" / "a.safetensors", {"a": torch.zeros(100)})
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=files.SPARE + 400))
    write_tensors(tmp_path / "deep" / "a.safetensors", {"a": torch.zeros(100)})


def test_what_safetensors_says_of_a_full_disk_is_a_storage_error(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", refuse)
    with pytest.raises(StorageError, match=r"cannot be written: No space left on device"):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(100)})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "1e999 is too large"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("1" * 10_000, "digits"),
        (b"\xff\xfe\xff", "decode"),
    ],
)
def test_json_is_read_strictly(text, says):
    with pytest.raises(ValueError, match=says):
        parse_json(text)


def test_a_mark_notices_every_changed_bit_and_reads_as_fast_as_memory():
    base = torch.randn(300, 77)
    known = mark(base)
    assert mark(base.clone()) == known
    assert mark(base.t().contiguous().t()) == known  # another memory format
    for where, bit in ((0, 0), (77, 22), (300 * 77 - 1, 31)):
        other = base.clone()
        other.view(-1).view(torch.int32)[where] ^= torch.tensor(1 << bit).to(torch.int32)
        assert mark(other) != known
    assert mark(base.double()) != known
    assert mark(base.view(77, 300)) != known
    rolled = base.view(-1).roll(1).view(300, 77)  # the same values, so the same sum
    assert mark(rolled) != known
    odd = torch.randn(1001, dtype=torch.float32)[1:].half()[:7]  # neither whole words nor at the begin of one
    assert mark(odd) == mark(odd.clone())
    assert mark(torch.zeros(0)) != mark(torch.zeros(1))
    assert mark(torch.tensor(True)) != mark(torch.tensor(False))


def test_values_that_are_no_numbers_are_refused_by_name(tmp_path):
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(AdapterError, match="2 of the 5 values of 'x' are NaN or infinite"):
            refuse_not_finite(tmp_path, {"fine": torch.ones(3), "x": torch.tensor([1, bad, 2, 3, bad])})
    refuse_not_finite(tmp_path, {"a": torch.ones(3).to(torch.float8_e4m3fn), "b": torch.arange(3)})
