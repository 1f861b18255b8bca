"""The command line: parse, call a recipe, show what came of it. Nothing is computed here.

    fallow train | generate | evaluate | compare | continual | generalise | unlearn | methods | probe | doctor
    fallow adapter info | merge | diff | combine | extract | resize | convert

Nothing heavy is imported before a command runs: `fallow --help` answers at once. The flags of `train` and `compare` are
the fields of their configurations, so their help is read only when one of the two is asked for.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated, Any

import typer

from fallow.cli import adapter, judge, learning, pictures, show, survey, training, unlearning
from fallow.cli.failures import explained
from fallow.cli.show import version_text

GENERATED = {
    "train": training.train_command,
    "compare": training.compare_command,
    "continual": learning.continual_command,
    "generalise": learning.generalise_command,
    "unlearn": unlearning.unlearn_command,
}


class Fallow(typer.core.TyperGroup):
    """The group of all commands: takes `--debug` anywhere on the line, and turns exceptions into one clear message."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take `--debug` out wherever it stands before a `--`: people add it to the end of the line that failed."""
        options = args[: args.index("--")] if "--" in args else args
        ctx.meta["fallow.debug"] = "--debug" in options or bool(os.environ.get("FALLOW_DEBUG"))
        kept = [word for at, word in enumerate(args) if word != "--debug" or at >= len(options)]
        if not kept and args:  # `fallow --debug` alone
            kept = ["--help"]
        return super().parse_args(ctx, kept)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Replace a command with generated flags by the real one, now that it is wanted."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in GENERATED and not ctx.resilient_parsing:
            with explained(ctx.meta.get("fallow.debug", False), name):
                command = GENERATED[name]()
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what goes wrong is said once, on stderr, with exit code 2 for a mistake of the user's."""
        with explained(ctx.meta["fallow.debug"], next(iter(sys.argv[1:2]), "")):
            return super().invoke(ctx)


app = typer.Typer(
    name="fallow",
    cls=Fallow,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: [bold]fallow train[/] adapts the model that ships with Fallow to a style that ships with it, in "
    "minutes.\n\n[bold]fallow COMMAND --help[/] has an example for each command.",
)


def show_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        typer.echo(version_text())
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback when something fails. May stand anywhere on the line.")
    ] = False,
) -> None:
    """Adapt pretrained models at a fraction of the usual memory, time and storage."""


training.register(app)
pictures.register(app)
judge.register(app)
learning.register(app)
unlearning.register(app)
survey.register(app)
app.add_typer(adapter.app, name="adapter")


def main() -> None:
    """Entry point of the command `fallow`."""
    # The libraries announce much that is no concern of the user's; --debug and these variables bring it back.
    if "--debug" not in sys.argv:
        for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
            os.environ.setdefault(name, "error")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        warnings.showwarning = show.warning
    app(prog_name="fallow")
