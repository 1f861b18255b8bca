"""The denoising objective: noise, what the network is to predict, and how the timesteps are weighted.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                                   x (B, C, h, w) latents, t (B,)
    predict   eps | v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 | x_0               the scheduler's prediction_type
    loss      mean over pictures of  w_t * mean(distance(prediction, target))       distances: fallow.recipes.losses

Min-SNR (arXiv 2303.09556): w_t = min(snr_t, gamma) / snr_t for eps, / (snr_t + 1) for v, min(snr_t, gamma) for x_0.
Noise offset: eps += offset * one random number for each picture and channel, so that overall brightness is learnt.
Multires noise: eps += discount^i * noise of an ever smaller size, enlarged; then as large as before. sd-scripts' name.
Input perturbation (arXiv 2301.11706): x_t is made with eps + gamma * other noise, eps is still what is to be predicted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fallow.core.errors import ConfigError
from fallow.recipes.losses import LossRules, debiased_weights, distances, huber_deltas, picture_means

Prediction = Literal["epsilon", "v_prediction", "sample"]


@dataclass
class Draw:
    """What chance decides for a batch; all on the latents' device."""

    noise: Tensor  # (B, C, ..., h, w)
    timesteps: Tensor  # (B,) whole numbers
    perturbation: Tensor | None = None  # what the network's input has besides the noise, of its shape

    def part(self, begin: int, end: int) -> Draw:
        """That of some of the batch's pictures."""
        perturbation = None if self.perturbation is None else self.perturbation[begin:end]
        return Draw(self.noise[begin:end], self.timesteps[begin:end], perturbation)


@dataclass(frozen=True)
class NoiseRules:
    """How noise and timesteps are drawn; the defaults: normal noise, every timestep as often.

    `timesteps`: from which to before which; None is all of them.
    """

    offset: float = 0.0
    multires_iterations: int = 0
    multires_discount: float = 0.3
    perturbation: float = 0.0
    first_timestep: int = 0
    last_timestep: int | None = None  # the first that is not drawn any more


PLAIN = NoiseRules()


def draw(shape: torch.Size, steps: int, how: NoiseRules, generator: torch.Generator, device: torch.device) -> Draw:
    """Noise and timesteps for latents of a shape (B, C, ..., h, w), of a scheduler with so many training steps."""
    noise = some_noise(shape, how, generator)
    end = steps if how.last_timestep is None else min(how.last_timestep, steps)
    timesteps = torch.randint(how.first_timestep, end, (shape[0],), generator=generator)
    extra = perturbation(shape, how, generator)
    return Draw(noise.to(device), timesteps.to(device), None if extra is None else extra.to(device))


def some_noise(shape: torch.Size, how: NoiseRules, generator: torch.Generator) -> Tensor:
    """Normal noise (B, C, ..., h, w) with what the rules put on it; on the CPU."""
    noise = torch.randn(shape, generator=generator)
    if how.offset:
        noise = noise + how.offset * torch.randn((*shape[:2], *(1 for _ in shape[2:])), generator=generator)
    if how.multires_iterations:
        noise = multires(noise, how.multires_iterations, how.multires_discount, generator)
    return noise


def perturbation(shape: torch.Size, how: NoiseRules, generator: torch.Generator) -> Tensor | None:
    """What the rules put on the network's input besides the noise, if anything."""
    return how.perturbation * torch.randn(shape, generator=generator) if how.perturbation else None


def multires(noise: Tensor, iterations: int, discount: float, generator: torch.Generator) -> Tensor:
    """Noise (B, C, ..., h, w) with coarser noise on it, brought back to deviation 1 within each picture.

    Level i has sides r^i times smaller, r drawn from 2 to 4 for each level, and weight discount^i; the last is of one
    row or column.
    """
    frames = noise.flatten(0, -4) if noise.ndim > 3 else noise  # (B * ..., C or frames, h, w)
    height, width = noise.shape[-2:]
    total = frames.clone()
    for level in range(iterations):
        ratio = float(torch.rand((), generator=generator)) * 2 + 2
        h, w = max(1, int(height / ratio**level)), max(1, int(width / ratio**level))
        coarse = torch.randn((*frames.shape[:2], h, w), generator=generator)
        total += interpolate(coarse, size=(height, width), mode="bilinear") * discount**level
        if h == 1 or w == 1:
            break
    total = total.view(noise.shape)
    return total / total.flatten(1).std(1).view(-1, *(1 for _ in noise.shape[1:]))


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

    @property
    def prediction(self) -> str:
        """epsilon, v_prediction, sample or flow."""
        ...

    def draw(self, shape: torch.Size, how: NoiseRules, generator: torch.Generator, device: torch.device) -> Draw:
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

    def snr(self, drawn: Draw) -> Tensor:
        """(B,) signal to noise, as powers; 0 is noise alone."""
        ...

    def times(self, drawn: Draw) -> Tensor:
        """(B,) the timesteps as shares of all; 0 is without noise."""
        ...


