"""The denoising objective against its equations."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from fallow.core.errors import ConfigError
from fallow.recipes.losses import LossRules
from fallow.recipes.noise import (
    PLAIN,
    Diffusion,
    Draw,
    NoiseRules,
    denoising_loss,
    draw,
    min_snr_weights,
    multires,
    target,
    zero_terminal,
)  # fmt: skip


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


def test_plain_draws_are_the_generators_own_numbers():
    shape = torch.Size((3, 4, 8, 8))
    drawn = draw(shape, 1000, PLAIN, torch.Generator().manual_seed(3), torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(drawn.noise, torch.randn(shape, generator=generator))
    assert torch.equal(drawn.timesteps, torch.randint(0, 1000, (3,), generator=generator))
    assert drawn.perturbation is None


def test_multires_noise_is_the_sum_of_levels_brought_back_to_deviation_1():
    noise = torch.randn(2, 4, 16, 16)
    found = multires(noise, 6, 0.5, torch.Generator().manual_seed(3))
    generator, total = torch.Generator().manual_seed(3), noise.clone()
    for level in range(6):
        ratio = float(torch.rand((), generator=generator)) * 2 + 2
        side = max(1, int(16 / ratio**level))
        coarse = torch.randn((2, 4, side, side), generator=generator)
        total += torch.nn.Upsample(size=(16, 16), mode="bilinear")(coarse) * 0.5**level
        if side == 1:
            break
    for picture, wanted in zip(found, total, strict=True):
        torch.testing.assert_close(picture, wanted / wanted.std())
    assert found.mean((2, 3)).std() > 2 * noise.mean((2, 3)).std()  # more of it is coarse
    clip = torch.randn(2, 4, 3, 16, 16)
    assert multires(clip, 2, 0.5, torch.Generator().manual_seed(3)).shape == clip.shape


def test_timesteps_stay_in_their_range():
    how = NoiseRules(first_timestep=3, last_timestep=6)
    shape = torch.Size((200, 1, 1, 1))
    drawn = draw(shape, 10, how, torch.Generator().manual_seed(1), torch.device("cpu"))
    assert drawn.timesteps.unique().tolist() == [3, 4, 5]


def test_the_input_is_perturbed_and_the_target_is_not(scheduler):
    objective = Diffusion(scheduler, "epsilon")
    latents, seen = torch.randn(2, 4, 8, 8), []
    how = NoiseRules(perturbation=0.5)
    drawn = objective.draw(latents.shape, how, torch.Generator().manual_seed(1), torch.device("cpu"))

    def answer(noisy, timesteps):
        seen.append(noisy)
        return drawn.noise

    assert float(denoising_loss(answer, objective, latents, drawn)) == 0.0
    assert drawn.perturbation is not None
    assert float(drawn.perturbation.std()) == pytest.approx(0.5, abs=0.05)
    wanted = scheduler.add_noise(latents, drawn.noise + drawn.perturbation, drawn.timesteps)
    assert torch.equal(seen[0], wanted)
    assert torch.equal(drawn.part(1, 2).perturbation, drawn.perturbation[1:2])


def test_zero_terminal_snr_ends_in_noise_alone_and_begins_as_before(scheduler):
    velocity = DDPMScheduler.from_config(scheduler.config, prediction_type="v_prediction")
    found = zero_terminal(velocity)
    roots, wanted = scheduler.alphas_cumprod.sqrt(), found.alphas_cumprod.sqrt()
    torch.testing.assert_close(wanted, (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1]), atol=2e-4, rtol=1e-3)
    assert float(found.alphas_cumprod[-1]) == pytest.approx(0.0, abs=1e-7)
    other = zero_terminal(PNDMScheduler.from_config(velocity.config))
    assert type(other) is DDIMScheduler
    assert other.config.timestep_spacing == "trailing"
    with pytest.raises(ConfigError, match="nothing to learn at the last timestep"):
        zero_terminal(scheduler)
    with pytest.raises(ConfigError, match="FlowMatchEulerDiscreteScheduler lacks"):
        zero_terminal(FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("distance", ["l1", "huber", "smooth-l1"])
def test_other_distances_and_debiased_weights_are_their_formulas(scheduler, distance):
    latents, noise, t = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2), torch.tensor([50, 700])
    rules = LossRules(distance=distance, huber_schedule="exponential", debiased=True)
    got = denoising_loss(lambda *_: torch.zeros_like(noise), Diffusion(scheduler), latents, Draw(noise, t), rules=rules)
    each = []
    for i in range(2):
        c, size = 0.1 ** (float(t[i]) / 1000), noise[i].abs()
        soft = 2 * ((size**2 + c**2).sqrt() - c)
        loss = {"l1": size, "huber": c * soft, "smooth-l1": soft}[distance].mean()
        abar = float(scheduler.alphas_cumprod[t[i]])
        each.append(float(loss) * ((1 - abar) / abar) ** 0.5)
    assert float(got) == pytest.approx(sum(each) / 2, rel=1e-4)
