"""Pictures and captions as the network sees them, encoded once: latents and conditions, kept in main memory.

The autoencoder gives a distribution for each picture, of which mean and deviation are kept: each time a picture is
used its latents are drawn anew, as they would be without the cache. Mirrored pictures are encoded on their own, since
the autoencoder is not symmetric. Masks are kept at the size of the latents.

Captions that are drawn anew each time (`CaptionRules.random`) are encoded in each batch, all of it together, and never
kept: that costs no memory beyond a batch, and what is seen of a step never depends on what was encoded before it.

How captions become conditions, and what noise there is, the pipeline's family knows (`fallow.recipes.families`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor

from fallow.recipes.captions import CaptionRules
from fallow.recipes.clips import frames_of
from fallow.recipes.families import Conditions, Family, family_of
from fallow.recipes.masks import latent_mask
from fallow.recipes.noise import PLAIN, Draw, NoiseRules, Objective
from fallow.recipes.pictures import Batches, Picture, Size, open_picture, to_pixels

AT_ONCE = 16  # pictures or captions encoded together


@dataclass
class Batch:
    """What the loss needs, on the network's device: latents (B, C, h, w) or, of clips, (B, C, F, h, w), and conditions,
    each (B, ...). Where the text encoders are trained, `captions` (B) are not encoded yet and `encode` does it.

    `mask` (B, 1, h, w): how much each place counts, None where all do.
    """

    latents: Tensor
    conditions: Conditions
    drawn: Draw
    mask: Tensor | None = None
    captions: Sequence[str] = ()
    encode: Callable[[Sequence[str]], Conditions] | None = None

    def given(self) -> Conditions:
        """All conditions; gradients reach the text encoders where they are trained."""
        return self.conditions if self.encode is None else self.conditions | self.encode(self.captions)

    def parts(self, size: int) -> Iterator[Batch]:
        """The batch in pieces of so many pictures, the last one perhaps smaller: for accumulation."""
        for begin in range(0, len(self.latents), size):
            yield self.part(begin, begin + size)

    def part(self, begin: int, end: int) -> Batch:
        """Some of its pictures."""
        conditions = {name: value[begin:end] for name, value in self.conditions.items()}
        mask, captions = None if self.mask is None else self.mask[begin:end], self.captions[begin:end]
        drawn = self.drawn.part(begin, end)
        return Batch(self.latents[begin:end], conditions, drawn, mask, captions, self.encode)

    def __len__(self) -> int:
        return len(self.latents)


class Examples:
    """Encoded pictures and captions, from which batches are drawn.

    means[m][i], deviations[m][i] (C, h, w), of a clip (C, frames, h, w): of picture i, mirrored where m is 1. `texts`
    are the empty caption, then the others; `captions` {condition: (texts, ...)} is what becomes of them; picture i has
    number `caption_of[i]`. `told` {condition: (pictures, ...)}: what the network is told of each picture besides.
    `masks[m][i]` (1, h, w), as the means.
    """

    def __init__(
        self,
        pipeline: Any,
        pictures: Sequence[Picture],
        sizes: Sequence[Size],
        *,
        flip: bool,
        objective: Objective | None = None,
        rules: CaptionRules | None = None,
        frames: int | None = None,
        encode_later: bool = False,
    ) -> None:
        """`objective` decides the noise; None: the one of the pipeline's family. `rules`: what captions say each time;
        those without chance are the caller's to apply. `frames`: of clips, how many following ones a batch shows.
        `encode_later`: captions are encoded in the loss, since text encoders are trained.
        """
        family = family_of(pipeline)
        self.frames = frames
        self.encode: Callable[[Sequence[str]], Conditions] | None = None
        if encode_later:
            self.encode = partial(family.encode, pipeline)
        self.device = family.part(pipeline).device
        self.shift, self.scale = family.scaling(pipeline)
        self.objective = objective or family.objective(pipeline)
        encode = encode_clips if family.clips else encode_pictures
        encoded = [encode(pipeline, pictures, sizes, mirrored) for mirrored in ((False, True) if flip else (False,))]
        self.means, self.deviations = [means for means, _ in encoded], [deviations for _, deviations in encoded]
        masked = any(picture.mask for picture in pictures)
        self.masks = (
            [masks_of(pictures, sizes, means, m == 1) for m, means in enumerate(self.means)] if masked else None
        )
        self.drawn_caption: Callable[[int, random.Random], str] | None = None
        if rules is not None and rules.random:
            wordings = [picture.caption for picture in pictures]
            self.drawn_caption = lambda picture, chance: rules.drawn(wordings[picture], chance)
        self.encode_now = partial(encode_here, family, pipeline)
        captions = [] if self.drawn_caption else [picture.caption for picture in pictures]
        self.texts = list(dict.fromkeys(["", *captions]))
        self.captions = {} if encode_later else encode_captions(family, pipeline, self.texts)
        number = {caption: at for at, caption in enumerate(self.texts)}
        self.caption_of = [number.get(picture.caption, 0) for picture in pictures]
        self.told = stacked([family.picture_conditions(pipeline, *one) for one in zip(pictures, sizes, strict=True)])

    def batch(
        self,
        indices: Sequence[int],
        generator: torch.Generator,
        *,
        caption_dropout: float = 0.0,
        noise: NoiseRules = PLAIN,
    ) -> Batch:
        """Latents, conditions, noise and timesteps of these pictures; `generator` (on the CPU) decides all chance."""
        count = len(indices)
        mirrored = torch.randint(0, len(self.means), (count,), generator=generator).tolist()
        pairs = list(zip(mirrored, indices, strict=True))
        means, deviations = [self.means[m][i] for m, i in pairs], [self.deviations[m][i] for m, i in pairs]
        if self.frames is not None:
            means, deviations = windows(means, deviations, self.frames, generator)
        mean, deviation = torch.stack(means), torch.stack(deviations)
        latents = mean + deviation * torch.randn(mean.shape, generator=generator)
        latents = (latents - self.shift) * self.scale
        dropped = (torch.rand(count, generator=generator) < caption_dropout).tolist()
        texts: list[str] = []
        if self.drawn_caption is not None:
            seeds = torch.randint(0, 2**62, (count,), generator=generator).tolist()
            wordings = [self.drawn_caption(i, random.Random(seed)) for i, seed in zip(indices, seeds, strict=True)]
            texts = ["" if drop else text for drop, text in zip(dropped, wordings, strict=True)]
            conditions = {} if self.encode is not None else self.encode_now(texts)
        else:
            captions = [0 if drop else self.caption_of[i] for drop, i in zip(dropped, indices, strict=True)]
            texts = [self.texts[caption] for caption in captions]
            conditions = {name: values[captions] for name, values in self.captions.items()}
        conditions |= {name: values[list(indices)] for name, values in self.told.items()}
        return Batch(
            latents.to(self.device),
            {name: value.to(self.device) for name, value in conditions.items()},
            self.objective.draw(mean.shape, noise, generator, self.device),
            None if self.masks is None else torch.stack([self.masks[m][i] for m, i in pairs]).to(self.device),
            texts,
            self.encode,
        )


def windows(
    means: Sequence[Tensor], deviations: Sequence[Tensor], frames: int, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """So many following frames of each clip (C, all frames, h, w), from a frame that chance decides."""
    begins = [int(torch.randint(0, clip.shape[1] - frames + 1, (), generator=generator)) for clip in means]
    return (
        [clip[:, at : at + frames] for clip, at in zip(means, begins, strict=True)],
        [clip[:, at : at + frames] for clip, at in zip(deviations, begins, strict=True)],
    )


@torch.no_grad()
def encode_pictures(
    pipeline: Any, pictures: Sequence[Picture], sizes: Sequence[Size], mirrored: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and deviation (C, h, w) of each picture's latents, float32 on the CPU, before scaling."""
    means: list[Tensor] = [torch.empty(0)] * len(pictures)
    deviations = list(means)
    by_size: dict[Size, list[int]] = {}
    for at, size in enumerate(sizes):
        by_size.setdefault(size, []).append(at)
    for size, members in by_size.items():
        for begin in range(0, len(members), AT_ONCE):
            some = members[begin : begin + AT_ONCE]
            images = [open_picture(pictures[at].path) for at in some]
            pixels = torch.stack([to_pixels(ImageOps.mirror(i) if mirrored else i, size) for i in images])
            found = pipeline.vae.encode(pixels.to(pipeline.vae.device, pipeline.vae.dtype)).latent_dist
            for at, mean, deviation in zip(some, found.mean.float().cpu(), found.std.float().cpu(), strict=True):
                means[at], deviations[at] = mean.clone(), deviation.clone()
    return means, deviations


