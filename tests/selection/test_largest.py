from __future__ import annotations

import pytest
import torch

import fallow
from fallow.core.errors import SelectionError


def test_the_largest_entries_of_the_whole_model_are_trained_exactly(mlp):
    model = mlp()
    everything = torch.cat([param.detach().abs().reshape(-1) for param in model.parameters()])
    bound = everything.sort(descending=True).values[99]
    optimizer = fallow.Largest(model, budget=100)
    assert optimizer.trained_parameters == 100
    taken = torch.cat([slot.read().abs() for slot in optimizer.slots.values()])
    assert taken.min() == bound == optimizer.threshold
    assert optimizer.selected()["3.weight"] == (80, 80)  # the norm's scales are ones


def test_a_threshold_takes_what_reaches_it(mlp):
    model = mlp()
    expected = sum(int((param.abs() >= 0.1).sum()) for param in model.parameters())
    assert fallow.Largest(model, threshold=0.1).trained_parameters == expected


def test_five_per_cent_by_default_and_too_high_a_threshold_is_refused(mlp):
    optimizer = fallow.Largest(mlp())
    assert optimizer.trained_parameters == round(0.05 * optimizer.total_parameters)
    with pytest.raises(SelectionError, match="selects no weight"):
        fallow.Largest(mlp(), threshold=50.0)
