"""`fallow adapter extract | resize | convert`: out of two checkpoints, of another size, in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fallow.cli import show
from fallow.core.errors import ConfigError

MOST = 12  # layers in a table
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Where to: NAME.safetensors for one file, else a directory.")
]
Rank = Annotated[int | None, typer.Option(help="LoRA: this rank for every layer.")]
Energy = Annotated[float | None, typer.Option(help="LoRA: the rank that keeps this share of the squared change.")]
Ratio = Annotated[float | None, typer.Option(help="LoRA: keep singular values above the largest / this.")]
MaxRank = Annotated[int | None, typer.Option(help="LoRA: no rank above this, whatever the energy or ratio.")]
Fraction = Annotated[float | None, typer.Option(help="Sparse: keep this share of the entries, the largest changes.")]
Budget = Annotated[int | None, typer.Option(help="Sparse: keep this many entries, the largest changes.")]
Dtype = Annotated[
    str | None, typer.Option(help="Number format of the factors: float32, float16 or bfloat16; none: as they are.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier adapter there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(
        epilog="Example: [bold]fallow adapter extract mini-sd merged --kind lora --energy 0.9 -o style[/]\n\n"
        "Example: [bold]fallow adapter extract mini-sd merged --kind sara --fraction 0.05 -o style.safetensors[/]"
    )(extract)
    app.command(epilog="Example: [bold]fallow adapter resize style.safetensors --rank 8 -o small.safetensors[/]")(
        resize
    )
    app.command(epilog="Example: [bold]fallow adapter convert style --to kohya -o style.safetensors[/]")(convert)


def extract(
    base: Annotated[str, typer.Argument(help="The base: mini-sd, a pipeline or part directory, a .safetensors file.")],
    tuned: Annotated[str, typer.Argument(help="The fine-tuned checkpoint, likewise.")],
    output: Output,
    kind: Annotated[str, typer.Option(help="lora: factors; sara: entries of the weights.")] = "lora",
    to: Annotated[
        str | None,
        typer.Option(help="Format: peft, diffusers, kohya, kohya-ldm for lora; fallow, lycoris-diff for sara."),
    ] = None,
    part: Annotated[
        list[str] | None, typer.Option(help="unet, transformer, text_encoder, ...; repeat it for several.")
    ] = None,
    rank: Rank = None,
    energy: Energy = None,
    ratio: Ratio = None,
    max_rank: MaxRank = None,
    fraction: Fraction = None,
    budget: Budget = None,
    threshold: Annotated[
        float | None, typer.Option(help="Sparse: only entries whose base value is below this in size.")
    ] = None,
    store: Annotated[str, typer.Option(help="Sparse: delta, or value for the trained values bit for bit.")] = "delta",
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    json: AsJson = False,
) -> None:
    """Get an adapter out of two checkpoints: what fine-tuning changed, as LoRA or as the entries that changed."""
    how = truncation(rank, energy, ratio, max_rank)
    from fallow.recipes.approximation import Most, precision
    from fallow.recipes.extract import extract as carry_out

    with show.only_json(json), show.working("comparing") as say:
        made = carry_out(
            base,
            tuned,
            output,
            kind=kind,
            to=to,
            parts=part,
            truncation=how,
            most=Most(fraction, budget),
            threshold=threshold,
            store=store,  # type: ignore[arg-type]  # checked there, by name
            dtype=precision(dtype or "float32"),
            overwrite=overwrite,
            say=say,
        )
    told(made, json)


def resize(
    adapter: Annotated[Path, typer.Argument(help="LoRA in any format, or a sparse adapter.")],
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    ratio: Ratio = None,
    max_rank: MaxRank = None,
    fraction: Fraction = None,
    budget: Budget = None,
    base: Annotated[str | None, typer.Option(help="The base, for sparse adapters that store values.")] = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    json: AsJson = False,
) -> None:
    """Give an adapter another rank, or fewer entries; the format stays."""
    how = truncation(rank, energy, ratio, max_rank)
    from fallow.recipes.approximation import Most, precision
    from fallow.recipes.resize import resize as carry_out

    with show.only_json(json), show.working("resizing"):
        made = carry_out(
            adapter,
            output,
            truncation=how,
            most=Most(fraction, budget),
            base=base,
            dtype=precision(dtype) if dtype else None,
            overwrite=overwrite,
        )
    told(made, json)


def convert(
    adapter: Annotated[Path, typer.Argument(help="An adapter of Fallow, PEFT, diffusers, kohya or LyCORIS.")],
    output: Output,
    to: Annotated[
        str, typer.Option(help="peft, diffusers, kohya, kohya-ldm (original SD/SDXL names), lycoris-diff or fallow.")
    ],
    rank: Rank = None,
    energy: Energy = None,
    ratio: Ratio = None,
    max_rank: MaxRank = None,
    fraction: Fraction = None,
    budget: Budget = None,
    base: Annotated[
        str | None, typer.Option(help="The base, for adapters that store values, or whose change depends on it (DoRA).")
    ] = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    json: AsJson = False,
) -> None:
    """Write an adapter in the format of another program; its own format is told by its tensors."""
    how = truncation(rank, energy, ratio, max_rank)
    from fallow.recipes.approximation import Most, precision
    from fallow.recipes.convert import convert as carry_out

    with show.only_json(json), show.working("converting"):
        made = carry_out(
            adapter,
            to,
            output,
            truncation=how,
            most=Most(fraction, budget),
            base=base,
            dtype=precision(dtype) if dtype else None,
            overwrite=overwrite,
        )
    told(made, json)


def truncation(rank: int | None, energy: float | None, ratio: float | None, most: int | None) -> Any:
    """What the four flags ask for; None for none of them."""
    if rank is None and energy is None and ratio is None:
        if most is not None:
            raise ConfigError(f"--max-rank {most} bounds what --energy or --ratio choose; give one of them too")
        return None
    from fallow.core.linalg import Truncation

    return Truncation(rank, energy, ratio, most)


def told(made: dict[str, Any], json: bool) -> None:
    """Say what was written and what it misses; the layers that miss most first."""
    if json:
        show.result(made)
        return
    rows = [
        ("adapter", made["written"]),
        ("format", made["format"]),
        ("trained entries", f"{made['trained']:,}"),
        ("size", show.size(made["bytes"])),
    ]
    if made["layers"]:
        rows.append(("relative error", show.number(made["error"])))
    show.facts("", rows)
    layers = sorted(made["layers"].items(), key=lambda item: -item[1]["error"] * item[1]["norm"])
    columns = [name for name in ("was", "rank", "entries") if layers and name in layers[0][1]]
    lines = [
        (name, *(f"{one[column]:,}" for column in columns), show.number(one["norm"]), show.number(one["error"]))
        for name, one in layers[:MOST]
    ]
    if lines:
        right = range(1, len(columns) + 3)
        show.table("", ["layer", *columns, "change", "relative error"], lines, right=right)
    if len(layers) > MOST:
        show.note(f"and {len(layers) - MOST} more layers; --json has all of them")
    for remark in made["remarks"]:
        show.note(remark)
