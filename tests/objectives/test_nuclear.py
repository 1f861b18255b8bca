from __future__ import annotations

import pytest
import torch
from torch import nn

from fallow.core.compact import Slot
from fallow.core.errors import ConfigError, SelectionError
from fallow.core.select import Amount, choose, eligible, magnitude
from fallow.objectives.nuclear import NuclearNorm, masked_subgradients, nuclear_norm


def slots_of(model: nn.Module, fraction: float = 0.3) -> list[Slot]:
    targets = eligible(model)
    selection = choose(targets, magnitude, Amount(fraction=fraction))
    return [Slot(t, selection.index[t.name]) for t in targets if selection.index[t.name].numel()]


def test_the_loss_term_is_the_sum_of_singular_values_and_its_gradient_the_polar_factor():
    x = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    value = nuclear_norm(x)
    torch.testing.assert_close(value, torch.linalg.svdvals(x).sum())
    value.backward()
    u, _, vt = torch.linalg.svd(x.detach(), full_matrices=False)
    torch.testing.assert_close(x.grad, u @ vt)


def test_zero_singular_values_contribute_nothing_and_a_zero_matrix_gives_zero():
    low = (torch.randn(9, 2) @ torch.randn(2, 6)).requires_grad_()
    nuclear_norm(low).backward()
    assert torch.linalg.svdvals(low.grad).round(decimals=4).tolist() == [1, 1, 0, 0, 0, 0]
    index = torch.arange(4, dtype=torch.int32)
    (zero,) = masked_subgradients([torch.zeros(4)], [index], (5, 6))
    assert zero.tolist() == [0.0] * 4


@pytest.mark.parametrize("mode", ["polar", "newton-schulz"])
@pytest.mark.parametrize(("rows", "columns", "density"), [(96, 96, 0.054), (80, 200, 0.054), (200, 80, 0.3)])
def test_both_iterations_agree_with_the_exact_factor_on_the_mask(rows, columns, density, mode):
    index = [torch.randperm(rows * columns)[: int(density * rows * columns)].sort().values.int() for _ in range(3)]
    values = [torch.randn(len(i)) * 1e-3 for i in index]
    exact = masked_subgradients(values, index, (rows, columns), "svd")
    fast = masked_subgradients(values, index, (rows, columns), mode)
    for one, other in zip(exact, fast, strict=True):
        assert torch.cosine_similarity(one, other, dim=0) > 0.99


def test_layers_of_one_shape_in_a_batch_get_what_each_gets_alone():
    index = [torch.randperm(600)[:90].sort().values.int() for _ in range(4)]
    values = [torch.randn(90) * 10.0**-i for i in range(4)]
    together = masked_subgradients(values, index, (20, 30))
    for part, value, where in zip(together, values, index, strict=True):
        torch.testing.assert_close(part, masked_subgradients([value], [where], (20, 30))[0], rtol=1e-4, atol=1e-5)


def test_the_official_rule_takes_matrices_over_64_with_over_100_entries_and_convs_only_if_asked():
    model = nn.Sequential(nn.Linear(65, 65), nn.Linear(64, 90), nn.Conv2d(66, 70, 1), nn.Embedding(70, 80))
    slots = slots_of(model)
    names = {slot.name for slot in NuclearNorm(1.0).qualify(slots)}
    assert names == {"0.weight", "3.weight"}
    assert {s.name for s in NuclearNorm(1.0, convs=True).qualify(slots)} == {*names, "2.weight"}
    count = {slot.name: slot.proxy.numel() for slot in slots}["0.weight"]
    assert "0.weight" not in {s.name for s in NuclearNorm(1.0, min_selected=count + 1).qualify(slots)}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_gets_the_masked_factor_of_its_matrix_of_output_channels(memory_format):
    conv = nn.Conv2d(8, 70, 3, bias=False).to(memory_format=memory_format)
    (slot,) = slots_of(nn.Sequential(conv))
    NuclearNorm(0.5, "all", "svd", convs=True).add([slot])
    masked = torch.zeros(70 * 72).index_copy_(0, slot.index.long(), conv.weight.detach().reshape(-1)[slot.index.long()])
    u, s, vt = torch.linalg.svd(masked.view(70, 72).double(), full_matrices=False)
    assert s[-1] > 1e-3 * s[0]
    expected = 0.5 * (u @ vt).reshape(-1)[slot.index.long()]
    torch.testing.assert_close(slot.proxy.grad.double(), expected, rtol=0, atol=1e-4)


def test_all_takes_every_layer_and_a_number_takes_that_many_different_ones():
    model = nn.Sequential(*(nn.Linear(70, 70) for _ in range(4)), nn.Linear(70, 90))

    def acted(layers: int | str) -> list[str]:
        slots = slots_of(model)
        NuclearNorm(1.0, layers, seed=5).add(slots)
        return [slot.name for slot in slots if slot.proxy.grad is not None]

    assert len(acted("all")) == 5
    assert len(acted(3)) == 3
    assert len(acted("one")) == len(acted(1)) == 1
    assert len(acted(99)) == 5


def test_the_draw_continues_from_its_state():
    slots = slots_of(nn.Sequential(*(nn.Linear(70, 70) for _ in range(6))))

    def draw(term: NuclearNorm) -> list[str]:
        names = []
        for _ in range(10):
            for slot in slots:
                slot.proxy.grad = None
            term.add(slots)
            names += [slot.name for slot in slots if slot.proxy.grad is not None]
        return names

    term = NuclearNorm(1.0, seed=1)
    draw(term)
    other = NuclearNorm(1.0, seed=2)
    other.load_state_dict(term.state_dict())
    assert draw(other) == draw(term)


def test_impossible_options_are_refused():
    for options, message in (
        ({"weight": 0.0}, "rank_weight=0.0"),
        ({"weight": float("inf")}, "rank_weight=inf"),
        ({"weight": 1.0, "layers": 0}, "rank_layers=0"),
        ({"weight": 1.0, "layers": True}, "rank_layers=True"),
        ({"weight": 1.0, "mode": "fast"}, "rank_mode='fast'"),
    ):
        with pytest.raises(ConfigError, match=message):
            NuclearNorm(**options)
    with pytest.raises(SelectionError, match="no layer to act on"):
        NuclearNorm(1.0).check(slots_of(nn.Linear(8, 8)))
