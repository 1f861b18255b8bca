"""The moving average against its definition."""

from __future__ import annotations

import pytest
import torch

from fallow.recipes.moving_average import MovingAverage


class Held:
    """Two tensors that can be averaged."""

    def __init__(self) -> None:
        self.values = {"a": torch.zeros(3), "b": torch.ones(2, 2)}

    def masters(self):
        return self.values

    def put(self, values):
        for name, value in values.items():
            self.values[name].copy_(value)


def test_the_average_is_the_recursion_with_a_warm_up():
    held = Held()
    average = MovingAverage(held, 0.9)
    a = torch.zeros(3, dtype=torch.float64)
    for step in range(150):
        held.values["a"] += torch.randn(3, generator=torch.Generator().manual_seed(step))
        average.update()
        decay = min(0.9, (1 + step) / (10 + step))
        a = decay * a + (1 - decay) * held.values["a"].double()
    assert average.values["a"].tolist() == pytest.approx(a.tolist(), rel=1e-4)
    assert torch.equal(average.values["b"], torch.ones(2, 2))


def test_the_average_is_shown_within_the_block_and_the_own_values_after_it():
    held = Held()
    average = MovingAverage(held, 0.5)
    held.values["a"] += 1.0
    with average.shown():
        assert torch.equal(held.values["a"], torch.zeros(3))
    assert torch.equal(held.values["a"], torch.ones(3))
    with pytest.raises(RuntimeError), average.shown():
        raise RuntimeError
    assert torch.equal(held.values["a"], torch.ones(3))


def test_its_state_goes_on():
    held, other = Held(), Held()
    average, again = MovingAverage(held, 0.9), MovingAverage(other, 0.9)
    held.values["a"] += 2.0
    average.update()
    again.load_state_dict(average.state_dict())
    assert again.updates == 1
    assert torch.equal(again.values["a"], average.values["a"])
