"""Draw the picture at the top of the README from finished runs: base model, adapted model, real pictures, a row each.

    fallow train --data sunset ... && python scripts/readme_picture.py runs/sara-sunset-1 runs/sara-blueprint-1

Nothing is chosen by hand: each row takes the next pictures of its style's test half, draws their captions with the base
model and with the adapter from the same noise, and shows them beside the pictures themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.font_manager import FontProperties, findfont
from PIL import Image, ImageDraw, ImageFont

from fallow import assets
from fallow.core.errors import DataError, FallowError
from fallow.core.files import atomic_write
from fallow.recipes.evaluate import opened
from fallow.recipes.pictures import Picture, read_pictures
from fallow.recipes.pipelines import apply_adapters, generate, load_pipeline
from fallow.recipes.run_directory import read_info, settings_of

COLUMNS = 4  # pictures in each of the three blocks
SIDE, GAP = 96, 8  # pixels of a picture, and between two
BLOCK = COLUMNS * SIDE + (COLUMNS - 1) * GAP
BETWEEN, MARGIN = 48, 40  # pixels between two blocks, and around all
TITLE, LABEL, CAPTION, SPACE = (
    40,
    34,
    20,
    30,
)  # heights in pixels: of headings, of a row's line, of captions, below a row
GROUND, INK, SOFT, LINE = "#fbfaf8", "#22201c", "#77726a", "#e4e0d8"
METHODS = {"sara": "SaRA", "shira": "SHiRA", "lora": "LoRA", "full": "full fine-tuning"}


@dataclass(frozen=True)
class Row:
    """What is shown of one run; the three blocks have a picture for each of `prompts`."""

    style: str
    method: str
    cost: str
    prompts: Sequence[str]
    base: Sequence[Image.Image]
    adapted: Sequence[Image.Image]
    real: Sequence[Image.Image]


def make_row(run: Path, first: int, seed: int) -> Row:
    """Draw for one run, on the test pictures from `first` on. FallowError where run, model or data cannot be used."""
    if not run.is_dir():
        raise DataError(f"{run} is no folder; give the directory of a finished run")
    settings, info = settings_of(run), read_info(run)
    if info.get("status") != "finished":
        raise DataError(f"{run} is not finished (status {info.get('status')}); go on with: fallow train --resume {run}")
    model, data = settings.get("model", "mini-sd"), settings.get("data", "blueprint")
    folder = assets.find(data)
    real = read_pictures(folder / "test" if (folder / "test").is_dir() else folder, settings.get("prompt"))
    chosen: list[Picture] = [real[(first + i) % len(real)] for i in range(COLUMNS)]
    prompts = [picture.caption for picture in chosen]
    how: dict[str, Any] = {
        "seeds": [seed + first + i for i in range(COLUMNS)],
        "steps": settings.get("sample_steps", 25),
        "guidance": settings.get("guidance", 3.0),
    }
    pipeline = load_pipeline(model)
    base = generate(pipeline, prompts, **how)
    apply_adapters(pipeline, [(run / "adapter", 1.0)])
    adapted = generate(pipeline, prompts, **how)
    method = METHODS.get(info["method"], info["method"])
    return Row(folder.name.capitalize(), method, cost(info), prompts, base, adapted, opened(chosen))


def cost(info: dict[str, Any]) -> str:
    """`500 steps, 2.4 minutes on 2 CPU threads, 5% of the weights`."""
    threads = info["hardware"]["threads"]
    where = info["hardware"].get("gpu") or f"{threads} CPU thread{'s' if threads > 1 else ''}"
    share = 100 * info["trained_parameters"] / info["total_parameters"]
    return f"{info['steps']} steps, {info['seconds'] / 60:.1f} minutes on {where}, {share:.3g}% of the weights"


def page(rows: Sequence[Row]) -> Image.Image:
    """Headings, then for each row its line, its three blocks, and what was asked for below the pictures."""
    height = LABEL + SIDE + CAPTION + SPACE
    width = 2 * MARGIN + 3 * BLOCK + 2 * BETWEEN
    sheet = Image.new("RGB", (width, 2 * MARGIN + TITLE + len(rows) * height - SPACE), GROUND)
    pen = ImageDraw.Draw(sheet)
    lefts = [MARGIN + number * (BLOCK + BETWEEN) for number in range(3)]
    methods = " and ".join(dict.fromkeys(row.method for row in rows))
    headings = ("Base model", f"{methods}, same prompts and noise", "Real pictures of the style")
    for left, text in zip(lefts, headings, strict=True):
        pen.text((left, MARGIN - 8), text, fill=INK, font=font(22, bold=True))
    for number, row in enumerate(rows):
        top = MARGIN + TITLE + number * height
        pen.line((MARGIN, top, width - MARGIN, top), fill=LINE)
        pen.text((MARGIN, top + 8), row.style, fill=INK, font=font(16, bold=True))
        pen.text((lefts[1], top + 9), row.cost, fill=SOFT, font=font(14))
        for left, pictures in zip(lefts, (row.base, row.adapted, row.real), strict=True):
            for place, (picture, prompt) in enumerate(zip(pictures, row.prompts, strict=True)):
                x, y = left + place * (SIDE + GAP), top + LABEL
                sheet.paste(enlarged(picture), (x, y))
                pen.text((x, y + SIDE + 4), short(prompt), fill=SOFT, font=font(12))
    return sheet


def enlarged(picture: Image.Image) -> Image.Image:
    """`SIDE` pixels wide and high; small pictures keep their pixels square and sharp."""
    way = Image.Resampling.NEAREST if max(picture.size) <= SIDE else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize((SIDE, SIDE), way)


def short(prompt: str) -> str:
    """The subject of a caption: `dark coat` of `Sunset style, a photo of a dark coat`."""
    subject = prompt.rpartition(" of ")[2]
    for article in ("a ", "an "):
        subject = subject.removeprefix(article)
    return subject if len(subject) <= 16 else subject[:15].rstrip() + "…"


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along."""
    properties = FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return ImageFont.truetype(findfont(properties), size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="directories of finished runs, one for each row")
    parser.add_argument("--output", type=Path, default=Path("docs/assets/readme.png"))
    parser.add_argument("--seed", type=int, default=0, help="of the noise that pictures are drawn from")
    args = parser.parse_args()
    try:
        rows = [make_row(run, number * COLUMNS, args.seed) for number, run in enumerate(args.runs)]
    except FallowError as error:
        parser.error(str(error))
    with atomic_write(args.output) as partial:
        page(rows).save(partial, format="PNG", optimize=True)
    print(args.output)


if __name__ == "__main__":
    main()
