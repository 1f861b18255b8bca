"""Command-line flags made from the fields of a configuration, and configurations made from a file and flags.

One truth: the name, the type, the default and the help of a flag are those of the pydantic field. Flags win over the
file; what neither gives is the field's default.
"""

from __future__ import annotations

import inspect
import shlex
import sys
import tomllib
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from rich.markup import escape

from fallow.core.errors import ConfigError, nearest
from fallow.recipes import settings

Config = TypeVar("Config", bound=BaseModel)


def command_from(
    model: type[BaseModel],
    run: Callable[..., None],
    own: Iterable[inspect.Parameter],
    *,
    name: str,
    help: str,
    epilog: str,
    hidden: Iterable[str] = (),
    commas: Iterable[str] = (),
    panels: Mapping[str, str] | None = None,
) -> Any:
    """A command whose flags are the fields of `model`, behind those in `own`.

    `run(given, **own values)` is called with the values of those fields that stand on the command line.
    `hidden` names the fields that get no flag; `commas` the lists of words that may be given with commas between, as
    lists of numbers always may; `panels` says under which heading a field is shown.
    """
    fields = {key: field for key, field in model.model_fields.items() if key not in set(hidden)}
    own = list(own)
    taken = {parameter.name for parameter in own}
    generated = [_flag(key, field, (panels or {}).get(key)) for key, field in fields.items() if key not in taken]

    def command(**values: Any) -> None:
        given = {parameter.name: _clean(values.pop(parameter.name)) for parameter in generated}
        run(
            {key: _read(key, fields[key], value, commas) for key, value in given.items() if value is not None}, **values
        )

    parameters = [*own, *generated]
    command.__name__ = name
    command.__doc__ = help
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(name, help=help, epilog=epilog, context_settings={"help_option_names": ["-h", "--help"]})(command)
    return typer.main.get_command(app)


def option(name: str, annotation: Any, *spellings: str, help: str, panel: str | None = None, **more: Any) -> Any:
    """A flag of the command's own (no field of the configuration); None where it is not given."""
    declared = typer.Option(*spellings, help=escape(help), rich_help_panel=panel, show_default=False, **more)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, declared]
    )


def _flag(name: str, field: Any, panel: str | None) -> inspect.Parameter:
    """The flag of one field. Numbers and words are handed on as text: pydantic reads them, as it does a file's."""
    word = name.replace("_", "-")
    default = field.get_default(call_default_factory=True)
    told = " (required)" if field.is_required() else _shown(default)
    help = escape(f"{field.description or ''}{told}")
    kind, metavar = _kind(field.annotation)
    more: dict[str, Any] = {"help": help, "show_default": False}
    if panel:
        more["rich_help_panel"] = panel
    if kind is bool:
        annotation: Any = Annotated[bool | None, typer.Option(f"--{word}/--no-{word}", **more)]
    elif kind in (list, dict):
        annotation = Annotated[list[str] | None, typer.Option(f"--{word}", metavar=metavar, **more)]
    else:
        annotation = Annotated[str | None, typer.Option(f"--{word}", metavar=metavar, **more)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _shown(default: Any) -> str:
    """` (default: 500)`; nothing where the default is none or empty, for then the description says what happens."""
    if default is None or default == "" or default in ([], (), {}):
        return ""
    if isinstance(default, bool):
        default = "on" if default else "off"
    return f" (default: {default})"


def _read(key: str, field: Any, value: Any, commas: Iterable[str]) -> Any:
    """Take lists apart at their commas, and `key=value` pairs into a dictionary; a dot in a key makes an inner one."""
    kind, metavar = _kind(field.annotation)
    if kind is list and (metavar in ("<int>", "<float>") or key in commas):
        return [part.strip() for item in value for part in item.split(",") if part.strip()]
    if kind is dict:
        inner_list = any(get_origin(part) is list for part in get_args(field.annotation))
        return key_values(value, f"--{key.replace('_', '-')}", lists=inner_list)
    return value


def _kind(annotation: Any) -> tuple[type, str]:
    """bool, list, dict or str (all else), and what stands behind the flag in the help."""
    origin = get_origin(annotation)
    if origin is dict or annotation is dict:
        return dict, "KEY=VALUE"
    if origin is Annotated:
        return _kind(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        kinds = [_kind(part) for part in inner]
        if len(kinds) == 1:
            return kinds[0]
        if any(kind is list for kind, _ in kinds):
            return list, "|".join(dict.fromkeys(metavar for _, metavar in kinds))
        return str, "|".join(dict.fromkeys(metavar for _, metavar in kinds))
    if origin is Literal:
        return str, "|".join(str(choice) for choice in get_args(annotation))
    if annotation is bool:
        return bool, ""
    if origin in (list, tuple, set) or annotation in (list, tuple, set):
        inner = [part for part in get_args(annotation) if part is not Ellipsis]
        return list, _kind(inner[0])[1] if inner else "<str>"
    return str, {int: "<int>", float: "<float>", Path: "<path>", str: "<str>"}.get(annotation, "<str>")


def _clean(value: Any) -> Any:
    """What the parser says for a flag that is not given: None or an empty list."""
    return None if value is None or value == [] or value == () else value


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a TOML file. ConfigError where it is missing or broken, with the line."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(
            f"--config {path}: there is no such file; give the config.toml of a run or write one"
        ) from None
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}; give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is no valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"--config {path} is nested too deeply; write it flat") from None


