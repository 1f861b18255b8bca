"""What a user did wrong, said once and clearly.

Every message names the thing, its value, what is allowed and what to do. The command line prints it without a traceback
and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FallowError(ValueError):
    """A mistake of the user's; nothing has been written when it is raised."""


class ConfigError(FallowError):
    """An option that does not exist, or a value it cannot take."""


class DataError(FallowError):
    """Pictures or captions that cannot be read or used."""


class ModelError(FallowError):
    """A base model that cannot be found, loaded or adapted."""


class SelectionError(FallowError):
    """A request that selects no weight, every weight, or weights that do not exist."""


class AdapterError(FallowError):
    """An adapter file that is broken, or belongs to another base."""


class StorageError(FallowError):
    """A place that has no room, or that the system does not let write to."""


class TrainingError(FallowError):
    """A run that cannot go on, such as one whose loss is no number any more; its checkpoints are kept."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest of the allowed names, or the whole list when none is close."""
    allowed = list(allowed)
    close = difflib.get_close_matches(name, allowed, n=1)
    return f" (did you mean '{close[0]}'?)" if close else f" (allowed: {', '.join(allowed)})"
