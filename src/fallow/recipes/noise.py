"""The denoising objective: noise, what the network is to predict, and how the timesteps are weighted.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                                   x (B, C, h, w) latents, t (B,)
    predict   eps | v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 | x_0               the scheduler's prediction_type
    loss      mean over pictures of  w_t * mean((prediction - target)^2)

Min-SNR (arXiv 2303.09556): w_t = min(snr_t, gamma) / snr_t for eps, / (snr_t + 1) for v, min(snr_t, gamma) for x_0.
Noise offset: eps += offset * one random number for each picture and channel, so that overall brightness is learnt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
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
    """Noise and timesteps for latents of a shape (B, C, h, w), of a scheduler with so many training steps."""
    noise = torch.randn(shape, generator=generator)
    if offset:
        noise = noise + offset * torch.randn((*shape[:2], 1, 1), generator=generator)
    timesteps = torch.randint(0, steps, (shape[0],), generator=generator)
    return Draw(noise.to(device), timesteps.to(device))


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


def denoising_loss(
    network: Any,
    scheduler: Any,
    latents: Tensor,
    text: Tensor,
    drawn: Draw,
    *,
    prediction: Prediction,
    min_snr: float | None = None,
) -> Tensor:
    """The loss of a batch, a scalar in float32; latents (B, C, h, w), text (B, tokens, width)."""
    noisy = scheduler.add_noise(latents, drawn.noise, drawn.timesteps)
    predicted = network(noisy, drawn.timesteps, text).sample
    wanted = target(scheduler, prediction, latents, drawn)
    losses = (predicted.float() - wanted.float()).square().flatten(1).mean(1)
    if min_snr is not None:
        losses = losses * min_snr_weights(scheduler.alphas_cumprod, drawn.timesteps, min_snr, prediction)
    return losses.mean()
