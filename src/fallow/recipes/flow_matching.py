"""Flow matching, the objective of SD3 and FLUX: the network predicts the way from a picture to noise.

    x_s = (1 - s) x_0 + s eps,   predict  eps - x_0,   s in (0, 1), told to the network as t = 1000 s
    s   = k r / (1 + (k - 1) r),   r uniform, or logit-normal: r = sigmoid(n), n normal        (arXiv 2403.03206, 3.1)

The shift k moves chance towards noise, as drawing does it: it is the scheduler's `shift` (3 in SD3), or grows with the
number of tokens of the picture where the scheduler shifts dynamically (FLUX). Weights: none, or "cosmap",
w_s = 2 / (pi (1 - 2 s + 2 s^2)).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from fallow.recipes.noise import Draw, NoiseRules, perturbation, some_noise

Density = Literal["logit-normal", "uniform"]
Weighting = Literal["none", "cosmap"]


class FlowMatching:
    """The objective, with the shift of a pipeline's FlowMatchEulerDiscreteScheduler.

    `patch`: the side, in latents, of what the network takes for one token.
    """

    prediction = "flow"

    def __init__(
        self, scheduler: Any, patch: int, density: Density = "logit-normal", weighting: Weighting = "none"
    ) -> None:
        self.config, self.patch = scheduler.config, patch
        self.density, self.weighting = density, weighting
        self.steps = int(self.config.num_train_timesteps)

    def draw(self, shape: torch.Size, how: NoiseRules, generator: torch.Generator, device: torch.device) -> Draw:
        """Noise and timesteps (B,) in (0, 1000), no whole numbers, for latents (B, C, h, w).

        Where only a part of the timesteps is trained, what is drawn is squeezed into it.
        """
        noise = some_noise(shape, how, generator)
        if self.density == "uniform":
            share = torch.rand(shape[0], generator=generator)
        else:
            share = torch.randn(shape[0], generator=generator).sigmoid()
        k = self.shift(shape)
        share = k * share / (1 + (k - 1) * share)
        first, end = how.first_timestep, self.steps if how.last_timestep is None else how.last_timestep
        extra = perturbation(shape, how, generator)
        moved = None if extra is None else extra.to(device)
        return Draw(noise.to(device), (first + share * (end - first)).to(device), moved)

    def shift(self, shape: torch.Size) -> float:
        """k for latents of this shape."""
        config = self.config
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift", 1.0))
        tokens = (shape[-2] // self.patch) * (shape[-1] // self.patch)
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = low + (high - low) * (tokens - few) / (many - few)
        return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu

    def sigmas(self, latents: Tensor, drawn: Draw) -> Tensor:
        """s, shaped to go with the latents."""
        return (drawn.timesteps / self.steps).to(latents).view(-1, *(1 for _ in latents.shape[1:]))

    def noisy(self, latents: Tensor, drawn: Draw) -> Tensor:
        sigmas = self.sigmas(latents, drawn)
        return (1 - sigmas) * latents + sigmas * drawn.noise

    def target(self, latents: Tensor, drawn: Draw) -> Tensor:
        return drawn.noise - latents

    def weights(self, drawn: Draw, min_snr: float | None) -> Tensor | None:
        """Min-SNR is for diffusion: the recipe refuses it before it comes here."""
        if self.weighting == "none":
            return None
        sigmas = drawn.timesteps.float() / self.steps
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas.square()))

    def snr(self, drawn: Draw) -> Tensor:
        sigmas = self.times(drawn)
        return ((1 - sigmas) / sigmas).square()

    def times(self, drawn: Draw) -> Tensor:
        return drawn.timesteps.float() / self.steps