class Diffusion:
    """The objective at the head of this file, with the noise schedule of a pipeline's scheduler."""

    def __init__(self, scheduler: Any, prediction: Prediction | None = None) -> None:
        changed = {} if prediction is None else {"prediction_type": prediction}
        from diffusers import DDPMScheduler  # here, since it takes seconds that no --help should wait

        self.scheduler = DDPMScheduler.from_config(scheduler.config, **changed)
        self.prediction: Prediction = self.scheduler.config.prediction_type
        self.steps = int(self.scheduler.config.num_train_timesteps)

    def draw(self, shape: torch.Size, how: NoiseRules, generator: torch.Generator, device: torch.device) -> Draw:
        return draw(shape, self.steps, how, generator, device)

    def noisy(self, latents: Tensor, drawn: Draw) -> Tensor:
        noisy: Tensor = self.scheduler.add_noise(latents, drawn.noise, drawn.timesteps)
        return noisy

    def target(self, latents: Tensor, drawn: Draw) -> Tensor:
        return target(self.scheduler, self.prediction, latents, drawn)

    def weights(self, drawn: Draw, min_snr: float | None) -> Tensor | None:
        if min_snr is None:
            return None
        return min_snr_weights(self.scheduler.alphas_cumprod, drawn.timesteps, min_snr, self.prediction)

    def snr(self, drawn: Draw) -> Tensor:
        kept = self.scheduler.alphas_cumprod.to(drawn.timesteps.device)[drawn.timesteps].float()
        return kept / (1 - kept)

    def times(self, drawn: Draw) -> Tensor:
        return drawn.timesteps / self.steps


def zero_terminal(scheduler: Any) -> Any:
    """The scheduler with a noise schedule that ends in noise alone, and that draws from there (arXiv 2305.08891).

    One that cannot is replaced by DDIM. ConfigError where the network predicts the noise, which then says nothing of
    the picture at the end, or is none of diffusion.
    """
    config = scheduler.config
    if "prediction_type" not in config or "beta_start" not in config:
        raise ConfigError(f"zero_terminal_snr is for noise schedules of betas, which {type(scheduler).__name__} lacks")
    if config.prediction_type == "epsilon":
        raise ConfigError(
            "zero_terminal_snr leaves nothing to learn at the last timestep for a network that predicts the noise "
            "(epsilon); train a model of v_prediction, or say so with prediction=v_prediction"
        )
    able = "rescale_betas_zero_snr" in inspect.signature(type(scheduler).__init__).parameters
    from diffusers import DDIMScheduler

    cls = type(scheduler) if able else DDIMScheduler
    return cls.from_config(config, rescale_betas_zero_snr=True, timestep_spacing="trailing")


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    objective: Objective,
    latents: Tensor,
    drawn: Draw,
    *,
    rules: LossRules | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The loss of a batch, a scalar in float32: where the prediction of a network of any family meets its target.

    `predict(noisy, timesteps)`: the network under its conditions; latents (B, C, ..., h, w). `mask` (B, 1, h, w): how
    much each place counts.
    """
    losses = picture_losses(predict, objective, latents, drawn, rules=rules or LossRules(), mask=mask)
    return losses.mean()


def picture_losses(
    predict: Callable[[Tensor, Tensor], Tensor],
    objective: Objective,
    latents: Tensor,
    drawn: Draw,
    *,
    rules: LossRules,
    mask: Tensor | None = None,
) -> Tensor:
    """(B,) the weighted losses of which `denoising_loss` is the mean."""
    extra = drawn.perturbation
    seen = drawn if extra is None else replace(drawn, noise=drawn.noise + extra)
    predicted = predict(objective.noisy(latents, seen), drawn.timesteps)
    delta = None
    if rules.distance in ("huber", "smooth-l1"):
        delta = huber_deltas(rules.huber_delta, rules.huber_schedule, objective.times(drawn), objective.snr(drawn))
    places = distances(predicted, objective.target(latents, drawn), rules.distance, delta)
    losses = picture_means(places, mask, unmasked_weight=rules.unmasked_weight, normalize=rules.normalize_masked_loss)
    weights = objective.weights(drawn, rules.min_snr)
    if weights is not None:
        losses = losses * weights
    if rules.debiased:
        losses = losses * debiased_weights(objective.snr(drawn), objective.prediction)
    return losses
