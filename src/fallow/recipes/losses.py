"""How far a prediction is from its target: the distance, its weight at each place of the picture, and at each timestep.

    mse        d^2                                            d (B, C, h, w) = prediction - target
    l1         |d|
    huber      2 c (sqrt(d^2 + c^2) - c)                      d^2 near 0, 2 c |d| far away
    smooth-l1  2 (sqrt(d^2 + c^2) - c)                        d^2 / c near 0, 2 |d| far away

The last two are the pseudo-Huber losses of arXiv 2403.16728, in which pictures that do not fit pull less. Their c may
follow the timestep: "snr" goes from 1 without noise to `huber_delta`, "exponential" is huber_delta^(t / T). Names and
formulas are those of kohya's sd-scripts; masks are weighted as OneTrainer does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Distance = Literal["mse", "huber", "smooth-l1", "l1"]
HuberSchedule = Literal["constant", "exponential", "snr"]
LARGEST_SNR = 1000.0  # of debiased estimation: the first timesteps would have weights near 0


@dataclass(frozen=True)
class LossRules:
    """What the loss of a picture is; the defaults: the plain mean of the squares.

    `min_snr`: gamma of min-SNR weights (fallow.recipes.noise); `debiased`: those of debiased estimation.
    """

    distance: Distance = "mse"
    huber_delta: float = 0.1
    huber_schedule: HuberSchedule = "snr"
    min_snr: float | None = None
    debiased: bool = False
    unmasked_weight: float = 0.0
    normalize_masked_loss: bool = False


def distances(predicted: Tensor, wanted: Tensor, kind: Distance = "mse", delta: Tensor | None = None) -> Tensor:
    """(B, ...) the distance at each place, in float32; `delta` (B,) is c of the two Huber losses."""
    difference = predicted.float() - wanted.float()
    if kind == "mse":
        return difference.square()
    if kind == "l1":
        return difference.abs()
    assert delta is not None
    c = delta.float().view(-1, *(1 for _ in difference.shape[1:]))
    soft = 2 * ((difference.square() + c.square()).sqrt() - c)
    return soft * c if kind == "huber" else soft


def huber_deltas(delta: float, schedule: HuberSchedule, times: Tensor, snr: Tensor) -> Tensor:
    """(B,) c for each picture; `times` (B,) are shares of all timesteps, 0 without noise; `snr` (B,)."""
    if schedule == "exponential":
        return torch.as_tensor(delta, device=times.device).float() ** times.float()
    if schedule == "snr":
        # sigma = sqrt(1 / snr), and 1 / (1 + sigma) written so that snr 0 and infinity are no special cases
        root = snr.float().sqrt()
        share = torch.where(root.isinf(), torch.ones_like(root), root / (1 + root))
        return (1 - delta) * share.square() + delta
    return torch.full_like(times, delta, dtype=torch.float32)


def picture_means(
    losses: Tensor, mask: Tensor | None = None, *, unmasked_weight: float = 0.0, normalize: bool = False
) -> Tensor:
    """(B,) the mean of each picture's losses (B, C, ..., h, w), each place weighted by its mask (B, 1, h, w) in [0, 1].

    Weights are max(mask, unmasked_weight). Normalised, they are divided by their mean: a small object then counts as
    much as one that fills the picture.
    """
    if mask is None:
        return losses.flatten(1).mean(1)
    weights = mask.to(losses).clamp(min=unmasked_weight)
    while weights.ndim < losses.ndim:  # videos: the same mask for all frames
        weights = weights.unsqueeze(2)
    means = (losses * weights).flatten(1).mean(1)
    return means / weights.flatten(1).mean(1) if normalize else means


def debiased_weights(snr: Tensor, prediction: str) -> Tensor:
    """(B,) the weights of debiased estimation (arXiv 2310.08442): 1 / sqrt(snr) for eps, 1 / (snr + 1) for v."""
    snr = snr.clamp(max=LARGEST_SNR)
    return 1 / (snr + 1) if prediction == "v_prediction" else snr.clamp(min=1e-8).rsqrt()
