"""Ranks by the energy of spectra: LaMDA++."""

from __future__ import annotations

import pytest
import torch

from fallow.core.errors import ConfigError
from fallow.core.spectra import energies, ranks_by_energy


def curve(values):
    held = values.double().square().cumsum(0)
    return held / held[-1]


FLAT, STEEP, MILD = torch.ones(64), 1 / torch.arange(1, 65) ** 2, 1 / torch.arange(1, 65)


def test_flat_spectra_get_the_rank_that_steep_ones_do_not_need():
    held = {"a": curve(FLAT), "b": curve(STEEP), "c": curve(FLAT), "d": curve(MILD)}
    assert ranks_by_energy(held, 16, 4, 32) == {"a": 28, "b": 4, "c": 28, "d": 4}


def test_equal_spectra_get_equal_ranks_and_the_remainder_goes_by_order():
    assert ranks_by_energy({name: curve(MILD) for name in "abc"}, 16) == {"a": 16, "b": 16, "c": 16}
    mixed = ranks_by_energy({"a": curve(MILD), "b": curve(FLAT), "c": curve(MILD)}, 5, 2, 9)
    assert mixed == {"a": 3, "b": 9, "c": 3}


@pytest.mark.parametrize("budget", ["rank", "params"])
def test_the_budget_is_kept_and_used_up(budget):
    torch.manual_seed(0)
    values = torch.rand(64).sort(descending=True).values
    held = {str(n): curve(values ** (1 + n)) for n in range(7)}
    ranks = ranks_by_energy(held, 12, 4, 24, budget)
    power = 1 if budget == "rank" else 2
    spent, limit = sum(r**power for r in ranks.values()), 7 * 12**power
    assert spent <= limit
    growing = [r for r in ranks.values() if r < 24]
    assert all(spent - r**power + (r + 1) ** power > limit for r in growing)
    assert list(ranks.values()) == sorted(ranks.values(), reverse=True)  # the steeper the less


def test_energies_of_a_matrix_are_those_of_its_singular_values():
    weight = torch.randn(40, 30)
    values = torch.linalg.svdvals(weight.double())
    wanted = values.square().cumsum(0)[:8] / values.square().sum()
    assert torch.allclose(energies(weight, 8), wanted, atol=1e-6)
    assert torch.equal(energies(torch.zeros(5, 6), 3), torch.ones(3).double())


def test_what_no_layer_can_have_is_refused():
    with pytest.raises(ConfigError, match="least=8, mean=4"):
        ranks_by_energy({"a": curve(FLAT)}, 4, 8, 16)
    with pytest.raises(ConfigError, match="budget='bytes'"):
        ranks_by_energy({"a": curve(FLAT)}, 4, budget="bytes")
    with pytest.raises(ConfigError, match="least=8 is above what 'small' can have, 6"):
        ranks_by_energy({"a": curve(FLAT), "small": curve(FLAT[:6])}, 16)
