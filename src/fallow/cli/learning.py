"""`fallow continual` and `fallow generalise`: their flags are the fields of ContinualConfig and GeneraliseConfig."""

from __future__ import annotations

from json import loads as load
from pathlib import Path
from typing import Any

import typer

from fallow.cli import flags, show

CONTINUAL_HELP = """Learn one task after another with one network, without the data of those before.

Each task's adapter is merged at its end and kept as a file on the side, so that a task can be taken back. Several
methods are compared, each at its own learning rate, by accuracy on all tasks after each. Without arguments: digits
turned by 90, 180 and 270 degrees, for a network that knows upright ones.
"""
CONTINUAL_EXAMPLE = (
    "Example: [bold]fallow continual --methods codyra,lora:1,lora:16,full --gate-factors codyra=10[/]\n\n"
    "Example: [bold]fallow continual --data my-tasks --model clip-vit-base-patch16 --shots 16 --steps 500[/]"
)
GENERALISE_HELP = """Learn from some domains, and be judged on one that was never seen.

Each domain in turn is left out, or --sources names those to learn from. Several methods are compared, each at its own
learning rate, chosen by held-out pictures of the sources alone.
"""
GENERALISE_EXAMPLE = (
    "Example: [bold]fallow generalise --data turned-digits --sources 0,20,40[/]\n\n"
    "Example: [bold]fallow generalise --data PACS --model vit-base-patch16-224 --methods pego,lora:4 --steps 5000[/]"
)


def register(app: typer.Typer) -> None:
    """Announce the commands; the real ones, with all flags, are made when one of them is called."""
    for name, help in (("continual", CONTINUAL_HELP), ("generalise", GENERALISE_HELP)):
        app.command(name, help=help)(lambda: None)


def continual_command() -> Any:
    """The command `continual`, with a flag for every field of ContinualConfig."""
    from fallow.recipes.continual import ContinualConfig

    return flags.command_from(
        ContinualConfig, run_continual, _own(), name="continual", help=CONTINUAL_HELP, epilog=CONTINUAL_EXAMPLE,
        commas=["methods", "order", "targets"],
    )  # fmt: skip


def generalise_command() -> Any:
    """The command `generalise`, with a flag for every field of GeneraliseConfig."""
    from fallow.recipes.generalise import GeneraliseConfig

    return flags.command_from(
        GeneraliseConfig, run_generalise, _own(), name="generalise", help=GENERALISE_HELP, epilog=GENERALISE_EXAMPLE,
        commas=["methods", "sources", "domains", "targets"],
    )  # fmt: skip


def _own() -> list[Any]:
    return [
        flags.option("config", Path | None, "--config", "-c", help="A TOML file with settings; flags win over it."),
        flags.option("json", bool, "--json", help="Print the result as JSON, and nothing else on stdout."),
    ]


def run_continual(given: dict[str, Any], *, config: Path | None, json: bool | None) -> None:
    """Learn, then show the table and where the page is."""
    from fallow.recipes.continual import ContinualConfig, continual

    settings = flags.make_config(ContinualConfig, given, config)
    with show.only_json(bool(json)):
        folder = continual(settings, console=show.console(stderr=True), command=flags.command_line())
    names = ["last", "average", "transfer", "new", "forgetting", "known_before", "known"]
    _show(folder, bool(json), names, {"mean_rank": "mean rank"})


def run_generalise(given: dict[str, Any], *, config: Path | None, json: bool | None) -> None:
    """Learn, then show the table and where the page is."""
    from fallow.recipes.generalise import GeneraliseConfig, generalise

    settings = flags.make_config(GeneraliseConfig, given, config)
    with show.only_json(bool(json)):
        folder = generalise(settings, console=show.console(stderr=True), command=flags.command_line())
    _show(folder, bool(json), ["unseen", "worst", "seen"], {"overlap": "overlap"})


def _show(folder: Path, json: bool, shares: list[str], numbers: dict[str, str]) -> None:
    result = load((folder / "results.json").read_text(encoding="utf-8"))
    if json:
        show.result({"folder": folder, "report": folder / "report.html", **result})
        return
    columns = ["method", "lr", *(name.replace("_", " ") for name in shares), *numbers.values(), "trained", "seconds"]
    rows = []
    for method in result["methods"]:
        cells = [_percent(method["figures"][name]) for name in shares]
        cells += [show.number(method["figures"][name]["mean"]) for name in numbers]
        trained = method["trained_numbers"]
        rows.append([
            method["label"], show.number(method["lr"]), *cells, "-" if trained is None else f"{trained:,}",
            show.duration(method["seconds"]),
        ])  # fmt: skip
    show.table("", columns, rows, right=range(1, len(columns)))
    show.facts("", [("page", folder / "report.html")])


def _percent(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "-"
    spread = "" if value["deviation"] is None else f" ± {100 * value['deviation']:.1f}"
    return f"{100 * value['mean']:.1f}{spread}"
