"""`fallow adapter info | merge | combine | diff`: what can be done with finished adapters.

`extract | resize | convert` are in `adapter_forms`.
"""

from __future__ import annotations

import json as json_text
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from fallow.cli import adapter_forms, show
from fallow.cli.pictures import split_adapter

app = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
Adapters = Annotated[
    list[str], typer.Argument(metavar="PATH[:SCALE]...", help="Adapters, each with its scale (1 if not given).")
]
MOST = 12  # layers in a table
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on stdout.")]


@app.callback()
def adapter() -> None:
    """Look into adapters, merge, combine and compare them; get one out of two checkpoints, resize or convert it."""


adapter_forms.register(app)


@app.command(epilog="Example: [bold]fallow adapter info runs/sara-blueprint-1/adapter[/]")
def info(
    path: Annotated[Path, typer.Argument(help="An adapter: a directory or a safetensors file.")],
    json: AsJson = False,
) -> None:
    """Say what an adapter holds: method, base, trained entries by block, size, norm."""
    from fallow.recipes.adapters import describe

    found = describe(path)
    if json:
        show.result(found)
        return
    show.facts(str(path), [(name.replace("_", " "), told(name, value)) for name, value in found["facts"].items()])
    blocks = found["blocks"]
    if blocks:
        rows = [
            (
                name,
                f"{b['trained']:,}",
                show.share(b["trained"], b["numel"]),
                show.number(b["norm"]),
                show.number(b["largest"]),
            )
            for name, b in blocks.items()
        ]
        show.table("", ["block", "trained", "of it", "norm", "largest change"], rows, right=[1, 2, 3, 4])
    if found.get("layers"):
        told_of = [(one["layer"], one["shape"], one["rank"], show.number(one["alpha"])) for one in found["layers"]]
        show.table("", ["layer", "of", "rank", "alpha"], told_of[:MOST], right=[2, 3])
        if len(found["layers"]) > MOST:
            show.note(f"and {len(found['layers']) - MOST} more layers; --json has all of them")
    if found["notes"]:
        show.facts("for other tools", [(name, shortened(text)) for name, text in found["notes"].items()])
    for remark in found["remarks"]:
        show.note(remark)


