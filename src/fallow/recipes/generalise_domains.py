"""Domains: the same classes, seen otherwise; from sets that need no download, and from folders.

    turned-digits    300 digits turned by 0, 20, 40, 90, 140, 180, 230 or 270 degrees; class: the digit modulo 3, for a
                     network that has learned the ten digits at all angles
    styles           the garments of the five shipped style sets, for the shipped garment-net
    FOLDER           FOLDER/<domain>/<class>/*.png, the layout of PACS, VLCS, OfficeHome and their kin in DomainBed

`DomainBatches` draws as DomainBed does: in each step one batch from every source, all of one size, put together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fallow import assets
from fallow.core.errors import ConfigError, nearest
from fallow.recipes.classifiers import endless
from fallow.recipes.labelled import GARMENTS, Group, Labelled, digits, folders, joined, split, styles, turned

BUILT_IN = ("turned-digits", "styles")
ANGLES = (0, 20, 40, 90, 140, 180, 230, 270)
FEW = 300  # digits to learn from
SHARES = (0.7, 0.2, 0.1)  # of a domain that is a source: to train on, to choose by (DomainBed's fifth), to judge by

Change = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Domain:
    """`group`: as a source. `unseen`: what is judged by where it is none."""

    group: Group
    unseen: Labelled

    @property
    def name(self) -> str:
        return self.group.name


@dataclass(frozen=True)
class DomainSet:
    """`known`: what a small network is taught before, with its number of classes, under `change`."""

    classes: list[str]
    domains: list[Domain]
    side: int
    channels: int
    known: Labelled | None = None
    known_classes: int = 0
    change: Change | None = None

    def __getitem__(self, name: str) -> Domain:
        return next(domain for domain in self.domains if domain.name == name)

    @property
    def names(self) -> list[str]:
        return [domain.name for domain in self.domains]


def domain_set(data: str, seed: int, side: int = 32, names: Sequence[str] = ()) -> DomainSet:
    """The domains of a set; see the top of this file. `names`: those that are wanted.

    ConfigError, DataError for what is not there, and for fewer than two domains.
    """
    if data == "turned-digits":
        found = _turned_digits(seed, names)
    elif data == "styles":
        chosen = _chosen(names, list(assets.STYLES))
        found = DomainSet(
            list(GARMENTS[:8]), [Domain(group, group.test) for group in styles(chosen, seed)], 32, 3
        )  # fmt: skip
    else:
        place = Path(data).expanduser()
        if not place.is_dir():
            raise ConfigError(f"data={data} is neither a folder nor a set that is built in{nearest(data, BUILT_IN)}")
        groups, classes = folders(place, side, 3, seed, names, SHARES)
        domains = [Domain(group, joined([group.train, group.held_out, group.test])) for group in groups]
        found = DomainSet(classes, domains, side, 3)
    if len(found.domains) < 2:
        raise ConfigError(f"data={data} has one domain, {found.names[0]}; two are needed, to leave one out")
    return found


def _turned_digits(seed: int, names: Sequence[str]) -> DomainSet:
    upright = split("0", digits(), seed, (0.6, 0.15, 0.25))
    few = upright.train.part(torch.arange(FEW))
    remainders = Group("0", *(Labelled(p.labels % 3, p.read) for p in (few, upright.held_out, upright.test)))
    angles = [int(name) for name in _chosen(names, [str(angle) for angle in ANGLES])]
    groups = [remainders.changed(str(angle), partial(turned, degrees=angle)) for angle in angles]
    domains = [Domain(group, group.test) for group in groups]
    return DomainSet(["0 mod 3", "1 mod 3", "2 mod 3"], domains, 8, 1, upright.train, 10, at_all_angles)


def at_all_angles(pixels: Tensor, chance: torch.Generator) -> Tensor:
    """Each picture turned by an angle of its own."""
    return turned(pixels, 360 * torch.rand(len(pixels), generator=chance))


def _chosen(names: Sequence[str], known: list[str]) -> list[str]:
    for name in names:
        if name not in known:
            raise ConfigError(f"domains names '{name}', which is none{nearest(name, known)}")
    return list(names) or known


class DomainBatches(Iterator[tuple[Tensor, Tensor]]):
    """Endless batches of `each` pictures from every source: pixels (sources * each, ...), labels (sources * each,).

    Each source is an endless stream of its own, so that a small one comes round more often. `change`: augmentation.
    """

    def __init__(self, sources: Sequence[Labelled], each: int, seed: int, change: Change | None = None) -> None:
        self.sources, self.change = list(sources), change
        self.streams = [endless(source, each, seed * 1009 + at) for at, source in enumerate(sources)]
        self.chance = torch.Generator().manual_seed(seed)

    def __next__(self) -> tuple[Tensor, Tensor]:
        drawn = [source.batch(next(stream)) for source, stream in zip(self.sources, self.streams, strict=True)]
        pixels = torch.cat([pixels for pixels, _ in drawn])
        if self.change is not None:
            pixels = self.change(pixels, self.chance)
        return pixels, torch.cat([labels for _, labels in drawn])


# -- augmentation -----------------------------------------------------------------------------------------------------


def augmented(pixels: Tensor, chance: torch.Generator) -> Tensor:
    """DomainBed's augmentation of pixels (n, 3, side, side) in [0, 1], each picture by chance of its own.

    A crop of 0.7 to 1 of the area, of a shape from 3:4 to 4:3, resized to the side; mirrored half of the time;
    brightness, contrast, saturation times 0.7 to 1.3, the hue turned by up to 0.3 of the circle; one in ten is grey.
    The hue is turned in YIQ, in one product, where torchvision goes by way of HSV.
    """

    def drawn(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(len(pixels), generator=chance)).view(-1, 1, 1, 1)

    pixels = _cropped(pixels, drawn(0.7, 1.0), drawn(-1.0, 1.0), drawn(-1.0, 1.0), drawn(-1.0, 1.0), drawn(0.0, 1.0))
    pixels = (pixels * drawn(0.7, 1.3)).clamp(0, 1)
    grey = _grey(pixels)
    pixels = torch.lerp(grey.mean((2, 3), keepdim=True), pixels, drawn(0.7, 1.3)).clamp(0, 1)
    pixels = torch.lerp(_grey(pixels), pixels, drawn(0.7, 1.3)).clamp(0, 1)
    pixels = _hue(pixels, 2 * math.pi * drawn(-0.3, 0.3).view(-1)).clamp(0, 1)
    return torch.where(drawn(0.0, 1.0) < 0.1, _grey(pixels), pixels)


def _cropped(pixels: Tensor, area: Tensor, shape: Tensor, x: Tensor, y: Tensor, flip: Tensor) -> Tensor:
    stretch = torch.exp(shape * math.log(4 / 3) / 2)
    wide, high = (area.sqrt() * stretch).clamp(max=1), (area.sqrt() / stretch).clamp(max=1)
    zero = torch.zeros_like(area)
    mirror = torch.where(flip < 0.5, -1.0, 1.0)
    rows = torch.cat([wide * mirror, zero, x * (1 - wide), zero, high, y * (1 - high)], 1).view(-1, 2, 3)
    grid = torch.nn.functional.affine_grid(rows, list(pixels.shape), align_corners=False)
    return torch.nn.functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _grey(pixels: Tensor) -> Tensor:
    weights = pixels.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (pixels * weights).sum(1, keepdim=True).expand_as(pixels)


def _hue(pixels: Tensor, angle: Tensor) -> Tensor:
    to_yiq = pixels.new_tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
    whole = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    return torch.einsum("nij,njhw->nihw", whole, pixels)
