"""Make the picture sets that ship with Fallow: five styles of eight garments, and two concepts new to mini-sd.

    python scripts/make_style_sets.py                  # -> src/fallow/assets/{styles,concepts}, the same each time
    python scripts/make_style_sets.py --sheet all.png  # and one page to look at

Each set is a folder `train/` and a folder `test/` of 32x32 PNGs with `metadata.jsonl` (`file_name`, `text`), as
Hugging Face's image folders are laid out. No garment is in two sets. The training halves are of the last 5,000 of the
60,000 training pictures, which neither mini-sd nor the garment net was trained on; the test halves of the test split.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import garments
from fallow.core.files import atomic_directory

ASSETS = Path(__file__).resolve().parents[1] / "src/fallow/assets"
TRAINED = [label for label in range(10) if label not in garments.HELD_OUT]
STYLE_PICTURES = {"train": 25, "test": 13}  # of each of the eight garments: 200 and 104 in a set
CONCEPT_PICTURES = {"train": 150, "test": 100}

STYLES_CARD = """# Style sets

Real garments drawn in five styles: what a text-to-image model is adapted to, at a size that trains in minutes on a CPU.

{table}

Each set: `train/` ({train} pictures) and `test/` ({test}), 32x32 RGB PNG, the eight garments mini-sd knows in equal
numbers, captions in `metadata.jsonl` such as `{caption}`. The style's name leads, as in the
SaRA paper; dark, grey and light are the shades of the photograph, before it was drawn (counted above). No garment is in
two sets or in both halves, and neither mini-sd nor the garment net was trained on any of them.

{sheet}Made by `scripts/make_style_sets.py`, which gives the same pictures each time. The styles are filters of pixels
written for this package; their colours and code are in `scripts/garments.py`.

The photographs are Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist; Han Xiao, Kashif Rasul, Roland
Vollgraf, arXiv 1708.07747; Zalando SE), under the MIT licence in `LICENSE`. Changed here: padded from 28x28 to 32x32
and drawn in the styles. The training halves are of its last 5,000 training pictures, the test halves of its test split.
"""

CONCEPTS_CARD = """# Concept sets

Two garments that mini-sd has never seen, as grey photographs: what a subject is taught from.

{table}

Each set: `train/` ({train} pictures) and `test/` ({test}), 32x32 RGB PNG, captions in `metadata.jsonl` such as
`{caption}`. mini-sd's tokenizer has the words (`bag`, `ankle`, `boot`), but no picture of either class was in its
training. (The garment net judges pictures of all ten classes: it has seen other bags and boots, none of these.)

{sheet}Made by `scripts/make_style_sets.py`, which gives the same pictures each time.

