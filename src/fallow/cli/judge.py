"""`fallow evaluate` and `fallow probe`: figures about a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fallow.cli import flags, show
from fallow.cli.pictures import split_adapter

EVALUATE_EXAMPLE = (
    "Example: [bold]fallow evaluate --data blueprint --adapter runs/sara-blueprint-1/adapter[/]\n\n"
    "Example: [bold]fallow evaluate --data my-pictures --vision dinov2-small --clip clip-vit-large-patch14 --json[/]"
)

PROBE_EXAMPLE = (
    "Example: [bold]fallow probe --model mini-sd[/]\n\n"
    "Example: [bold]fallow probe --model mini-sd --thresholds 1e-4,1e-3,1e-2 --images 200[/]"
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog=EVALUATE_EXAMPLE)(evaluate)
    app.command(epilog=PROBE_EXAMPLE)(probe)


def evaluate(
    model: Annotated[str, typer.Option(help="mini-sd, a pipeline directory or a hub id.")] = "mini-sd",
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH[:SCALE]", help="An adapter and its scale; none: judge the base model."),
    ] = None,
    data: Annotated[
        str, typer.Option(help="Shipped style set, or a folder of pictures, best with an unseen test/.")
    ] = "blueprint",
    prompt: Annotated[
        str | None, typer.Option(help="Caption of the real pictures that have none of their own.")
    ] = None,
    images: Annotated[int, typer.Option(help="Pictures to generate.")] = 200,
    prior_images: Annotated[
        int, typer.Option(help="Pictures on the base model's own prompts; 0 leaves them out.")
    ] = 96,
    prior_data: Annotated[
        str | None, typer.Option(help="Real pictures of the base model's domain, as reference.")
    ] = None,
    prior_prompts: Annotated[
        Path | None, typer.Option(help="A text file with prompts of the base model's domain, one on each line.")
    ] = None,
    seed: Annotated[int, typer.Option(help="First sampling seed.")] = 0,
    repeats: Annotated[int, typer.Option(help="How many sampling seeds, for the spread.")] = 1,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="How strongly the prompt pulls.")] = 3.0,
    vision: Annotated[str | None, typer.Option(help="Weights of a vision model for the Frechet distance.")] = None,
    clip: Annotated[str | None, typer.Option(help="A CLIP folder for the text alignment.")] = None,
    batch: Annotated[int, typer.Option(help="Pictures drawn at once.")] = 50,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; none: the best there is.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Take adapters that were trained on another base.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for evaluation.json and the pictures.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the figures as JSON, and nothing else on stdout.")
    ] = False,
) -> None:
    """Judge a model with adapters: does it draw like the data, follow its prompts, and what has it forgotten?"""
    adapters = [split_adapter(text) for text in adapter or []]
    from fallow.recipes import evaluate as recipe
    from fallow.recipes.gallery import read_prompts

    with show.only_json(json), show.working("loading") as say:
        figures = recipe.evaluate(
            model,
            adapters,
            data,
            images=images,
            prior_images=prior_images,
            prior_data=prior_data,
            prior_prompts=read_prompts(prior_prompts) if prior_prompts else None,
            prompt=prompt,
            seed=seed,
            repeats=repeats,
            steps=steps,
            guidance=guidance,
            vision=vision,
            clip=clip,
            batch=batch,
            device=device,
            force=force,
            output=output,
            say=say,
        )
    if json:
        show.result(figures)
    else:
        show_figures(figures)


def show_figures(figures: dict[str, Any]) -> None:
    """The figures with their spread, beside what real pictures or the base model reach."""
    named = (
        ("Frechet distance", "frechet", figures.get("frechet_floor"), "lower is better"),
        ("kernel distance", "kernel", figures.get("kernel_floor"), "lower is better"),
        ("text alignment", "alignment", figures.get("alignment_real"), "higher is better"),
        ("recognised", "recognised", figures.get("recognised_real"), "higher is better"),
        (
            "prior: Frechet distance",
            "prior_frechet",
            0.0 if figures.get("prior_data") is None else None,
            "lower is better",
        ),
        ("prior: text alignment", "prior_alignment", figures.get("prior_alignment_base"), "higher is better"),
        ("prior: recognised", "prior_recognised", figures.get("prior_recognised_base"), "higher is better"),
    )
    rows = []
    for label, name, reference, direction in named:
        if name in figures:
            spread = figures.get(f"{name}_spread")
            told = show.number(figures[name]) + (f" ± {show.number(spread)}" if spread is not None else "")
            rows.append((label, told, show.number(reference), direction))
    adapters = ", ".join(f"{one['path']} x{one['scale']:g}" for one in figures["adapters"]) or "no adapter"
    title = f"{figures['model']}, {adapters}, on {figures['data']}"
    show.table(title, ["", "measured", "reference", ""], rows, right=[1, 2])
    show.facts(
        "",
        [
            ("judge", figures["judge"]),
            ("pictures", f"{figures['images']} generated, {figures['reference_images']} real"),
            ("trained parameters", f"{figures['trained_parameters']:,}"),
            ("adapter", show.size(figures["adapter_bytes"])),
            ("time", show.duration(figures["seconds"])),
        ],
    )
    show.console().print("Reference: real pictures against real pictures; for the prior, the base model.", style="dim")
    for remark in figures.get("notes", []):
        show.note(f"note: {remark}")


def probe(
    model: Annotated[str, typer.Option(help="mini-sd, a pipeline directory or a hub id.")] = "mini-sd",
    thresholds: Annotated[
        str | None, typer.Option(metavar="LIST", help="Magnitudes below which entries are set to zero.")
    ] = None,
    shares: Annotated[
        str | None, typer.Option(metavar="LIST", help="Shares of the entries to set to zero, like 0.01,0.1,0.5.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Real pictures to compare with; none: the model's own.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="A text file with a prompt on each line.")] = None,
    images: Annotated[int, typer.Option(help="Pictures to draw at each threshold.")] = 96,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="How strongly the prompt pulls.")] = 3.0,
    seed: Annotated[int, typer.Option(help="First sampling seed.")] = 0,
    include: Annotated[
        str | None, typer.Option(help="Only weights whose name matches this regular expression.")
    ] = None,
    exclude: Annotated[str | None, typer.Option(help="No weights whose name matches this regular expression.")] = None,
    vision: Annotated[str | None, typer.Option(help="Weights of a vision model for the Frechet distance.")] = None,
    clip: Annotated[str | None, typer.Option(help="A CLIP folder for the text alignment.")] = None,
    batch: Annotated[int, typer.Option(help="Pictures drawn at once.")] = 48,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; none: the best there is.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the figures, the plot and the pictures.")
    ] = Path("probe"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier probe in that folder.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the figures as JSON, and nothing else on stdout.")
    ] = False,
) -> None:
    """Set a model's smallest weights to zero and see whether it matters: how many are free to be trained?"""
    amounts = {
        "thresholds": flags.numbers(thresholds, "--thresholds") if thresholds is not None else [],
        "shares": flags.numbers(shares, "--shares") if shares is not None else [],
    }
    from fallow.recipes.gallery import read_prompts
    from fallow.recipes.probe import Probe
    from fallow.recipes.probe import probe as carry_out

    plan = Probe(
        model=model,
        data=data,
        prompts=read_prompts(prompts_file) if prompts_file else [],
        images=images,
        steps=steps,
        guidance=guidance,
        seed=seed,
        include=include,
        exclude=exclude,
        vision=vision,
        clip=clip,
        device=device,
        batch=batch,
        output=output,
        overwrite=overwrite,
        **amounts,
    )
    with show.only_json(json), show.working("loading") as say:
        found = carry_out(plan, say)
    if json:
        show.result(found)
        return
    names = [name for name in found["rows"][0] if name not in ("threshold", "zeroed", "total", "share")]
    rows = [
        (
            f"{row['threshold']:.3g}",
            f"{row['zeroed']:,}",
            f"{100 * row['share']:.3g}%",
            *(show.number(row[name]) for name in names),
        )
        for row in found["rows"]
    ]
    columns = ["below", "set to zero", "share", *(name.replace("_", " ") for name in names)]
    show.table(f"{model} without its smallest weights", columns, rows, right=range(len(columns)))
    show.facts("", [("reference", found["reference"]), ("judge", found["judge"])])
    show.facts("", [("written", path) for path in found["written"].values()])
