"""`fallow unlearn`: its flags are the fields of UnlearnConfig."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from fallow.cli import flags, show

UNLEARN_HELP = """Make a language model forget some texts and keep the rest.

LoKU (a bounded loss, an adapter that starts where the texts are stored), or gradient ascent and gradient difference.
What the model knows of the texts is measured before and after. The adapter alone can be taken off again: for good,
--merged.
"""
UNLEARN_EXAMPLE = (
    "Example: [bold]fallow unlearn --model my-model --forget forget.txt --retain retain.jsonl --merged[/]\n\n"
    "Example: [bold]fallow unlearn --model my-model --forget forget.txt --retain retain.txt --reference unseen.txt "
    "--stop reference --against gradient-ascent,gradient-difference[/]"
)
HEADINGS = {
    "Model, texts, method": "model forget retain reference method against start output seed device",
    "Adapter": "rank alpha targets",
    "Training": "retain_weight lr epochs batch_size accumulation warmup weight_decay max_grad_norm max_length stop "
    "precision gradient_checkpointing",
    "What is measured and kept": "ngram extraction_texts extraction_every retain_texts merged",
}
FIGURES = (
    ("forget", "accuracy", "forgotten: memorised"),
    ("forget", "extraction", "forgotten: extracted"),
    ("forget", "perplexity", "forgotten: perplexity"),
    ("retain", "accuracy", "kept: memorised"),
    ("retain", "perplexity", "kept: perplexity"),
)


def register(app: typer.Typer) -> None:
    """Announce the command; the real one, with all flags, is made when it is called."""
    app.command("unlearn", help=UNLEARN_HELP)(lambda: None)


def unlearn_command() -> Any:
    """The command `unlearn`, with a flag for every field of UnlearnConfig."""
    from fallow.recipes.unlearn_config import UnlearnConfig

    path = flags.option("config", Path | None, "--config", "-c", help="A TOML file with settings; flags win over it.")
    json = flags.option("json", bool, "--json", help="Print the result as JSON, and nothing else on stdout.")
    return flags.command_from(
        UnlearnConfig, run_unlearn, [path, json], name="unlearn", help=UNLEARN_HELP, epilog=UNLEARN_EXAMPLE,
        commas=["against", "targets"],
        panels={field: heading for heading, names in HEADINGS.items() for field in names.split()},
    )  # fmt: skip


def run_unlearn(given: dict[str, Any], *, config: Path | None, json: bool | None) -> None:
    """Unlearn, then show what the model knew before and knows after."""
    from fallow.recipes.unlearn import unlearn
    from fallow.recipes.unlearn_config import UnlearnConfig

    settings = flags.make_config(UnlearnConfig, given, config)
    with show.only_json(bool(json)):
        done = unlearn(settings, console=show.console(stderr=True), command=flags.command_line())
    if json:
        places = {"folder": done.folder, "adapter": done.adapter, "merged": done.merged, "report": done.report}
        show.result({**places, **done.info})
        return
    info, reference = done.info, done.info["reference"] or {}
    columns = ["", "before", *(method["method"] for method in info["methods"]), *(["unseen"] if reference else [])]
    rows = []
    for part, name, label in FIGURES:
        if info["before"][part].get(name) is None:
            continue
        values = [info["before"][part][name], *(method["after"][part][name] for method in info["methods"])]
        values += [reference.get(name)] if reference else []
        rows.append([label, *(show.number(value) for value in values)])
    show.table("", columns, rows, right=range(1, len(columns)))
    show.facts(
        "",
        [
            *([("merged model", done.merged)] if done.merged else []),
            ("adapter", done.adapter),
            ("report", done.report),
        ],
    )