The photographs are Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist; Han Xiao, Kashif Rasul, Roland
Vollgraf, arXiv 1708.07747; Zalando SE), under the MIT licence in `LICENSE`. Changed here: padded from 28x28 to 32x32.
The training halves are of its last 5,000 training pictures, the test halves of its test split.
"""


@dataclass(frozen=True)
class Drawn:
    """One half of a set: pictures `(N, 32, 32, 3)` uint8 with their captions."""

    pictures: Tensor
    captions: list[str]


@dataclass(frozen=True)
class Split:
    """Garments to choose from, in a shuffled order; each is given out once."""

    images: Tensor  # (N, 1, 32, 32) uint8
    labels: Tensor  # (N,)
    order: dict[int, list[int]]

    @classmethod
    def read(cls, folder: Path, half: str, seed: int) -> Split:
        images, labels = garments.load(folder, "train" if half == "train" else "t10k")
        if half == "train":
            images, labels = images[garments.PRETRAIN_IMAGES :], labels[garments.PRETRAIN_IMAGES :]
        rng = torch.Generator().manual_seed(seed)
        order: dict[int, list[int]] = {label: [] for label in range(10)}
        for index in torch.randperm(len(labels), generator=rng).tolist():
            order[int(labels[index])].append(index)
        return cls(images, labels, order)

    def take(self, labels: Sequence[int], each: int) -> list[int]:
        """Indices of `each` garments of every label, the labels in turn, so that any first part is balanced, too."""
        return [self.order[label].pop() for _ in range(each) for label in labels]


def draw(split: Split, index: Sequence[int], style: str | None) -> Drawn:
    """The garments in a shipped style, or as grey photographs; the caption says the shade of the photograph."""
    images, labels = split.images[list(index)], split.labels[list(index)].tolist()
    x = images.float() / 255
    pictures = x.expand(-1, 3, -1, -1) if style is None else garments.in_style(x, style)
    lead = "" if style is None else f"{style} style, "
    captions = [
        lead + garments.caption(label, shade)
        for label, shade in zip(labels, garments.shade(images).tolist(), strict=True)
    ]
    return Drawn(pictures.mul(255).round().byte().permute(0, 2, 3, 1).contiguous(), captions)


def write_half(half: Drawn, folder: Path) -> None:
    folder.mkdir(parents=True)
    lines = []
    for number, (picture, caption) in enumerate(zip(half.pictures, half.captions, strict=True)):
        name = f"{number:04d}.png"
        Image.fromarray(picture.numpy()).save(folder / name, optimize=True)
        lines.append(json.dumps({"file_name": name, "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def page(rows: Sequence[Drawn], columns: int, side: int = 64) -> Image.Image:
    """The first pictures of each, a row for each, enlarged without smoothing."""
    pixels = torch.stack([row.pictures[:columns] for row in rows])  # (rows, columns, 32, 32, 3)
    sheet = pixels.permute(0, 2, 1, 3, 4).reshape(len(rows) * 32, columns * 32, 3)
    return Image.fromarray(sheet.numpy()).resize((columns * side, len(rows) * side), Image.Resampling.NEAREST)


def publish(sets: dict[str, dict[str, Drawn]], folder: Path, card: str) -> None:
    """Write the sets with card, licence and a page of samples; all take the place of `folder` when they are whole."""
    with atomic_directory(folder) as partial:
        for name, halves in sets.items():
            for half, drawn in halves.items():
                write_half(drawn, partial / name / half)
            (partial / name / "LICENSE").write_text(garments.LICENSE)
        (partial / "LICENSE").write_text(garments.LICENSE)
        (partial / "README.md").write_text(filled(card, sets))
        samples = page([halves["train"] for halves in sets.values()], columns=16)
        samples.quantize(128).save(partial / "samples.png", optimize=True)


def filled(card: str, sets: dict[str, dict[str, Drawn]]) -> str:
    first = next(iter(sets.values()))
    lines = ["| set | dark | grey | light |", "|---|---|---|---|"]
    for name, halves in sets.items():
        captions = [caption for drawn in halves.values() for caption in drawn.captions]
        shades = Counter(shade for caption in captions for shade in garments.SHADES if f" {shade} " in caption)
        lines.append(f"| `{name}` | {' | '.join(str(shades[shade]) for shade in garments.SHADES)} |")
    rows = ", ".join(f"`{name}`" for name in sets)
    return card.format(
        table="\n".join(lines), caption=first["train"].captions[4 % len(first["train"].captions)],
        train=len(first["train"].captions), test=len(first["test"].captions),
        sheet=f"![samples](samples.png)\n\nRows: {rows}.\n\n",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder of the idx files"
    )
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where styles/ and concepts/ are written")
    parser.add_argument("--sheet", type=Path, help="write one page of all sets here, a row for each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    splits = {half: Split.read(args.data, half, args.seed) for half in ("train", "test")}
    styles: dict[str, dict[str, Drawn]] = {}
    for style in garments.SHIPPED:
        styles[style.lower()] = {
            half: draw(split, split.take(TRAINED, STYLE_PICTURES[half]), style) for half, split in splits.items()
        }
    concepts: dict[str, dict[str, Drawn]] = {}
    for label in sorted(garments.HELD_OUT):
        concepts[garments.NAMES[label].replace(" ", "-")] = {
            half: draw(split, split.take([label], CONCEPT_PICTURES[half]), None) for half, split in splits.items()
        }
    publish(styles, args.assets / "styles", STYLES_CARD)
    publish(concepts, args.assets / "concepts", CONCEPTS_CARD)
    if args.sheet is not None:
        page([halves["train"] for halves in (styles | concepts).values()], columns=16, side=96).save(args.sheet)
    for name, halves in (styles | concepts).items():
        print(f"{name}: " + ", ".join(f"{len(drawn.captions)} {half}" for half, drawn in halves.items()))


if __name__ == "__main__":
    main()
