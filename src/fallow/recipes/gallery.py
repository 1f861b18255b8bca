"""Pictures from a model with adapters, written to a folder: one PNG each, and sheets that set them side by side.

Every PNG carries in its text what made it: prompt, negative prompt, seed, model, adapters with scales, steps, guidance,
the command. A sweep draws the same prompts and seeds at several scales; `beside_base` draws them without adapters too.
Of a model that draws clips, a picture is the strip of its frames, and a GIF that moves lies beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from fallow.core.errors import ConfigError
from fallow.core.files import atomic_write
from fallow.recipes.clips import strip, write_gif
from fallow.recipes.families import family_named
from fallow.recipes.pipelines import apply_adapters, generate_clips, kind_of_model, load_pipeline
from fallow.recipes.run_directory import refuse_read_only

SHOWN = 128  # pixels: smaller pictures are enlarged on a sheet, without smoothing, so that a person can see them
HEADING = 16  # pixels, above a sheet's columns
GAP = 2


@dataclass(frozen=True)
class Drawing:
    """What to draw, with what, and where to put it."""

    prompts: Sequence[str]
    model: str = "mini-sd"
    adapters: Sequence[tuple[str, float]] = ()
    output: Path = Path("pictures")
    seeds: Sequence[int] = (0,)
    steps: int = 25
    guidance: float = 3.0
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None  # of each clip, where the model draws clips
    scales: Sequence[float] = ()  # a sweep: each is a factor on the adapters' own scales
    grid: bool = False
    beside_base: bool = False
    overwrite: bool = False
    force: bool = False
    device: str | None = None
    batch: int = 16
    command: str = ""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConfigError("there is nothing to draw; give a prompt, or --prompts-file with one on each line")
        for number, prompt in enumerate(self.prompts, 1):
            if not prompt.strip():
                raise ConfigError(f"prompt {number} is empty; give a text, or leave it out")
        for name, least in (("steps", 1), ("batch", 1), ("width", 8), ("height", 8), ("frames", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}={value} is too small; give {least} or more")
        if not self.seeds:
            raise ConfigError("there is no seed; give --seeds 0,1,2 or --images 4")
        if (self.scales or self.beside_base) and not self.adapters:
            what = "--scales" if self.scales else "--beside-base"
            raise ConfigError(f"{what} compares with the base model, but there is no adapter; give --adapter PATH")

    @property
    def variants(self) -> list[Variant]:
        """The base where it is asked for, then the adapters at each scale."""
        factors = list(self.scales) or [1.0]
        named = [Variant(f"x{f:g}" if self.scales else "adapted" if self.adapters else "base", f) for f in factors]
        base = [Variant("base", None)] if self.beside_base and self.adapters else []
        return [*base, *named]


@dataclass(frozen=True)
class Variant:
    """One column of a sheet: the adapters at a factor on their scales, or (None) the base model."""

    name: str
    factor: float | None


@dataclass
class Drawn:
    """What was written."""

    pictures: list[Path] = field(default_factory=list)
    sheets: list[Path] = field(default_factory=list)


def draw(drawing: Drawing, say: Callable[[str], None] = lambda text: None) -> Drawn:
    """Draw and write everything; nothing is loaded or written where the folder holds such pictures already.

    Raises ConfigError (also for files that would be overwritten), ModelError, AdapterError.
    """
    wanted = list(product(enumerate(drawing.prompts), drawing.seeds))
    variants = drawing.variants
    names = {
        (variant.name, at, seed): drawing.output
        / _file_name(at, prompt, seed, variant.name if len(variants) > 1 else "")
        for variant in variants
        for (at, prompt), seed in wanted
    }
    sheets = [drawing.output / name for name in _sheet_names(drawing)]
    moving = family_named(kind_of_model(drawing.model)).clips
    animated = [path.with_suffix(".gif") for path in names.values()] if moving else []
    refuse_overwriting([*names.values(), *animated, *sheets], drawing.overwrite)
    drawn = Drawn()
    made: dict[tuple[str, int, int], Image.Image] = {}
    drawing.output.mkdir(parents=True, exist_ok=True)
    for variant in variants:
        pipeline = load_pipeline(drawing.model, device=drawing.device)
        factor = 0.0 if variant.factor is None else variant.factor
        adapters = [(path, scale * factor) for path, scale in drawing.adapters] if variant.factor is not None else []
        if adapters:
            apply_adapters(pipeline, adapters, force=drawing.force)
        for part in _parts(wanted, drawing.batch):
            say(f"{variant.name}: {len(made) + len(part)} of {len(names)} pictures")
            clips = generate_clips(
                pipeline, [prompt for (_, prompt), _ in part], seeds=[seed for _, seed in part], steps=drawing.steps,
                guidance=drawing.guidance, negative=drawing.negative, width=drawing.width, height=drawing.height,
                frames=drawing.frames,
            )  # fmt: skip
            for ((at, prompt), seed), frames in zip(part, clips, strict=True):
                key = (variant.name, at, seed)
                made[key] = picture = strip(frames)
                if moving:
                    with atomic_write(names[key].with_suffix(".gif")) as partial:
                        write_gif(frames, partial)
                _write(picture, names[key], _story(drawing, adapters, prompt=prompt, seed=seed))
                drawn.pictures.append(names[key])
    prompts, seeds = range(len(drawing.prompts)), drawing.seeds
    for path in sheets:
        if path.stem == "grid":
            name = variants[-1].name if len(variants) == 1 or not drawing.scales else _nearest_to_one(variants).name
            pictures, columns = [made[name, at, seed] for at in prompts for seed in seeds], len(seeds)
            headings = [f"seed {seed}" for seed in seeds]
        else:
            pictures = [made[variant.name, at, seed] for at in prompts for seed in seeds for variant in variants]
            columns, headings = len(variants), [variant.name for variant in variants]
        _write(
            sheet(pictures, columns, headings), path, _story(drawing, drawing.adapters, prompts=list(drawing.prompts))
        )
        drawn.sheets.append(path)
    return drawn


def sheet(pictures: Sequence[Image.Image], columns: int, headings: Sequence[str] = ()) -> Image.Image:
    """The pictures in rows of so many columns, with a heading above each column."""
    factor = max(1, -(-SHOWN // max(pictures[0].size)))
    width, height = (side * factor for side in pictures[0].size)
    rows = -(-len(pictures) // columns)
    top = HEADING if headings else 0
    page = Image.new("RGB", (columns * (width + GAP) - GAP, top + rows * (height + GAP) - GAP), "white")
    pen = ImageDraw.Draw(page)
    for column, heading in enumerate(headings):
        pen.text((column * (width + GAP) + 2, 2), heading, fill="black")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
        page.paste(enlarged, (column * (width + GAP), top + row * (height + GAP)))
    return page


def read_prompts(file: Path) -> list[str]:
    """One prompt on each line; empty lines and lines that begin with `#` are left out. ConfigError if none is there."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"--prompts-file {file} cannot be read: {reason}; give a text file") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not prompts:
        raise ConfigError(f"--prompts-file {file} holds no prompt; write one on each line")
    return prompts


