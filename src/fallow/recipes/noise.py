"""The denoising objective: noise, what the network is to predict, and how the timesteps are weighted.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                                   x (B, C, h, w) latents, t (B,)
    predict   eps | v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 | x_0               the scheduler's prediction_type
    loss      mean over pictures of  w_t * mean((prediction - target)^2)

Min-SNR (arXiv 2303.09556): w_t = min(snr_t, gamma) / snr_t for eps, / (snr_t + 1) for v, min(snr_t, gamma) for x_0.
Noise offset: eps += offset * one random number for each picture and channel, so that overall brightness is learnt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from diffusers import DDPMScheduler
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample"]


@dataclass
class Draw:
    """What chance decides for a batch; all on the latents' device."""

    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,) whole numbers

    def part(self, begin: int, end: int) -> Draw:
        """That of some of the batch's pictures."""
        return Draw(self.noise[begin:end], self.timesteps[begin:end])


def draw(shape: torch.Size, steps: int, offset: float, generator: torch.Generator, device: torch.device) -> Draw:
    """Noise and timesteps for latents of a shape (B, C, ..., h, w), of a scheduler with so many training steps."""
    noise = offset_noise(shape, offset, generator)
    timesteps = torch.randint(0, steps, (shape[0],), generator=generator)
    return Draw(noise.to(device), timesteps.to(device))


def offset_noise(shape: torch.Size, offset: float, generator: torch.Generator) -> Tensor:
    """Normal noise (B, C, ..., h, w), each channel moved by `offset` times a normal number of its own."""
    noise = torch.randn(shape, generator=generator)
    if offset:
        noise = noise + offset * torch.randn((*shape[:2], *(1 for _ in shape[2:])), generator=generator)
    return noise


def target(scheduler: Any, prediction: Prediction, latents: Tensor, drawn: Draw) -> Tensor:
    """(B, C, h, w) what the network is to predict."""
    if prediction == "epsilon":
        return drawn.noise
    if prediction == "v_prediction":
        return scheduler.get_velocity(latents, drawn.noise, drawn.timesteps)
    return latents


def min_snr_weights(alphas_cumprod: Tensor, timesteps: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """(B,) the weights of the losses; `alphas_cumprod` (T,) are the scheduler's."""
    kept = alphas_cumprod.to(timesteps.device)[timesteps].float()
    # A schedule that ends in pure noise has snr 0 there, where eps says nothing of the picture: weight 1, not 0 / 0.
    snr = (kept / (1 - kept)).clamp(min=1e-8)
    capped = snr.clamp(max=gamma)
    return capped / {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction]


class Objective(Protocol):
    """What a network is trained to predict: noising, target and weights; diffusion here, else flow matching."""

    prediction: str

    def draw(self, shape: torch.Size, offset: float, generator: torch.Generator, device: torch.device) -> Draw:
        """Noise and timesteps for latents (B, C, ..., h, w); `generator` is on the CPU."""
        ...

    def noisy(self, latents: Tensor, drawn: Draw) -> Tensor:
        """What the network sees."""
        ...

    def target(self, latents: Tensor, drawn: Draw) -> Tensor:
        """What it is to predict, of the latents' shape."""
        ...

    def weights(self, drawn: Draw, min_snr: float | None) -> Tensor | None:
        """(B,) the weights of the losses by timestep; None: all are 1."""
        ...


class Diffusion:
    """The objective at the head of this file, with the noise schedule of a pipeline's scheduler."""

    def __init__(self, scheduler: Any, prediction: Prediction | None = None) -> None:
        changed = {} if prediction is None else {"prediction_type": prediction}
        self.scheduler = DDPMScheduler.from_config(scheduler.config, **changed)
        self.prediction: Prediction = self.scheduler.config.prediction_type
        self.steps = int(self.scheduler.config.num_train_timesteps)

    def draw(self, shape: torch.Size, offset: float, generator: torch.Generator, device: torch.device) -> Draw:
        return draw(shape, self.steps, offset, generator, device)

    def noisy(self, latents: Tensor, drawn: Draw) -> Tensor:
        noisy: Tensor = self.scheduler.add_noise(latents, drawn.noise, drawn.timesteps)
        return noisy

    def target(self, latents: Tensor, drawn: Draw) -> Tensor:
        return target(self.scheduler, self.prediction, latents, drawn)

    def weights(self, drawn: Draw, min_snr: float | None) -> Tensor | None:
        if min_snr is None:
            return None
        return min_snr_weights(self.scheduler.alphas_cumprod, drawn.timesteps, min_snr, self.prediction)


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    objective: Objective,
    latents: Tensor,
    drawn: Draw,
    *,
    min_snr: float | None = None,
) -> Tensor:
    """The loss of a batch, a scalar in float32: where the prediction of a network of any family meets its target.

    `predict(noisy, timesteps)`: the network under its conditions; latents (B, C, ..., h, w).
    """
    predicted = predict(objective.noisy(latents, drawn), drawn.timesteps)
    losses = (predicted.float() - objective.target(latents, drawn).float()).square().flatten(1).mean(1)
    weights = objective.weights(drawn, min_snr)
    return (losses if weights is None else losses * weights).mean()
