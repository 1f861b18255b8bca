from __future__ import annotations

import math
import stat

import pytest
import torch
from safetensors.torch import save_file

from fallow.core.errors import AdapterError
from fallow.core.files import (
    atomic_directory,
    atomic_write,
    fingerprint,
    matches,
    read_tensors,
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
