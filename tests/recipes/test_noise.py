"""The denoising objective against its equations."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from fallow.recipes.losses import LossRules
from fallow.recipes.noise import PLAIN, Diffusion, Draw, NoiseRules, denoising_loss, draw, min_snr_weights, target


class Answers:
    """A network that predicts a constant."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, noisy, timesteps):
        return torch.full_like(noisy, self.value)


@pytest.fixture
def scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def reference_weight(abar: float, gamma: float, prediction: str) -> float:
    """arXiv 2303.09556, section 3.4: SNR_t = abar / (1 - abar)."""
    snr = abar / (1 - abar)
    return {"epsilon": min(snr, gamma) / snr, "v_prediction": min(snr, gamma) / (snr + 1), "sample": min(snr, gamma)}[
        prediction
    ]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_are_the_formula(scheduler, prediction):
    t = torch.tensor([0, 20, 200, 600, 999])
    weights = min_snr_weights(scheduler.alphas_cumprod, t, 5.0, prediction)
    wanted = [reference_weight(float(scheduler.alphas_cumprod[i]), 5.0, prediction) for i in t]
    assert weights.tolist() == pytest.approx(wanted, rel=1e-4)


def test_min_snr_of_pure_noise_is_finite():
    weights = min_snr_weights(torch.tensor([0.9, 0.0]), torch.tensor([0, 1]), 5.0, "epsilon")
    assert weights.tolist() == pytest.approx([5 / 9, 1.0])


def test_the_target_is_noise_velocity_or_the_picture(scheduler):
    latents, noise, t = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.tensor([10, 900])
    drawn = Draw(noise, t)
    assert torch.equal(target(scheduler, "epsilon", latents, drawn), noise)
    assert torch.equal(target(scheduler, "sample", latents, drawn), latents)
    abar = scheduler.alphas_cumprod[t].view(2, 1, 1, 1)
    velocity = abar.sqrt() * noise - (1 - abar).sqrt() * latents
    torch.testing.assert_close(target(scheduler, "v_prediction", latents, drawn), velocity)


def test_the_loss_is_the_weighted_mean_of_the_pictures_own(scheduler):
    latents, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([5, 300, 900])
    got = denoising_loss(
        Answers(0.5), Diffusion(scheduler, "epsilon"), latents, Draw(noise, t), rules=LossRules(min_snr=5.0)
    )
    each = [float((0.5 - noise[i]).square().mean()) for i in range(3)]
    weights = [reference_weight(float(scheduler.alphas_cumprod[i]), 5.0, "epsilon") for i in t]
    assert float(got) == pytest.approx(sum(w * e for w, e in zip(weights, each, strict=True)) / 3, rel=1e-4)


def test_the_offset_is_shared_by_a_channel_and_has_its_size():
    shape = torch.Size((64, 4, 8, 8))
    plain = draw(shape, 1000, PLAIN, torch.Generator().manual_seed(3), torch.device("cpu"))
    offset = draw(shape, 1000, NoiseRules(offset=0.5), torch.Generator().manual_seed(3), torch.device("cpu"))
    added = offset.noise - plain.noise
    assert (added - added.mean((2, 3), keepdim=True)).abs().max() < 1e-5
    assert float(added.mean((2, 3)).std()) == pytest.approx(0.5, abs=0.06)


def test_noise_and_timesteps_follow_the_generator_and_cover_the_range():
    shape = torch.Size((500, 1, 2, 2))
    one, two, other = (draw(shape, 10, PLAIN, torch.Generator().manual_seed(s), torch.device("cpu")) for s in (1, 1, 2))
    assert torch.equal(one.noise, two.noise)
    assert torch.equal(one.timesteps, two.timesteps)
    assert not torch.equal(one.noise, other.noise)
    assert one.timesteps.unique().tolist() == list(range(10))
    part = one.part(2, 5)
    assert torch.equal(part.noise, one.noise[2:5])
    assert torch.equal(part.timesteps, one.timesteps[2:5])
