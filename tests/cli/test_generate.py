"""Arguments of `fallow generate` that need no model."""

import pytest

from fallow.cli.pictures import split_adapter
from fallow.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.6", "a.safetensors", 0.6),
        ("runs/x/adapter:-1", "runs/x/adapter", -1.0),
        ("runs/x/adapter:1e-1", "runs/x/adapter", 0.1),
        (r"C:\styles\a.safetensors", r"C:\styles\a.safetensors", 1.0),
        (r"C:\styles\a.safetensors:0.5", r"C:\styles\a.safetensors", 0.5),
        ("odd:name", "odd:name", 1.0),
    ],
)
def test_an_adapter_and_its_scale_are_told_apart(text, path, scale):
    assert split_adapter(text) == (path, scale)


def test_a_file_whose_name_ends_like_a_scale_is_taken_whole(tmp_path):
    file = tmp_path / "v:2"
    file.touch()
    assert split_adapter(str(file)) == (str(file), 1.0)
    assert split_adapter(f"{file}:0.5") == (str(file), 0.5)


@pytest.mark.parametrize("text", [":0.6", "a.safetensors:nan", "a.safetensors:inf"])
def test_a_scale_without_a_path_and_a_scale_that_is_no_number_are_refused(text):
    with pytest.raises(ConfigError, match="--adapter"):
        split_adapter(text)
