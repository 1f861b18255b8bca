"""The memory estimate against hand counts and against tensors that a real training step holds."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fallow import SaRA
from fallow.analysis.memory import LiveBytes, estimate_dense, estimate_selective, measure_step


def held(tensor):
    return tensor.untyped_storage().nbytes()


def chain(width=64, depth=3, batch=5, dtype=torch.float32):
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width, bias=False, dtype=dtype), nn.Tanh()]
    network, x = nn.Sequential(*layers), torch.randn(batch, width, dtype=dtype)
    return network, lambda: network(x).square().mean()


def test_live_bytes_counts_what_lives_and_forgets_what_died():
    with LiveBytes() as live:
        a = torch.zeros(100)
        assert live.now == 400
        b = a.view(10, 10)  # no new storage
        c = torch.ones(50, dtype=torch.float64)
        assert live.now == 800
        del c
        assert live.now == 400
        del a, b
    assert (live.now, live.peak) == (0, 800)


def test_live_bytes_leaves_out_what_was_there_before():
    network, _ = chain()
    with LiveBytes(network) as live:
        views = [parameter.t() for parameter in network.parameters()]
    assert len(views) == 3
    assert live.peak == 0


def test_dropping_gradients_leaves_one_dense_gradient_alive_at_a_time():
    network, loss = chain(depth=6)
    kept, dropped = (measure_step(network, loss, drop_gradients=drop) for drop in (False, True))
    one = 64 * 64 * 4
    assert kept.gradients == 6 * one
    assert dropped.gradients == 0
    assert kept.largest_gradient == dropped.largest_gradient == one
    assert kept.activations == dropped.activations == 6 * 5 * 64 * 4 + 4  # six results of tanh, and the loss
    assert 6 * one < kept.peak < 6 * one + 2000
    assert dropped.peak < one + dropped.activations + 2000
    assert all(parameter.grad is None for parameter in network.parameters())


def test_activations_grow_with_the_batch_and_gradients_do_not():
    small, large = (measure_step(*chain(batch=batch), drop_gradients=True) for batch in (5, 50))
    output = 64 * 4  # bytes of one layer's output for one example; 3 tanh results are kept
    assert small.activations == pytest.approx(3 * 5 * output, rel=0.1)
    assert large.activations == pytest.approx(3 * 50 * output, rel=0.1)
    assert large.gradients == small.gradients


def test_fake_tensors_give_the_figures_of_real_ones():
    real = measure_step(*chain(), drop_gradients=True)
    with FakeTensorMode():
        fake = measure_step(*chain(), drop_gradients=True)
    assert fake == real


def test_a_selective_estimate_counts_codes_first_values_gradients_and_moments_and_freezes_tensors_with_none():
    network, loss = chain()
    counted = estimate_selective(network, loss, {"0.weight": 0, "2.weight": 10, "4.weight": 30})
    codes = (2 * 10 + 4) + (30 + 2 * 16)  # low bits of 2 bytes and a count for 65536 entries, or of 1 for each 256
    assert (counted.indices, counted.values, counted.gradients, counted.moments) == (codes, 0, 160, 320)
    assert (counted.trained, counted.state) == (40, codes + 40 * 16)
    assert counted.weights == 3 * 64 * 64 * 4
    assert [p.requires_grad for p in network.parameters()] == [False, True, True]
    assert (
        counted.total == counted.weights + counted.state + counted.step.peak == sum(size for _, size in counted.rows())
    )
    assert estimate_selective(network, loss, {"2.weight": 10}, form="delta").values == 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_selective_estimate_equals_the_tensors_that_the_optimizer_keeps(dtype):
    network, loss = chain(width=128, depth=4, dtype=dtype)
    optimizer = SaRA(network, fraction=0.3, lr=1e-3)
    selected = {name: count for name, (count, _) in optimizer.selected().items()}
    for _ in range(2):
        loss().backward()
        gradients = sum(held(proxy.grad) for proxy in optimizer.trainable())
        optimizer.step()
    moments = sum(held(t) for state in optimizer.state.values() for t in state.values() if t.ndim)
    slots = optimizer.slots.values()
    kept = gradients + moments + sum(slot.nbytes for slot in slots)
    optimizer.close()
    told = estimate_selective(network, loss, selected)
    assert told.trained == round(0.3 * 4 * 128 * 128)
    assert told.state == kept == told.trained * (16 if dtype == torch.float32 else 18) + told.indices
    assert 1 < told.indices / told.trained < 1.05


def test_a_selective_estimate_equals_the_peak_of_a_real_training_step():
    network, loss = chain(width=256, depth=8, batch=100)
    with LiveBytes(network) as live:
        optimizer = SaRA(network, fraction=0.1, lr=1e-3)
        for _ in range(3):
            live.peak = 0  # selecting has a peak of its own, and the first update makes the moments
            for _ in range(2):  # accumulation: the compact gradients are alive in the second pass from its start
                loss().backward()
            optimizer.step()
            optimizer.zero_grad()
    optimizer.close()
    told = estimate_selective(network, loss, {name: count for name, (count, _) in optimizer.selected().items()})
    assert told.total - told.weights == pytest.approx(live.peak, rel=0.02)


@pytest.mark.parametrize("foreach", [False, True])
def test_a_dense_estimate_of_full_training_equals_the_tensors_that_full_training_holds(foreach):
    network, loss = chain(width=128, depth=4)
    told = estimate_dense(network, loss, method="full", foreach=foreach)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, foreach=foreach)
    with LiveBytes(network) as live:
        for _ in range(3):
            live.peak = 0  # the first update also makes the moments
            loss().backward()
            at_backward = live.now
            optimizer.step()
            optimizer.zero_grad()
    held = at_backward - sum(
        p.numel() * 4 for p in network.parameters()
    )  # after the last backward: gradients are alive
    assert told.moments == pytest.approx(held, rel=0.01)
    assert told.total - told.weights == pytest.approx(live.peak, rel=0.01)


def test_weights_that_are_tied_count_once():
    network, loss = chain()
    network[2].weight = network[0].weight
    assert estimate_dense(network, loss, method="full").weights == 2 * 64 * 64 * 4


def test_a_network_with_nothing_to_train_is_refused():
    network, loss = chain()
    with pytest.raises(ValueError, match="no parameter"):
        estimate_selective(network, loss, {})