def masks_of(
    pictures: Sequence[Picture], sizes: Sequence[Size], means: Sequence[Tensor], mirrored: bool
) -> list[Tensor]:
    """(1, h, w) of each picture at the size of its latents; ones for those without a mask."""
    found = []
    for picture, size, mean in zip(pictures, sizes, means, strict=True):
        h, w = mean.shape[-2:]
        if picture.mask is None:
            found.append(torch.ones(1, h, w))
        else:
            own = (picture.width, picture.height)
            found.append(latent_mask(picture.path, picture.mask, own, size, (h, w), mirrored))
    return found


@torch.no_grad()
def encode_here(family: Family, pipeline: Any, captions: Sequence[str]) -> Conditions:
    """The conditions of captions, floats in float32, where the text encoder has them."""
    found: dict[str, list[Tensor]] = {}
    for begin in range(0, len(captions), AT_ONCE):
        for name, value in family.encode(pipeline, captions[begin : begin + AT_ONCE]).items():
            found.setdefault(name, []).append(value.float() if value.is_floating_point() else value)
    return {name: torch.cat(values) for name, values in found.items()}


@torch.no_grad()
def encode_clips(
    pipeline: Any, clips: Sequence[Picture], sizes: Sequence[Size], mirrored: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and deviation (C, frames, h, w) of each clip's latents, float32 on the CPU, before scaling."""
    means, deviations = [], []
    for clip, size in zip(clips, sizes, strict=True):
        frames = frames_of(clip.path)
        parts = []
        for begin in range(0, len(frames), AT_ONCE):
            some = frames[begin : begin + AT_ONCE]
            pixels = torch.stack([to_pixels(ImageOps.mirror(i) if mirrored else i, size) for i in some])
            found = pipeline.vae.encode(pixels.to(pipeline.vae.device, pipeline.vae.dtype)).latent_dist
            parts.append((found.mean.float().cpu(), found.std.float().cpu()))
        means.append(torch.cat([mean for mean, _ in parts]).transpose(0, 1).contiguous())
        deviations.append(torch.cat([deviation for _, deviation in parts]).transpose(0, 1).contiguous())
    return means, deviations


@torch.no_grad()
def encode_captions(family: Family, pipeline: Any, captions: Sequence[str]) -> Conditions:
    """The conditions of captions, {name: (captions, ...)}, floats in float32, on the CPU."""
    found: dict[str, list[Tensor]] = {}
    for begin in range(0, len(captions), AT_ONCE):
        for name, value in family.encode(pipeline, captions[begin : begin + AT_ONCE]).items():
            found.setdefault(name, []).append(value.float().cpu() if value.is_floating_point() else value.cpu())
    return {name: torch.cat(values) for name, values in found.items()}


def stacked(each: Sequence[Conditions]) -> Conditions:
    """Conditions of single pictures as one tensor for each name."""
    return {name: torch.stack([one[name] for one in each]) for name in each[0]}


def seeded(*parts: Any) -> torch.Generator:
    """A generator on the CPU for a purpose, by seed and step: a resumed run draws what the whole run drew."""
    return torch.Generator().manual_seed(seed_of(*parts))


def seed_of(*parts: Any) -> int:
    """A seed for a purpose: 63 bits of the hash of the parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class CalibrationBatches:
    """So many batches that can be walked again and again, always the same: for methods that look before they choose."""

    def __init__(
        self,
        make: Callable[[list[int], torch.Generator], Batch],
        sizes: Sequence[Size],
        batch_size: int,
        seed: int,
        count: int,
    ) -> None:
        self.make, self.sizes, self.batch_size, self.seed, self.count = make, list(sizes), batch_size, seed, count

    def __iter__(self) -> Iterator[Batch]:
        batches = Batches(self.sizes, self.batch_size, seed_of("calibration", self.seed))
        for number in range(self.count):
            yield self.make(next(batches), seeded("calibration", self.seed, number))
