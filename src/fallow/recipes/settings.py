"""Configurations: made from plain values with errors that a person can act on, and written as TOML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from fallow.core.errors import ConfigError, FallowError, nearest

Config = TypeVar("Config", bound=BaseModel)


def make_config(
    model: type[Config], values: Mapping[str, Any], spelled: Callable[[list[str]], str] = ".".join
) -> Config:
    """The configuration with these values.

    `spelled(path)` says how a setting is called where the values came from: a flag, or a line of a file. Raises
    ConfigError for a setting that does not exist (with the nearest that does) and for values that a field refuses.
    """
    for key in values:
        if key not in model.model_fields:
            raise ConfigError(f"there is no setting '{key}'{nearest(key, model.model_fields)}")
    try:
        return model(**values)
    except ValidationError as error:
        raise ConfigError(explain(error, spelled)) from None


def explain(error: ValidationError, spelled: Callable[[list[str]], str] = ".".join) -> str:
    """A line for each thing that is wrong: the setting, its value, what is allowed."""
    lines: list[str] = []
    for problem in error.errors():
        cause = problem.get("ctx", {}).get("error")
        path = [str(part) for part in problem["loc"] if not str(part).startswith("function-")]
        if problem["type"] == "missing":
            lines.append(f"{spelled(path)} is not given and has no default; give it")
            continue
        if isinstance(cause, FallowError | ValueError):
            said = str(cause)
        else:
            message = problem["msg"]
            said = f"{message[0].lower()}{message[1:]}"
        if path and not isinstance(cause, FallowError):
            said = f"{spelled(path)} {_shown(problem.get('input'))}: {said}"
        if said not in lines:
            lines.append(said)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) else value or "''"
    return text if len(text) <= 60 else text[:57] + "..."


def to_toml(config: BaseModel, exclude: set[str]) -> str:
    """The settings as TOML that makes the same configuration again; what is None is left out, being the default."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True, exclude=exclude))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: set[str]) -> list[str]:
    """`lr is 0.001, was 0.0005` for every setting that differs, those in `free` apart."""
    names = [name for name in new if name not in free]
    return [f"{name} is {new[name]}, was {old.get(name)}" for name in names if new[name] != old.get(name)]
