from __future__ import annotations

import torch

import fallow


def indices(optimizer: fallow.Random) -> dict[str, list[int]]:
    return {name: slot.index.tolist() for name, slot in optimizer.slots.items()}


def test_a_fraction_by_chance_is_exact_uniform_and_repeatable(mlp):
    one, again, other = (fallow.Random(mlp(), fraction=0.1, seed=seed) for seed in (0, 0, 1))
    assert one.trained_parameters == round(0.1 * one.total_parameters)
    assert indices(one) == indices(again)
    assert indices(one) != indices(other)
    share = one.slots["0.weight"].index.numel() / 7680
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 7680) ** 0.5
    # no trace of the weights' size in the choice: the mean magnitude is the layer's own
    slot = one.slots["0.weight"]
    assert abs(float(slot.read().abs().mean() / slot.weight.detach().abs().mean()) - 1) < 0.1


def test_a_density_does_not_depend_on_which_other_weights_are_trained(mlp):
    alone = fallow.Random(mlp(), density=0.05, include="2.weight")
    both = fallow.Random(mlp(), density=0.05, include="weight")
    assert indices(alone)["2.weight"] == indices(both)["2.weight"]
    assert alone.trained_parameters == round(0.05 * 7680)


def test_training_moves_only_the_drawn_entries(mlp):
    model = mlp()
    base = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = fallow.Random(model, fraction=0.02, lr=1e-2)
    model(torch.randn(4, 80)).square().sum().backward()
    optimizer.step()
    changed = sum(int((param.detach() != base[name]).sum()) for name, param in model.named_parameters())
    assert 0 < changed <= optimizer.trained_parameters
