"""Averages of merged weights, against sums of dense matrices; SWAD's valley, against stretches chosen by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fallow
from fallow.core.delta import Delta
from fallow.core.errors import ConfigError
from fallow.recipes.generalise_average import Averaged, Stretch, Valley, put


def network(method: str = "pego", **options: object) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    model.requires_grad_(False)
    fallow.attach(model, method, ["0"], rank=2, **options)
    model[2] = nn.Linear(16, 4)
    return model


def moved(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Another step: the merged weight and the classifier's."""
    (delta,) = (module for module in model.modules() if isinstance(module, Delta))
    delta.randomize()
    with torch.no_grad():
        model[2].weight += torch.randn(4, 16)
        return delta.new_weight(model[0].weight.detach()).clone(), model[2].weight.detach().clone()


@pytest.mark.parametrize(("method", "options"), [("pego", {"group": 2}), ("lora", {"alpha": 6.0}), ("dora", {})])
def test_the_mean_is_that_of_merged_weights_not_of_factors(method: str, options: dict) -> None:
    model, x = network(method, **options), torch.randn(5, 12)
    averaged, seen = Averaged(model), []
    for _ in range(4):
        seen.append(moved(model))
        averaged.update()
    own, before = model(x), [p.detach().clone() for p in model.parameters()]
    merged, head = (sum(one[at] for one in seen) / 4 for at in (0, 1))
    wanted = nn.functional.linear(nn.functional.linear(x, merged, model[0].bias).relu(), head, model[2].bias)
    with averaged.shown():
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(wanted, own, atol=1e-2)
    assert torch.equal(model(x), own)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_moving_average_follows_its_recurrence_from_the_first_step_on() -> None:
    model = network()
    averaged = Averaged(model, decay=0.9)
    wanted: tuple[Tensor, Tensor] | None = None
    for step in range(5):
        now = moved(model)
        averaged.update()
        keep = min(0.9, (1 + step) / (10 + step))
        wanted = now if wanted is None else tuple(keep * a + (1 - keep) * b for a, b in zip(wanted, now, strict=True))
    with averaged.shown():
        torch.testing.assert_close(model[0].weight, wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model[2].weight, wanted[1], rtol=1e-5, atol=1e-5)


def test_networks_without_adapters_are_averaged_too_and_layers_that_cannot_merge_are_refused() -> None:
    plain = nn.Sequential(nn.Linear(3, 2))
    averaged = Averaged(plain)
    with pytest.raises(ConfigError, match="nothing was averaged yet"), averaged.shown():
        pass
    start = plain[0].weight.detach().clone()
    averaged.update()
    with torch.no_grad():
        plain[0].weight += 2
    averaged.update()
    with averaged.shown():
        torch.testing.assert_close(plain[0].weight, start + 1)
    model = nn.Sequential(nn.Linear(12, 16))
    fallow.attach(model, "smora", ["0"])
    with pytest.raises(ConfigError, match="no merged weights to average"):
        Averaged(model)


def valley(losses: list[float], **options: object) -> tuple[Valley, list[float]]:
    """Stretch number i has the mean i."""
    found = Valley(**options)
    for number, loss in enumerate(losses):
        found.add(Stretch(([torch.tensor([float(number)])], []), loss))
    return found, found.finish()[0][0].tolist()


def test_swad_averages_from_where_the_loss_stops_falling_to_where_it_rises() -> None:
    losses = [5.0, 3.0, 1.0, 1.1, 1.2, 1.0, 9.0, 9.0, 9.0, 9.0]
    found, mean = valley(losses, patience=3, tolerance=3, ratio=1.3)
    assert found.limit == pytest.approx(1.3 * 1.1)  # of stretches 2, 3 and 4
    assert found.ended
    assert mean == [(2 + 3 + 4 + 5) / 4]


def test_swad_without_a_rise_goes_on_to_the_end_and_without_a_start_takes_what_is_best_at_the_end() -> None:
    found, mean = valley([2.0, 1.0, 1.1, 1.2, 1.1], patience=3, tolerance=3)
    assert not found.ended
    assert mean == [(1 + 2 + 3 + 4) / 4]
    _, falling = valley([5.0, 4.0, 3.0, 2.0], patience=3)
    assert falling == [3.0]
    with pytest.raises(ConfigError, match="has seen no stretch"):
        Valley().finish()


def test_a_mean_of_stretches_is_shown_in_the_network() -> None:
    model = network()
    averaged, kept = Averaged(model), []
    found = Valley(patience=1, tolerance=5)
    for _ in range(3):
        for _ in range(2):
            kept.append(moved(model)[0])
            averaged.update()
        found.add(Stretch(averaged.take(), 1.0))
    put(averaged, found.finish())
    with averaged.shown():
        torch.testing.assert_close(model[0].weight, sum(kept) / 6, rtol=1e-5, atol=1e-5)
