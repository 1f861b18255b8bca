from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fallow.core.compact import Capture, Slot, gather
from fallow.core.errors import ModelError
from fallow.core.select import Amount, choose, eligible, magnitude


def capture_of(model: nn.Module, fraction: float = 0.3, form="value") -> tuple[Capture, dict[str, Slot]]:
    targets = eligible(model)
    selection = choose(targets, magnitude, Amount(fraction=fraction))
    slots = [Slot(t, selection.index[t.name], form) for t in targets if selection.index[t.name].numel()]
    return Capture(slots), {slot.name: slot for slot in slots}


@pytest.mark.parametrize("form", ["value", "delta"])
def test_compact_gradients_equal_the_dense_ones_for_every_layer_type_tied_and_fused(zoo, form):
    model = zoo()
    reference = copy.deepcopy(model)
    _, slots = capture_of(model, form=form)
    ids, labels = torch.randint(0, 32, (4, 7)), torch.randint(0, 10, (4,))
    for net in (model, reference):
        nn.functional.cross_entropy(net(ids), labels).backward()
    dense = dict(reference.named_parameters())
    assert {"tokens.weight", "attention.in_proj_weight", "experts", "conv.weight", "head.bias"} <= set(slots)
    for name, slot in slots.items():
        expected = dense[name].grad.reshape(-1)[slot.index.long()]
        torch.testing.assert_close(slot.proxy.grad, expected, rtol=1e-6, atol=1e-9)
    assert all(param.grad is None for slot in slots.values() for param in slot.params)


def test_channels_last_convolutions_are_read_written_and_captured_at_their_logical_places():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    reference = copy.deepcopy(model)
    _, slots = capture_of(model)
    x = torch.randn(2, 3, 9, 9).to(memory_format=torch.channels_last)
    for net in (model, reference):
        net(x).square().sum().backward()
    slot = slots["0.weight"]
    dense = reference[0].weight
    torch.testing.assert_close(slot.proxy.grad, dense.grad.reshape(-1)[slot.index.long()])
    slot.write(torch.full((slot.index.numel(),), 7.0))
    expected = dense.detach().reshape(-1).clone()
    expected[slot.index.long()] = 7.0
    assert torch.equal(model[0].weight.detach().reshape(-1), expected)


def test_sparse_embedding_gradients_are_gathered_without_making_them_dense(zoo):
    model = zoo(tied=False, sparse=True)
    reference = copy.deepcopy(model)
    reference.tokens.sparse = False
    _, slots = capture_of(model)
    ids = torch.tensor([[1, 5, 5, 31, 0, 2, 9]])
    for net in (model, reference):
        net(ids).square().sum().backward()
    slot = slots["tokens.weight"]
    expected = reference.tokens.weight.grad.reshape(-1)[slot.index.long()]
    assert expected.count_nonzero() > 0
    torch.testing.assert_close(slot.proxy.grad, expected, rtol=1e-6, atol=1e-9)


def test_a_sparse_gradient_without_any_row_is_zero():
    empty = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 4), (6, 4))
    assert gather(empty, torch.tensor([0, 5, 23])).tolist() == [0.0, 0.0, 0.0]


def test_gradients_add_up_over_backward_passes_in_float32_for_low_precision_weights(mlp):
    model = mlp(torch.bfloat16)
    _, slots = capture_of(model)
    reference = copy.deepcopy(model)
    total: dict[str, torch.Tensor] = {}
    for _ in range(5):
        x = torch.randn(3, 80).bfloat16()
        model(x).sum().backward()
        reference.zero_grad()
        reference(x).sum().backward()
        for name, param in reference.named_parameters():
            total[name] = total.get(name, 0) + param.grad.float().reshape(-1)
    for name, slot in slots.items():
        assert slot.proxy.grad.dtype == torch.float32
        torch.testing.assert_close(slot.proxy.grad, total[name][slot.index.long()], rtol=1e-6, atol=1e-6)


def test_parameters_tied_by_storage_collect_the_gradients_of_both_uses():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
    model[2].weight.data = model[0].weight.data
    reference = copy.deepcopy(model)  # deepcopy keeps the values, not the tie: two gradients to add by hand
    _, slots = capture_of(model)
    x = torch.randn(5, 6)
    for net in (model, reference):
        net(x).square().sum().backward()
    both = (reference[0].weight.grad + reference[2].weight.grad).reshape(-1)
    torch.testing.assert_close(slots["0.weight"].proxy.grad, both[slots["0.weight"].index.long()])


