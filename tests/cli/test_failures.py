"""What is said when a command fails, with which exit code, and how the command line as a whole behaves."""

import errno
import importlib.metadata
import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from fallow.cli import app, failures
from fallow.core.errors import DataError, StorageError


def run(*args, env=None, **more):
    """The real command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fallow", *args],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", **(env or {})},
        timeout=120,
        **more,
    )


def failing(error):
    """A command that raises; run under `explained` as every command is."""
    from fallow.cli import Fallow

    small = typer.Typer(cls=Fallow)
    small.callback()(lambda: None)

    @small.command()
    def go() -> None:
        raise error

    return small


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            DataError("folder x holds no picture; give one that does"),
            2,
            "Error: folder x holds no picture; give one that does",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 2, "cannot read or write /a/b: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
        (StorageError("/a/b has no room; make space"), 2, "Error: /a/b has no room; make space"),
        (OSError(errno.EFBIG, "File too large", "/a/b"), 2, "cannot read or write /a/b: File too large"),
        (RuntimeError("shapes differ\nand more"), 1, "RuntimeError: shapes differ"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), 2, "aaa: File name too long"),
        (MemoryError(), 1, "fallow doctor --model"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "Give a smaller --batch-size"),
        (KeyError(), 1, "--debug"),
        (KeyboardInterrupt(), 130, "Interrupted: stopped"),
        (KeyboardInterrupt("go on with: fallow train --resume runs/x"), 130, "fallow train --resume runs/x"),
    ],
)
def test_an_exception_becomes_one_message_on_stderr_and_an_exit_code(error, code, said):
    result = CliRunner().invoke(failing(error), ["go"])
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("where", [["--debug", "go"], ["go", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(where):
    result = CliRunner().invoke(failing(DataError("no picture")), where)
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert "Error: no picture" in result.stderr


def test_after_two_dashes_debug_is_an_argument_like_any_other():
    result = CliRunner().invoke(app, ["generate", "--images", "0", "--", "--debug"])
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    assert "--images 0" in result.stderr


def test_a_message_keeps_square_brackets_and_is_not_wrapped_in_a_log(capsys):
    long = "folder [red]x[/red] " + "y" * 300
    failures.show.error(long)
    assert capsys.readouterr().err == f"Error: {long}\n"


def test_out_of_memory_says_what_to_turn_down():
    kind = type("OutOfMemoryError", (RuntimeError,), {})
    message, code = failures.explain(kind("CUDA out of memory. Tried to allocate 2 GiB"))
    assert code == 1
    assert "--batch-size" in message
    assert "fallow doctor" in message


def test_usage_errors_exit_with_two_and_name_the_nearest():
    command = CliRunner().invoke(app, ["generat"])
    assert command.exit_code == 2
    assert "Did you mean 'generate'" in command.stderr
    option = CliRunner().invoke(app, ["generate", "a dress", "--adaptr", "x"])
    assert option.exit_code == 2
    assert "--adapter" in option.stderr
    value = CliRunner().invoke(app, ["generate", "a dress", "--steps", "many"])
    assert value.exit_code == 2
    assert "--steps" in value.stderr


def test_the_version_is_that_of_the_package():
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"fallow {importlib.metadata.version('fallow')}\n")


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from fallow.cli import app\n"
        "print(CliRunner().invoke(app, ['--help']).output)\n"
        "print('loaded:', [m for m in ('torch', 'diffusers', 'transformers', 'peft') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    names = "train generate evaluate compare continual generalise methods probe doctor adapter"
    for name in names.split():
        assert f"│ {name} " in result.stdout, name
    assert "loaded: []" in result.stdout


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "generate",
        "evaluate",
        "compare",
        "continual",
        "generalise",
        "methods",
        "probe",
        "doctor",
        "adapter info",
        "adapter merge",
        "adapter combine",
        "adapter diff",
    ],
)
def test_every_command_has_help_with_an_example_and_json_where_it_tells_something(command):
    result = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert f"Example: fallow {command}" in result.output
    assert "--json" in result.output


def test_nothing_but_plain_text_reaches_a_pipe():
    for args in (["--help"], ["generate"], ["generat"]):
        result = run(*args)
        assert "\x1b" not in result.stdout + result.stderr


def test_a_reader_that_goes_away_is_no_error():
    """As in `fallow --help | head -1`; the pipe is closed before anything is written."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "fallow", "methods", "--json"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(write)
    assert "Traceback" not in process.stderr
    assert process.stderr.strip() in ("", "Exception ignored")


def test_a_warning_of_fallows_is_a_remark_and_that_of_a_library_says_where_it_comes_from():
    code = (
        "import sys, warnings; from fallow import cli\n"
        "cli.app = lambda **_: ["
        "warnings.warn_explicit('soft', UserWarning, f, 7) for f in (cli.__file__, '/lib/x.py')]\n"
        "sys.argv[1:] = []; cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stderr.splitlines()[:2] == ["Note: soft", "/lib/x.py:7: UserWarning: soft"]
