"""What is said when a command fails, and with which exit code.

2   a mistake of the user's (FallowError, a wrong flag, a place that cannot be written)
1   anything unexpected: a short message; `--debug` shows the traceback
130 interrupted from the keyboard
"""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from fallow.cli import show
from fallow.core.errors import FallowError

# What the operating system refuses is for the user to put right: permissions, a full disk, a file in a folder's place.
REFUSED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EISDIR, errno.EDQUOT, errno.ENAMETOOLONG,
    errno.ELOOP, errno.EEXIST, errno.EFBIG, errno.EIO,
}  # fmt: skip


@contextmanager
def explained(debug: bool, command: str = "") -> Iterator[None]:
    """Turn what the block raises into a message on stderr and an exit code; see the top of this file."""
    try:
        yield
    except KeyboardInterrupt as error:
        if debug:
            traceback.print_exc()
        say(_interrupted(error, command), 130, title="Interrupted")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise  # the reader has gone (`fallow methods | head`): nobody is left to be told
    except Exception as error:
        if hasattr(error, "exit_code") or isinstance(error, typer.Abort):
            raise  # the parser's own: usage errors and exits
        if debug:
            traceback.print_exc()
        message, code = explain(error)
        say(message, code)
        raise typer.Exit(code) from None


def say(message: str, code: int, title: str = "Error") -> None:
    """Say what went wrong; of several processes that make one run, only one says it.

    Those that `fallow train --processes` started leave it to the process that started them. Where another launcher did,
    the first process speaks, for a mistake of the user's or an interrupt meets them all.
    """
    if "RANK" in os.environ:
        from fallow.recipes.processes import leave_report

        if leave_report(title, message, code):
            return
        if os.environ["RANK"] != "0":
            if code in (2, 130):
                return
            title = f"{title} in process {os.environ['RANK']}"
    show.error(message, title=title)


def explain(error: Exception) -> tuple[str, int]:
    """The message for an exception and the exit code that goes with it."""
    if isinstance(error, FallowError):
        return str(error), 2
    if isinstance(error, OSError) and error.errno in REFUSED:
        where = f" {error.filename}" if error.filename else ""
        return f"cannot read or write{where}: {error.strerror}; give a place that you may write to, with space left", 2
    kind = type(error).__name__
    text = str(error).strip().splitlines()
    said = f"{kind}: {text[0]}" if text else kind
    if "OutOfMemory" in kind or isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return (
            f"{said}\nThere is not enough memory for this run. Give a smaller --batch-size (with --accumulation to "
            "make up for it), --gradient-checkpointing or --precision bf16; `fallow doctor --model M --method sara` "
            "estimates what a run needs.",
            1,
        )
    return f"{said}\nThis was not expected. Run the same command again with --debug to see where it happened.", 1


def _interrupted(error: BaseException, command: str) -> str:
    """What a stopped command leaves behind, and how to go on."""
    told = str(error).strip()
    if told:
        return told
    if command == "train":
        return "stopped; what was saved so far is kept. Go on from the last checkpoint with: fallow train --resume RUN"
    return "stopped; nothing that was finished is lost"