def test_parameters_that_a_cast_has_untied_are_told_instead_of_trained_apart():
    one = nn.Linear(8, 8, bias=False)
    model = nn.Sequential(one, nn.Linear(8, 8, bias=False))
    model[1].weight = nn.Parameter(one.weight.data)
    capture_of(model)
    model.bfloat16()
    with pytest.raises(ModelError, match=r"'0.weight' was tied through its storage.*tie the whole Parameter"):
        model(torch.randn(2, 8).bfloat16()).sum().backward()


def test_one_dense_gradient_is_alive_at_a_time(peak_bytes):
    def peak_of_backward(selective: bool) -> int:
        model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(6)))
        kept = capture_of(model, fraction=0.02) if selective else None
        loss = model(torch.randn(2, 128)).square().sum()
        peak = peak_bytes(loss.backward)
        assert kept is None or kept[1]["0.weight"].proxy.grad is not None
        return peak

    dense, compact, one = peak_of_backward(False), peak_of_backward(True), 128 * 128 * 4
    assert dense >= 6 * one
    assert one <= compact < 1.5 * one
    assert dense - compact >= 4.75 * one  # the gradients of all layers but one, less the compact ones


def test_hooks_of_other_tools_still_see_the_dense_gradient(mlp):
    model, norms = mlp(), []
    model[0].weight.register_hook(lambda grad: norms.append(float(grad.norm())))
    model[0].weight.register_post_accumulate_grad_hook(lambda param: norms.append(float(param.grad.norm())))
    capture_of(model)
    model(torch.randn(2, 80)).sum().backward()
    assert len(norms) == 2
    assert norms[0] == pytest.approx(norms[1])
    assert norms[0] > 0


def test_after_a_step_the_next_backward_starts_anew_even_if_only_the_model_was_cleared(mlp):
    model = mlp()
    capture, slots = capture_of(model)
    x = torch.randn(2, 80)
    model(x).sum().backward()
    first = slots["0.weight"].proxy.grad.clone()
    capture.spent = True
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(slots["0.weight"].proxy.grad, first)


def test_a_second_engine_on_the_same_weights_is_refused(mlp):
    model = mlp()
    kept = capture_of(model)
    with pytest.raises(ModelError, match="already trained by another selective optimizer"):
        capture_of(model)
    assert kept


def test_deepcopy_and_pickle_of_the_model_take_no_hooks_along(mlp):
    model = mlp()
    kept = capture_of(model)
    twin = copy.deepcopy(model)
    twin(torch.randn(2, 80)).sum().backward()
    assert all(param.grad is not None for param in twin.parameters() if param.requires_grad)
    assert kept[1]["0.weight"].proxy.grad is None


def test_values_written_by_others_win_unless_they_are_the_rounded_masters():
    weight = nn.Parameter(torch.tensor([0.5, 0.25, 8.0]).bfloat16())
    model = nn.ParameterList([weight])
    (slot,) = capture_of(model, fraction=0.67)[1].values()
    slot.proxy.data += 1e-4  # below bfloat16's resolution: only the masters move
    slot.store()
    masters = slot.proxy.detach().clone()
    with torch.no_grad():
        weight.copy_(torch.tensor([0.5, 0.75, 8.0]).bfloat16())
    slot.refresh()
    assert slot.proxy[0] == masters[0]
    assert slot.proxy[1] == 0.75


def test_a_gradient_from_another_device_says_to_move_the_model_first(mlp):
    slot = capture_of(mlp())[1]["0.weight"]
    with pytest.raises(ModelError, match="move the model first"):
        slot.accumulate(torch.empty(96, 80, device="meta"))


def test_narrowing_keeps_the_chosen_positions_twice_over():
    model = nn.ParameterList([nn.Parameter(torch.arange(10.0) / 10)])
    (slot,) = capture_of(model, fraction=0.8)[1].values()
    proxy = slot.proxy
    slot.proxy.grad = torch.arange(8.0)
    slot.narrow(torch.tensor([1, 3, 5, 7], dtype=torch.int32))
    slot.narrow(torch.tensor([0, 3], dtype=torch.int32))
    assert slot.proxy is proxy
    assert slot.trained.tolist() == [1, 7]
    assert slot.proxy.grad.tolist() == [1.0, 7.0]
    torch.testing.assert_close(slot.proxy.data, torch.tensor([0.1, 0.7]))
    assert slot.index.numel() == 8
