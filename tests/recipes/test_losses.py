"""Distances, their Huber schedules and masks against their equations."""

from __future__ import annotations

import math

import pytest
import torch

from fallow.recipes.losses import debiased_weights, distances, huber_deltas, picture_means


def test_mse_and_l1_are_the_square_and_the_size_of_the_difference():
    predicted, wanted = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 1.0]])
    assert distances(predicted, wanted).tolist() == [[0.25, 9.0]]
    assert distances(predicted, wanted, "l1").tolist() == [[0.5, 3.0]]


def test_huber_is_the_square_near_zero_and_linear_far_away():
    far, near, c = 100.0, 1e-2, torch.tensor([0.5])
    huber = distances(torch.tensor([[far, near]]), torch.zeros(1, 2), "huber", c)[0]
    assert huber[0].item() == pytest.approx(2 * 0.5 * (far - 0.5), rel=1e-4)
    assert huber[1].item() == pytest.approx(near**2, rel=1e-2)
    smooth = distances(torch.tensor([[far, near]]), torch.zeros(1, 2), "smooth-l1", c)[0]
    assert torch.allclose(smooth * 0.5, huber)


def test_each_picture_has_its_own_delta():
    difference = torch.tensor([[3.0], [3.0]])
    found = distances(difference, torch.zeros(2, 1), "huber", torch.tensor([0.1, 1.0]))
    wanted = [2 * c * (math.sqrt(9 + c * c) - c) for c in (0.1, 1.0)]
    assert found[:, 0].tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_huber_schedules_are_those_of_sd_scripts(schedule):
    t, steps, delta = torch.tensor([0, 250, 999]), 1000, 0.1
    abar = torch.tensor([0.999, 0.4, 0.005])
    found = huber_deltas(delta, schedule, t / steps, abar / (1 - abar))
    for i in range(3):
        sigma = math.sqrt((1 - abar[i]) / abar[i])
        wanted = {
            "constant": delta,
            "exponential": math.exp(math.log(delta) * t[i] / steps),
            "snr": (1 - delta) / (1 + sigma) ** 2 + delta,
        }[schedule]
        assert found[i].item() == pytest.approx(wanted, rel=1e-4)


def test_the_snr_schedule_is_finite_at_pure_noise_and_at_none():
    assert huber_deltas(0.1, "snr", torch.tensor([1.0, 0.0]), torch.tensor([0.0, torch.inf])).tolist() == [
        pytest.approx(0.1),
        pytest.approx(1.0),
    ]


def test_a_mask_weights_each_place_and_none_is_the_plain_mean():
    losses = torch.arange(16.0).view(2, 2, 2, 2)
    assert torch.equal(picture_means(losses), losses.flatten(1).mean(1))
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]], [[[0.5, 0.5], [0.5, 0.5]]]])
    assert picture_means(losses, mask).tolist() == [(0 + 4) / 8, 0.5 * 11.5]
    assert picture_means(losses, mask, unmasked_weight=0.25).tolist()[0] == pytest.approx(
        (0 + 4 + 0.25 * (1 + 2 + 3 + 5 + 6 + 7)) / 8
    )


def test_a_normalised_mask_makes_a_small_object_count_as_much_as_a_large_one():
    losses = torch.full((2, 3, 4, 4), 2.0)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, 0, 0], mask[1] = 1, 1
    assert picture_means(losses, mask).tolist() == [2 / 16, 2.0]
    assert picture_means(losses, mask, normalize=True).tolist() == [2.0, 2.0]


def test_a_mask_holds_for_all_frames_of_a_video():
    losses = torch.rand(1, 4, 3, 2, 2)
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    wanted = (losses[0, :, :, 0, 0] + losses[0, :, :, 1, 1]).sum() / losses.numel()
    assert picture_means(losses, mask).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_debiased_weights_are_those_of_the_paper():
    snr = torch.tensor([4.0, 0.25, 1e9])
    assert debiased_weights(snr, "epsilon").tolist() == pytest.approx([0.5, 2.0, 1000**-0.5])
    assert debiased_weights(snr, "v_prediction").tolist() == pytest.approx([0.2, 0.8, 1 / 1001])
