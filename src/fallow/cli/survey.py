"""`fallow doctor` and `fallow methods`: what is here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from fallow.cli import abilities, show

MARKS = {
    "ok": Text("ok", style="green"),
    "absent": Text("-", style="dim"),
    "warning": Text("mind", style="yellow"),
    "missing": Text("fails", style="red"),
}
DOCTOR_EXAMPLE = (
    "Example: [bold]fallow doctor[/]\n\n"
    "Example: [bold]fallow doctor --model mini-sd --method sara --fraction 0.1 --batch-size 4[/]"
)
PANEL = "Memory of a run, before it starts"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="Example: [bold]fallow methods sara[/]")(methods)
    app.command(epilog=DOCTOR_EXAMPLE)(doctor)


def doctor(
    model: Annotated[
        str | None, typer.Option(help="A model; then its memory is estimated too.", rich_help_panel=PANEL)
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="A method; compared with LoRA and full training.", rich_help_panel=PANEL)
    ] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Share of the entries to train.", rich_help_panel=PANEL)
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Train the entries smaller than this.", rich_help_panel=PANEL)
    ] = None,
    budget: Annotated[int | None, typer.Option(help="Train this many entries.", rich_help_panel=PANEL)] = None,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA it is compared with.", rich_help_panel=PANEL)] = 8,
    batch_size: Annotated[int, typer.Option(help="Pictures in a batch.", rich_help_panel=PANEL)] = 4,
    resolution: Annotated[
        int | None, typer.Option(help="Side of the pictures in pixels; none: the model's own.", rich_help_panel=PANEL)
    ] = None,
    precision: Annotated[
        str, typer.Option(metavar="no|bf16|fp16", help="Number format.", rich_help_panel=PANEL)
    ] = "no",
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Compute activations twice and keep few of them.", rich_help_panel=PANEL
        ),
    ] = False,
    base_precision: Annotated[
        str,
        typer.Option(
            metavar="float32|bf16|fp8|nf4|int8", help="What frozen weights are kept in.", rich_help_panel=PANEL
        ),
    ] = "float32",
    block_swap: Annotated[int, typer.Option(min=0, help="Blocks that wait in host memory.", rich_help_panel=PANEL)] = 0,
    fused_step: Annotated[
        bool, typer.Option("--fused-step", help="Update within the backward pass.", rich_help_panel=PANEL)
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Where runs will be written.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on stdout.")] = False,
) -> None:
    """Check what is installed and what this machine can do, and estimate the memory of a run before it starts.

    Exit code 1 where something that Fallow needs is missing.
    """
    from fallow.recipes import doctor as recipe

    low = base_precision != "float32" or block_swap > 0 or fused_step
    asked = low or any(value is not None for value in (model, method, fraction, threshold, budget, resolution))
    with show.only_json(json):
        estimates = (
            recipe.memory(
                recipe.Plan(
                    model=model or "mini-sd",
                    method=method or "sara",
                    fraction=fraction,
                    threshold=threshold,
                    budget=budget,
                    rank=rank,
                    batch_size=batch_size,
                    resolution=resolution,
                    precision=precision,
                    gradient_checkpointing=gradient_checkpointing,
                    base_precision=base_precision,
                    block_swap=block_swap,
                    fused_step=fused_step,
                )
            )
            if asked
            else []
        )
        found = recipe.check(output)
    if json:
        show.result(
            {
                "ok": found.ok,
                "findings": [vars(finding) for finding in found.findings],
                "memory": [estimate.as_dict() for estimate in estimates],
            }
        )
    else:
        show_checkup(found)
        if estimates:
            show_memory(estimates, f"Memory of one training step: {model or 'mini-sd'}, batch of {batch_size}")
    if not found.ok:
        raise typer.Exit(1)


def show_checkup(found: Any) -> None:
    """The findings by group; what needs attention is marked and repeated at the end with what to do."""
    for group in dict.fromkeys(finding.group for finding in found.findings):
        rows = [
            (MARKS[finding.state], finding.name, finding.value, finding.advice)
            for finding in found.findings
            if finding.group == group
        ]
        told = any(row[3] for row in rows)
        last = "what for" if group == "optional" else "what to do"
        columns = ["", group, "found", *([last] if told else [])]
        show.table("", columns, [row[: len(columns)] for row in rows])
    missing = [finding for finding in found.findings if finding.state == "missing"]
    for finding in missing:
        show.note(f"{finding.name}: {finding.value}. {finding.advice}")
    show.console().print(
        "Everything that Fallow needs is here." if found.ok else f"{len(missing)} needed things do not work."
    )


def show_memory(estimates: list[Any], title: str) -> None:
    """The parts of each estimate, one method a column."""
    names = [name for name, _ in estimates[0].rows()]
    parts = [dict(estimate.rows()) for estimate in estimates]
    rows: list[list[Any]] = [
        [name, *(show.size(part[name]) if part[name] else "-" for part in parts)]
        for name in names
        if any(part[name] for part in parts)
    ]
    rows.append([Text("in all", style="bold"), *(Text(show.size(e.total), style="bold") for e in estimates)])
    rows.append(["", *([""] * len(estimates))])
    rows.append(["trained entries", *(f"{e.trained:,}" for e in estimates)])
    rows.append(["of the network's", *(show.share(e.trained, e.total_parameters) for e in estimates)])
    rows.append(["kept by the method", *(show.size(e.state) for e in estimates)])
    rows.append(["activations, before backward", *(show.size(e.step.activations) for e in estimates)])
    rows.append(["largest dense gradient", *(show.size(e.step.largest_gradient) for e in estimates)])
    show.table(title, ["", *(e.method for e in estimates)], rows, right=range(1, len(estimates) + 1))
    show.console().print(
        "Measured on tensors without data; the allocator's cache and, on a GPU, about 0.5 GB for CUDA come on top.",
        style="dim",
    )


def methods(
    slug: Annotated[str | None, typer.Argument(help="A method, to see its card in full.")] = None,
    can: Annotated[
        bool, typer.Option("--capabilities", help="What each method can do, as it was found by doing it.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on stdout.")] = False,
) -> None:
    """List the methods of the catalogue, or show one of them in full, with what it can do."""
    from fallow import catalogue

    found = catalogue.methods() if slug is None else [catalogue.card(slug)]
    if json:
        told = [card.as_dict() | {"capabilities": abilities.as_dict(card.slug)} for card in found]
        show.result(told[0] if slug else told)
    elif can:
        abilities.show_these([card.slug for card in found])
    elif slug:
        show_card(found[0])
    else:
        show_cards(found)


def show_cards(cards: list[Any]) -> None:
    """One line for each method, the ready ones on top."""
    rows = [
        (
            Text(card.slug, style="bold" if card.ready else "dim"),
            Text(card.status, style="green" if card.ready else "dim"),
            card.idea,
            card.purpose,
        )
        for card in cards
    ]
    show.table("", ["method", "", "idea", "what it does"], rows)
    ready = sum(card.ready for card in cards)
    show.console().print(f"{ready} of {len(cards)} are ready. `fallow methods SLUG` shows one in full.", style="dim")
    show.console().print("`fallow methods --capabilities` shows what each can do.", style="dim")


def show_card(card: Any) -> None:
    """Everything that is known of one method: facts, how to use it, its options, and the texts of its page."""
    rows = [
        ("what it does", card.purpose),
        ("status", card.status),
        ("paper" if card.arxiv or not card.ready else "title", card.title),
        ("", card.link),
        ("idea", card.idea),
        ("defaults", card.defaults),
        ("claim", card.claim),
        ("tested in", card.tested),
        *uses(card),
    ]
    show.facts(card.slug, [(name, value) for name, value in rows if value])
    from fallow.catalogue.option import options_of

    if options := options_of(card):
        told = [(option.name, option.default, option.meaning.replace("`", "")) for option in options]
        show.table("options", ["name", "default", "meaning"], told)
    for name in ("equation", "when", "cost", "found"):
        if text := getattr(card, name):
            show.text({"when": "when to use it", "found": "what we measured"}.get(name, name), text)
    abilities.show_one(card.slug)


def uses(card: Any) -> list[tuple[str, str]]:
    """(where, the line to write) of each way to use a method."""
    if not card.ready or card.idea not in ("selection", "delta", "full"):
        return [("in Python", f"fallow.{card.name}")] if card.name else []
    delta = card.home.startswith("fallow.deltas.")
    peft = f'get_peft_model(model, fallow.{card.name}Config(target_modules="all-linear"))'
    return [
        ("in Python", f'fallow.attach(model, "{card.slug}")' if delta else f"fallow.{card.name}" if card.name else ""),
        ("in PEFT", peft if delta else ""),
        ("to train", f"not by fallow train: {card.apart}" if card.apart else f"fallow train --method {card.slug}"),
    ]
