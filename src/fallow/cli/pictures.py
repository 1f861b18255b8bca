"""`fallow generate`: pictures from a model with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fallow.cli import flags, show
from fallow.core.errors import ConfigError

GENERATE_EXAMPLE = (
    'Example: [bold]fallow generate "a photo of a dress" --adapter style.safetensors:0.8 --images 4 --grid[/]\n\n'
    'Example: [bold]fallow generate "a photo of a coat" --adapter barbie.safetensors --scales 0,0.5,1,1.5[/]'
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=GENERATE_EXAMPLE)(generate)


def split_adapter(text: str) -> tuple[str, float]:
    """`PATH` or `PATH:scale`; the scale is 1 where none is given. A colon within a path (`C:\\x`) stays with it."""
    path, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        scale = float(tail)
    except ValueError:
        return text, 1.0
    if scale - scale != 0:
        raise ConfigError(f"--adapter {text}: the scale {tail} is no finite number; give for example {path}:0.8")
    if not path:
        raise ConfigError(
            f"--adapter {text}: there is no path before the scale; give for example adapter.safetensors{text}"
        )
    return path, scale


def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="What to draw; several may be given.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="A text file with a prompt on each line.")] = None,
    model: Annotated[str, typer.Option(help="mini-sd, a pipeline directory or a hub id.")] = "mini-sd",
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="PATH[:SCALE]", help="An adapter and its scale; repeat it for several.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path("pictures"),
    seeds: Annotated[str | None, typer.Option(metavar="LIST", help="Seeds, like 0,1,2 or 0-9.")] = None,
    images: Annotated[int | None, typer.Option(help="Pictures for each prompt: seeds 0, 1, 2, ...")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="How strongly the prompt pulls; 1 is not at all.")] = 3.0,
    negative: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; none: the model's own.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; none: the model's own.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a clip, of models that draw clips.")] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also one sheet of all: a row for each prompt.")] = False,
    beside_base: Annotated[
        bool, typer.Option("--beside-base", help="Also draw without the adapters, and a sheet of both.")
    ] = False,
    scales: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Draw at each of these factors on the adapters' scales, and a sheet."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures drawn at once.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; none: the best there is.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Take adapters that were trained on another base.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures of the same names.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print what was written as JSON, and nothing else on stdout.")
    ] = False,
) -> None:
    """Draw pictures from prompts, with any number of adapters."""
    if seeds is not None and images is not None:
        raise ConfigError("--seeds and --images are both given; give one: --images 4 is --seeds 0-3")
    if images is not None and images < 1:
        raise ConfigError(f"--images {images} is no picture; give 1 or more")
    adapters = [split_adapter(text) for text in adapter or []]
    factors = flags.numbers(scales, "--scales") if scales is not None else []
    chosen = flags.whole_numbers(seeds, "--seeds") if seeds is not None else list(range(images or 1))
    from fallow.recipes.gallery import Drawing, draw, read_prompts

    drawing = Drawing(
        prompts=[*(prompt or []), *(read_prompts(prompts_file) if prompts_file else [])],
        model=model,
        adapters=adapters,
        output=output,
        seeds=chosen,
        steps=steps,
        guidance=guidance,
        negative=negative,
        width=width,
        height=height,
        frames=frames,
        scales=factors,
        grid=grid,
        beside_base=beside_base,
        overwrite=overwrite,
        force=force,
        device=device,
        batch=batch,
        command=flags.command_line(),
    )
    with show.only_json(json), show.working("drawing") as say:
        drawn = draw(drawing, say)
    if json:
        show.result({"pictures": drawn.pictures, "sheets": drawn.sheets})
        return
    count = len(drawn.pictures)
    rows = [("pictures", f"{count} in {output}" if count > 1 else drawn.pictures[0])]
    show.facts("", [*rows, *(("sheet", path) for path in drawn.sheets)])