def make_config(
    model: type[Config], given: Mapping[str, Any], file: Path | None = None, from_file: Mapping[str, Any] | None = None
) -> Config:
    """The configuration of a file's values overlaid with `given` (the flags).

    Raises ConfigError for a key that does not exist (with the nearest that does) and for a value that a field refuses;
    the message says whether the file or a flag is to blame.
    """
    in_file = dict(from_file if from_file is not None else read_toml(file) if file else {})
    for key in in_file:
        if key not in model.model_fields:
            raise ConfigError(f"{file}: there is no setting '{key}'{nearest(key, model.model_fields)}")
    merged: dict[str, Any] = dict(in_file)
    for key, value in given.items():
        both_tables = isinstance(value, dict) and isinstance(in_file.get(key), dict)
        merged[key] = {**in_file[key], **value} if both_tables else _none(model, key, value)

    def spelled(path: list[str]) -> str:
        if path[0] in given:
            return f"--{path[0].replace('_', '-')}"
        return f"{file}: {'.'.join(path)}" if file else path[0]

    return settings.make_config(model, merged, spelled)


def _none(model: type[BaseModel], key: str, value: Any) -> Any:
    """`--lr none` takes back what a file sets, where the field may be None and is no text."""
    field = model.model_fields.get(key)
    if field is None or not isinstance(value, str) or value.lower() != "none":
        return value
    parts = get_args(field.annotation)
    return None if type(None) in parts and str not in parts else value


def key_values(pairs: Iterable[str], flag: str = "--option", lists: bool = False) -> dict[str, Any]:
    """`["fraction=0.05", "mask=snip"]` as a dictionary; values are read as TOML, else as text.

    A dot makes an inner dictionary: `sara.fraction=0.1`. With `lists`, values are lists with commas between: `a=1,2`.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{flag} {pair}: give it as key=value, for example {flag} fraction=0.05")
        *outer, last = key.strip().replace("-", "_").split(".")
        place = found
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = [literal(part.strip()) for part in value.split(",")] if lists else literal(value.strip())
    return found


def literal(text: str) -> Any:
    """A number, a truth value or a list where the text is one (as TOML writes it), the text itself otherwise."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return float(text)  # 1e-3 is no TOML float of old parsers, .5 is none at all
    except ValueError:
        return {"none": None, "True": True, "False": False}.get(text, text)


def numbers(text: str, flag: str) -> list[float]:
    """`0,0.5,1` as numbers. ConfigError where a part is none."""
    values = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = float("nan")
        if value - value != 0:
            raise ConfigError(f"{flag} {text}: '{part}' is no number; give numbers with commas between, like 0,0.5,1")
        values.append(value)
    return values


def whole_numbers(text: str, flag: str) -> list[int]:
    """`0,1,5-7` as whole numbers; a range includes both ends."""
    values: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ConfigError(f"{flag} {text}: '{part}' is no whole number; give for example 0,1,2 or 0-9")
        values += range(int(first), int(last) + 1) if dash else [int(first)]
    return values


def command_line() -> str:
    """The command as it was typed, quoted so that it can be run again."""
    return shlex.join(["fallow", *sys.argv[1:]])
