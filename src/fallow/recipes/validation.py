"""The loss on pictures that are not trained on, with the same noise and timesteps each time, so that it compares.

What rises while the loss in training falls is the sign of learning the pictures by heart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fallow.core.errors import ConfigError
from fallow.recipes.latents import Batch, Examples, seed_of, seeded
from fallow.recipes.noise import NoiseRules
from fallow.recipes.pictures import Picture, Size


def held_out(pictures: Sequence[Picture], share: float, seed: int) -> tuple[list[Picture], list[Picture]]:
    """The pictures to train on and those to measure on, at least one of each; by chance, by file name and seed.

    ConfigError where there are too few.
    """
    count = max(1, round(share * len(pictures)))
    if count >= len(pictures):
        raise ConfigError(
            f"validation_share={share} of {len(pictures)} pictures leaves none to train on; give less, or more pictures"
        )
    order = sorted(pictures, key=lambda picture: seed_of("held out", seed, picture.path.parent.name, picture.path.name))
    chosen = {id(picture) for picture in order[:count]}
    return [p for p in pictures if id(p) not in chosen], [p for p in pictures if id(p) in chosen]


class Validation:
    """Pictures held out, each with `draws` noises and timesteps; `examples` without mirroring or chance in captions."""

    def __init__(
        self, examples: Examples, sizes: Sequence[Size], noise: NoiseRules, draws: int, batch_size: int, seed: int
    ) -> None:
        self.examples, self.noise, self.seed = examples, replace(noise, perturbation=0.0), seed
        by_size: dict[Size, list[int]] = {}
        for picture, size in enumerate(sizes):
            by_size.setdefault(size, []).extend([picture] * draws)
        self.batches = [
            members[begin : begin + batch_size]
            for members in by_size.values()
            for begin in range(0, len(members), batch_size)
        ]
        self.best: tuple[int, float] | None = None  # step and loss

    @torch.no_grad()
    def measure(self, loss: Callable[[Batch], Tensor]) -> float:
        """The mean over all pictures and draws of `loss`, the mean of a batch; one wait for the device."""
        total = torch.zeros((), device=self.examples.device)
        for number, members in enumerate(self.batches):
            batch = self.examples.batch(members, seeded("validation", self.seed, number), noise=self.noise)
            total += loss(batch).float() * len(members)
        return float(total) / sum(map(len, self.batches))

    def note(self, step: int, loss: float) -> bool:
        """Whether it is the lowest so far; a loss that is no number is not."""
        better = loss == loss and (self.best is None or loss < self.best[1])
        if better:
            self.best = (step, loss)
        return better
