"""Flags made from a configuration's fields, and configurations made from a TOML file overlaid with flags."""

from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from pydantic import BaseModel, ConfigDict, Field, model_validator
from typer.testing import CliRunner

from fallow.cli import flags
from fallow.core.errors import ConfigError, SelectionError


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    steps: int = Field(500, description="Updates to make.", ge=1)
    lr: float | None = Field(None, description="Learning rate [per update].")
    flip: bool = Field(False, description="Mirror half of the pictures.")
    bucket: bool = Field(True, description="Keep shapes.")
    sample_prompts: list[str] | None = Field(None, description="What to draw.")
    precision: Literal["no", "bf16"] = Field("no", description="Number format.")
    output: Path | None = Field(None, description="Where to.")
    options: dict[str, Any] = Field(default_factory=dict, description="The method's own.")
    seeds: list[int] = Field([0], description="Seeds.")
    methods: list[str] = Field(["sara"], description="Methods.")
    lrs: dict[str, list[float]] = Field(default_factory=dict, description="Rates by method.")
    inner: dict[str, dict[str, Any]] = Field(default_factory=dict, description="Arguments by method.")

    @model_validator(mode="after")
    def refuse_thirteen(self) -> "Settings":
        if self.steps == 13:
            raise SelectionError("steps=13 is bad luck; give 14")
        return self


@pytest.fixture
def seen():
    """What the generated command was called with."""
    return {}


@pytest.fixture
def call(seen):
    config = flags.option("config", Path | None, "--config", "-c", help="A file.")

    def run(given: dict[str, Any], *, config: Path | None) -> None:
        seen.update(given=given, settings=flags.make_config(Settings, given, config))

    command = flags.command_from(
        Settings,
        run,
        [config],
        name="go",
        help="Go.",
        epilog="Example: go --steps 3",
        hidden=["options"],
        commas=["methods"],
    )

    class Group(typer.core.TyperGroup):
        def resolve_command(self, ctx, args):
            return "go", command, args[1:]

    app = typer.Typer(cls=Group)
    app.callback()(lambda: None)
    return lambda *args: CliRunner().invoke(app, ["go", *args], env={"COLUMNS": "120"})


def test_only_what_stands_on_the_command_line_is_given(call, seen):
    assert call("--steps", "7", "--flip", "--no-bucket").exit_code == 0
    assert seen["given"] == {"steps": "7", "flip": True, "bucket": False}
    assert seen["settings"] == Settings(steps=7, flip=True, bucket=False)


def test_a_list_is_given_by_repeating_its_flag(call, seen):
    call("--sample-prompts", "a dress", "--sample-prompts", "a bag, [red]")
    assert seen["settings"].sample_prompts == ["a dress", "a bag, [red]"]


def test_numbers_and_named_lists_may_have_commas_between(call, seen):
    call("--seeds", "0,1", "--seeds", "5", "--methods", "sara, lora", "--sample-prompts", "one, two")
    made = seen["settings"]
    assert (made.seeds, made.methods, made.sample_prompts) == ([0, 1, 5], ["sara", "lora"], ["one, two"])


def test_dictionaries_are_given_as_pairs_with_lists_and_inner_dictionaries(call, seen):
    call("--lrs", "sara=1e-3,3e-3", "--lrs", "lora=1e-4", "--inner", "sara.fraction=0.1", "--inner", "sara.mask=wm")
    assert seen["settings"].lrs == {"sara": [1e-3, 3e-3], "lora": [1e-4]}
    assert seen["settings"].inner == {"sara": {"fraction": 0.1, "mask": "wm"}}


def test_help_shows_every_field_with_its_description_and_default_and_no_hidden_one(call):
    shown = call("--help").output
    for text in ("--steps", "<int>", "Updates to make. (default: 500)", "Learning rate [per update].", "--no-flip",
                 "no|bf16", "--output", "<path>", "Mirror half of the pictures. (default: off)",
                 "Example: go --steps 3"):  # fmt: skip
        assert text in shown, text
    assert "--options" not in shown


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('steps = 9\nlr = 1e-3\nflip = true\n[options]\nfraction = 0.1\nmask = "wm"\n')
    made = flags.make_config(Settings, {"steps": "4", "options": {"fraction": 0.2}}, file)
    assert made == Settings(steps=4, lr=1e-3, flip=True, options={"fraction": 0.2, "mask": "wm"})


def test_none_on_the_command_line_takes_back_what_the_file_sets(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("lr = 1e-3\n")
    assert flags.make_config(Settings, {"lr": "none"}, file).lr is None


def test_an_unknown_key_names_the_file_and_the_nearest_setting(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("stpes = 9\n")
    with pytest.raises(ConfigError, match=r"run\.toml: there is no setting 'stpes' \(did you mean 'steps'\?\)"):
        flags.make_config(Settings, {}, file)


def test_a_bad_value_is_blamed_on_the_flag_or_on_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('precision = "fp8"\n')
    with pytest.raises(ConfigError, match=r"run\.toml: precision fp8: input should be 'no' or 'bf16'"):
        flags.make_config(Settings, {}, file)
    with pytest.raises(ConfigError, match=r"^--steps many: input should be a valid integer"):
        flags.make_config(Settings, {"steps": "many"})
    with pytest.raises(ConfigError, match="--steps 0: input should be greater than or equal to 1"):
        flags.make_config(Settings, {"steps": "0"})


def test_two_bad_values_are_told_at_once():
    with pytest.raises(ConfigError) as told:
        flags.make_config(Settings, {"steps": "many", "lr": "fast"})
    assert "--steps many" in str(told.value)
    assert "--lr fast" in str(told.value)


def test_what_a_validator_of_the_configuration_says_is_passed_on_as_it_is():
    with pytest.raises(ConfigError, match=r"^steps=13 is bad luck; give 14$"):
        flags.make_config(Settings, {"steps": "13"})


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "there is no such file"), ("steps = = 3", "no valid TOML.*line 1"), (b"\xff\xfe", "no valid TOML")],
)
def test_a_missing_or_broken_file_is_named(tmp_path, content, said):
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=f"(?s)run.toml.*{said}"):
        flags.read_toml(file)


def test_key_value_pairs_are_read_as_numbers_truth_values_lists_or_words():
    pairs = [
        "fraction=0.05",
        "threshold=1e-3",
        "reselect-at=[10, 20]",
        "mask=snip",
        "reset_state=true",
        "budget=none",
        "a=b=c",
    ]
    assert flags.key_values(pairs) == {
        "fraction": 0.05, "threshold": 1e-3, "reselect_at": [10, 20], "mask": "snip", "reset_state": True,
        "budget": None, "a": "b=c",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="--option fraction: give it as key=value"):
        flags.key_values(["fraction"])


def test_lists_of_numbers_are_read_and_what_is_none_is_refused():
    assert flags.numbers("0,0.5,-1", "--scales") == [0, 0.5, -1]
    assert flags.whole_numbers("0,3-5", "--seeds") == [0, 3, 4, 5]
    for text in ("0,,1", "nan", "a", "inf"):
        with pytest.raises(ConfigError, match="--scales"):
            flags.numbers(text, "--scales")
    for text in ("5-3", "x", "1.5", "", "-1", "²", "1-²"):
        with pytest.raises(ConfigError, match="--seeds"):
            flags.whole_numbers(text, "--seeds")
