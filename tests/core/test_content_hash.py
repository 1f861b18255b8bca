"""The hash of a file's tensors in its own header."""

from __future__ import annotations

import hashlib

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fallow.core.content_hash import HASH, fill_hash, with_room
from fallow.core.files import read_tensors, write_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}


def test_the_hash_is_that_of_all_bytes_behind_the_header(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(TENSORS, file, with_room({HASH: "", "title": "modelspec.hash_sha256"}))
    written = fill_hash(file)
    data = file.read_bytes()
    behind = data[8 + int.from_bytes(data[:8], "little") :]
    assert written == "0x" + hashlib.sha256(behind).hexdigest()
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {HASH: written, "title": "modelspec.hash_sha256"}
        assert torch.equal(opened.get_tensor("a"), TENSORS["a"])


def test_other_metadata_give_the_same_hash_and_other_tensors_another(tmp_path):
    hashes = []
    for number, (title, tensors) in enumerate([("x", TENSORS), ("y", TENSORS), ("x", {"a": torch.zeros(2)})]):
        write_tensors(tmp_path / f"{number}.safetensors", tensors, {HASH: "", "title": title})
        hashes.append(read_tensors(tmp_path / f"{number}.safetensors")[1][HASH])
    assert hashes[0] == hashes[1] != hashes[2]
    write_tensors(tmp_path / "plain.safetensors", TENSORS, {"title": "x"})
    assert read_tensors(tmp_path / "plain.safetensors")[1] == {"title": "x"}
