"""Parts of a pipeline leave the device while they are not needed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fallow.recipes.resting import Resting


class Traveller(nn.Module):
    """Remembers where it was sent, since no second device is here to go to."""

    def __init__(self) -> None:
        super().__init__()
        self.way: list[str] = []

    def to(self, device):
        self.way.append(torch.device(device).type)
        return self


def test_parts_leave_the_device_and_are_back_for_what_needs_them_also_after_an_error():
    vae, text = Traveller(), Traveller()
    resting = Resting([vae, text], torch.device("cuda"))
    resting.leave()
    with resting.present():
        assert vae.way == text.way == ["cpu", "cuda"]
    with pytest.raises(KeyError), resting.present():
        raise KeyError
    assert vae.way == ["cpu", "cuda", "cpu", "cuda", "cpu"]


def test_on_the_cpu_nothing_moves():
    vae = Traveller()
    resting = Resting([vae], torch.device("cpu"))
    resting.leave()
    with resting.present():
        assert vae.way == []