def _file_name(at: int, prompt: str, seed: int, variant: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].rstrip("-") or "prompt"
    return f"{at + 1:03d}-{words}-seed{seed}{'-' + variant if variant else ''}.png"


def _sheet_names(drawing: Drawing) -> Iterator[str]:
    if drawing.grid:
        yield "grid.png"
    if drawing.scales:
        yield "scales.png"
    elif drawing.beside_base:
        yield "beside-base.png"


def _nearest_to_one(variants: Sequence[Variant]) -> Variant:
    return min((v for v in variants if v.factor is not None), key=lambda v: abs((v.factor or 0.0) - 1))


def refuse_overwriting(paths: Sequence[Path], overwrite: bool) -> None:
    """ConfigError where a file of these is there already, or their folder cannot be one."""
    folder = paths[0].parent
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not above.is_dir():
        raise ConfigError(f"--output {folder}: {above} is a file; give a folder")
    refuse_read_only(above)
    present = [path for path in paths if path.exists()]
    if present and not overwrite:
        more = f" and {len(present) - 1} more" if len(present) > 1 else ""
        raise ConfigError(f"{present[0]}{more} would be overwritten; give another --output, or --overwrite")


def _story(drawing: Drawing, adapters: Sequence[tuple[str, float]], **more: Any) -> dict[str, str]:
    told: dict[str, Any] = {
        **more,
        "negative": drawing.negative or "",
        "model": drawing.model,
        "adapters": [{"path": str(path), "scale": scale} for path, scale in adapters],
        "steps": drawing.steps,
        "guidance": drawing.guidance,
        "command": drawing.command,
        "software": f"fallow {version('fallow')}",
    }
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in told.items()
    }


def _write(picture: Image.Image, path: Path, story: dict[str, str]) -> None:
    text = PngInfo()
    for key, value in story.items():
        text.add_text(key, value)
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=text)


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for at in range(0, len(items), size):
        yield items[at : at + size]