def shortened(text: str, most: int = 100) -> str:
    """A text that may be long, such as how often each tag occurs; --json has all of it."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def told(name: str, value: Any) -> str:
    """A fact for people."""
    if name == "bytes":
        return show.size(value)
    if name == "share":
        return show.share(value, 1)
    if isinstance(value, (list, dict)):
        return json_text.dumps(value, ensure_ascii=False)
    return show.number(value)


@app.command(
    epilog="Example: [bold]fallow adapter merge runs/sara-blueprint-1/adapter:0.8 --model mini-sd --output merged[/]"
)
def merge(
    adapters: Adapters,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new directory for the whole pipeline.")],
    model: Annotated[str, typer.Option(help="The base: mini-sd, a pipeline directory or a hub id.")] = "mini-sd",
    dtype: Annotated[
        str, typer.Option(help="Number format of the written weights: float32, float16 or bfloat16.")
    ] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Take adapters that were trained on another base.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier merge there.")] = False,
    json: AsJson = False,
) -> None:
    """Merge adapters into their base and write a full pipeline, which diffusers loads without Fallow."""
    pairs = [split_adapter(text) for text in adapters]
    from fallow.recipes.adapters import merge_into

    with show.only_json(json), show.working("merging"):
        written = merge_into(model, pairs, output, force=force, overwrite=overwrite, dtype=dtype)
    if json:
        show.result(written)
    else:
        show.facts("", [("pipeline", written["written"]), ("size", show.size(written["bytes"]))])


@app.command(
    epilog="Example: [bold]fallow adapter combine barbie.safetensors:0.6 horns.safetensors:0.6 -o both.safetensors[/]"
)
def combine(
    adapters: Adapters,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to: NAME.safetensors for one file, else an adapter directory.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    json: AsJson = False,
) -> None:
    """Combine adapters of one base into one: the sum of their changes, each times its scale."""
    pairs = [split_adapter(text) for text in adapters]
    from fallow.recipes.adapters import combine as carry_out

    written = carry_out(pairs, output, overwrite=overwrite)
    if json:
        show.result(written)
    else:
        show.facts(
            "",
            [
                ("adapter", written["written"]),
                ("trained entries", f"{written['trained']:,}"),
                ("size", show.size(written["bytes"])),
            ],
        )


@app.command(epilog="Example: [bold]fallow adapter diff barbie.safetensors cyberpunk.safetensors[/]")
def diff(
    first: Annotated[
        Path, typer.Argument(help="An adapter, or a checkpoint (safetensors file, model or pipeline directory).")
    ],
    second: Annotated[Path, typer.Argument(help="Another of the same kind.")],
    json: AsJson = False,
) -> None:
    """Say how two adapters differ (where they overlap, how alike they are), or which entries of two checkpoints do."""
    from fallow.recipes.adapters import differ

    with show.working("reading"):
        found = differ(first, second)
    if json:
        show.result(found)
    elif found["kind"] == "adapters":
        show_adapters(found)
    else:
        show_checkpoints(found)


def show_adapters(found: dict[str, Any], most: int = 12) -> None:
    """Overlap and likeness, in all and by tensor; first the tensors that share most of what they train."""

    def shares(part: dict[str, Any]) -> tuple[str, str]:
        return show.share(part["shared"], part["first_trained"]), show.share(part["shared"], part["second_trained"])

    of_first, of_second = shares(found)
    show.facts(
        "",
        [
            ("first", f"{found['first']}, {found['first_trained']:,} trained entries"),
            ("second", f"{found['second']}, {found['second_trained']:,} trained entries"),
            ("trained by both", f"{found['shared']:,}: {of_first} of the first, {of_second} of the second"),
            ("cosine of the changes", show.number(found["cosine"])),
        ],
    )
    if found["cosine"] is None:
        show.note("one of them stores values, so that the changes cannot be compared without the base")
    tensors = sorted(found["tensors"].items(), key=lambda item: (-item[1]["shared"], item[0]))
    rows = [(name, f"{part['shared']:,}", *shares(part), show.number(part["cosine"])) for name, part in tensors[:most]]
    if rows:
        show.table("", ["tensor", "in both", "of first", "of second", "cosine"], rows, right=[1, 2, 3, 4])
    if len(tensors) > most:
        show.note(f"and {len(tensors) - most} more tensors; --json has all of them")


def show_checkpoints(found: dict[str, Any]) -> None:
    """How many entries differ, in all and in the tensors that differ most."""
    rows = [
        (
            "entries that differ",
            f"{found['changed']:,} of {found['total']:,} ({show.share(found['changed'], found['total'])})",
        ),
        ("relative change", show.number(found["relative"])),
        ("tensors that differ", f"{len(found['tensors']):,}"),
    ]
    for side in ("first", "second"):
        only = found[f"only_in_{side}"]
        if only:
            rows.append((f"only in the {side}", f"{len(only)} tensors, such as {only[0]}"))
    if not found["total"]:
        rows = [("in common", "no tensor: they are of other methods, formats or networks"), *rows[3:]]
    show.facts(f"{found['first']} and {found['second']}", rows)
    if not found["total"]:
        show.note("to see how they differ in effect, merge each (fallow adapter merge) and compare the two pipelines")
    show_tensors(found["tensors"])


def show_tensors(tensors: dict[str, dict[str, Any]], most: int = 12) -> None:
    """The tensors that differ most, relatively; those that were all zero in the first, which is infinitely, last."""
    ordered = sorted(
        tensors.items(), key=lambda item: -item[1]["relative"] if math.isfinite(item[1]["relative"]) else 1
    )
    rows = [
        (
            name,
            f"{t['changed']:,}",
            show.share(t["changed"], t["numel"]),
            show.number(t["relative"]),
            show.number(t["largest"]),
        )
        for name, t in ordered[:most]
    ]
    if rows:
        show.table("", ["tensor", "differ", "of it", "relative", "largest"], rows, right=[1, 2, 3, 4])
    if len(ordered) > most:
        show.note(f"and {len(ordered) - most} more tensors; --json has all of them")
