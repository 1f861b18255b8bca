"""Training entries beside a code, against the same entries trained in the dense weight that it stands for."""

import pytest
import torch
from torch import nn

import fallow
from fallow.analysis.memory import LiveBytes
from fallow.core.compact import gather
from fallow.core.errors import AdapterError, SelectionError
from fallow.core.files import read_tensors
from fallow.core.quantized import quantize_, stored
from fallow.core.select import Selection, eligible, magnitude
from fallow.core.side_branch import SideSlot
from fallow.core.sparse import Adapters, SparseDelta
from fallow.core.stored_weight import Store

MODES = ("fp8", "int8", "nf4")


def network(dtype=torch.float32, quantised=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Flatten(), nn.Linear(32 * 36, 64), nn.GELU(), nn.Linear(64, 64))
    if quantised:
        quantize_(model.to(dtype), quantised, min_size=2000)
    return model.to(dtype)


def dense_twin(model):
    twin = network(next(model.parameters()).dtype)
    for name, weight in stored(model):
        twin.get_parameter(name).data = weight.dense().detach()
    return twin


def batch(dtype=torch.float32):
    torch.manual_seed(5)
    return torch.randn(4, 8, 8, 8, dtype=dtype)


def train(model, optimizer, steps=4):
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch(next(model.parameters()).dtype)).float().square().sum().backward()
        optimizer.step()


@pytest.fixture
def trained():
    model = network(quantised="nf4")
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2)
    train(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_beside_a_code_train_as_in_the_dense_weight(mode, dtype):
    model = network(dtype, mode)
    twin = dense_twin(model)
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2, reselect_at=2)
    chosen = {name: slot.index for name, slot in optimizer.slots.items()}
    assert len(chosen) >= 3
    reference = fallow.Selective(
        twin, lambda *_: Selection(chosen, optimizer.threshold), fraction=0.1, lr=1e-2, reselect_at=2
    )
    train(model, optimizer)
    train(twin, reference)
    assert optimizer.live_parameters == reference.live_parameters < optimizer.trained_parameters
    for name, weight in stored(model):
        assert not torch.equal(weight.dense(), weight.store.dense(dtype, trained=False))
        torch.testing.assert_close(weight.dense().detach(), twin.get_parameter(name).detach(), rtol=1e-5, atol=1e-6)


def test_a_budget_is_met_to_the_entry_though_most_magnitudes_are_equal():
    for mode in MODES:
        model = network(quantised=mode)
        assert fallow.SaRA(model, budget=4321, lr=1e-3).trained_parameters == 4321


def test_entries_that_a_code_rounds_to_zero_count_as_a_quarter_of_its_step():
    model = network(quantised="nf4")
    target = next(target for target in eligible(model) if target.name == "2.weight")
    score, dense = magnitude(target), target.weight.dense().abs()
    zero = dense == 0
    assert 0.03 < zero.float().mean() < 0.25
    assert torch.equal(score[~zero], dense[~zero])
    original = network()[2].weight.abs()
    assert score[zero].mean() == pytest.approx(original[zero].mean().item(), rel=0.1)


def test_a_threshold_that_lies_below_every_level_selects_nothing_and_says_so():
    with pytest.raises(SelectionError, match="selects no weight"):
        fallow.SaRA(network(quantised="int8"), threshold=1e-9, include="weight")


def test_disabling_shows_the_code_and_scaling_the_way_between(trained):
    model, optimizer = trained
    codes = {name: weight.store.dense(torch.float32, trained=False) for name, weight in stored(model)}
    own = {name: weight.dense().detach() for name, weight in stored(model)}
    with optimizer.disabled():
        assert all(torch.equal(weight.dense(), codes[name]) for name, weight in stored(model))
    optimizer.set_scale(0.5)
    for name, weight in stored(model):
        torch.testing.assert_close(weight.dense().detach(), (codes[name] + own[name]) / 2)
    optimizer.set_scale(1.0)
    assert all(torch.equal(weight.dense(), own[name]) for name, weight in stored(model))


def test_what_is_kept_for_an_entry_is_its_value_and_a_byte_of_its_index(trained):
    model, optimizer = trained
    slot = optimizer.slots["2.weight"]
    entries = slot.trained.numel()
    assert slot.nbytes < 1.2 * entries  # no first values: the code gives them
    ((_, weight),) = [(name, weight) for name, weight in stored(model) if name == "2.weight"]
    code = sum(part.nbytes for part in weight.store.parts.values())
    assert weight.store.nbytes == code + slot.nbytes + 4 * entries
    assert weight.store.index is slot._index


def test_a_step_holds_one_dense_weight_and_one_dense_gradient_at_a_time():
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(6)))
    quantize_(model, "nf4")
    optimizer = fallow.SaRA(model, fraction=0.02, lr=1e-3)
    x = torch.randn(2, 512)

    def step():
        model(x).square().mean().backward()
        optimizer.step()

    step()
    held = [part for _, weight in stored(model) for part in (*weight.store.parts.values(), weight.store.values)]
    with LiveBytes(x, *held) as live:
        step()
    dense = 512 * 512 * 4
    assert dense < live.peak < 2.2 * dense
    assert live.now < 0.2 * dense  # the compact gradients


def test_after_a_re_selection_the_masters_are_followed_without_making_the_weight_dense(monkeypatch):
    model = network(torch.bfloat16, "nf4")
    optimizer = fallow.SaRA(model, fraction=0.3, lr=1e-2, reselect_at=2)
    train(model, optimizer, 3)
    narrowed = [slot for slot in optimizer.slots.values() if slot.live is not None and isinstance(slot, SideSlot)]
    assert narrowed
    expected = [slot.weight.dense().view(-1)[slot.trained.long()] for slot in narrowed]
    made = []
    monkeypatch.setattr(Store, "dense", lambda *_: made.append(1))
    for slot, values in zip(narrowed, expected, strict=True):
        slot.refresh()
        assert torch.equal(gather(slot.weight, slot.trained), values)
    assert not made


def test_a_resumed_optimizer_goes_on_bit_for_bit(trained):
    model, optimizer = trained
    again = network(quantised="nf4")
    resumed = fallow.SaRA(again, fraction=0.1, lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 2)
    train(again, resumed, 2)
    for (name, ours), (_, theirs) in zip(stored(model), stored(again), strict=True):
        assert torch.equal(ours.dense(), theirs.dense()), name


def test_an_adapter_comes_back_onto_the_same_codes(trained, tmp_path):
    model, optimizer = trained
    path = optimizer.save(tmp_path / "style.safetensors", store="value")
    with torch.no_grad():
        own = model(batch())
        again = network(quantised="nf4")
        fallow.SaRA(again, fraction=0.1, lr=1e-2).load(path)
        assert torch.equal(again(batch()), own)
        other = network(quantised="nf4")
        Adapters(other).add("style", path)
        assert torch.equal(other(batch()), own)


@pytest.mark.parametrize(("mode", "most"), [("int8", 0.02), ("fp8", 0.12), ("nf4", 0.35)])
def test_an_adapter_fits_the_full_precision_base_up_to_the_error_of_its_code(mode, most, tmp_path):
    model = network(quantised=mode)
    optimizer = fallow.SaRA(model, fraction=0.1, lr=1e-2)
    train(model, optimizer)
    path = optimizer.save(tmp_path / "style.safetensors")
    full = network()
    Adapters(full).add("style", path)  # known by the fingerprints of the weights before they were coded
    with torch.no_grad():
        ours, theirs, before = full(batch()), model(batch()), network()(batch())
        error = (ours - theirs).norm() / theirs.norm()
        codes = (network(quantised=mode)(batch()) - before).norm() / before.norm()
    assert error < most
    assert error < 3 * codes  # about what the code itself costs
    change = {name: entry.values for name, entry in SparseDelta.load(path).entries.items()}
    assert torch.equal(full[2].weight.flatten()[optimizer.slots["2.weight"].index.long()].detach(),
                       network()[2].weight.flatten()[optimizer.slots["2.weight"].index.long()].detach()
                       + change["2.weight"])  # fmt: skip


def test_the_file_says_what_stood_for_the_base(trained, tmp_path):
    _, optimizer = trained
    path = optimizer.save(tmp_path / "style.safetensors")
    assert SparseDelta.load(path).metadata["base_kept_as"] == ["fp8", "nf4"]
    assert read_tensors(path)
    plain = fallow.SaRA(network(), fraction=0.1, lr=1e-2)
    assert "base_kept_as" not in plain.metadata


def test_shira_and_other_rules_train_beside_codes():
    model = network(quantised="fp8")
    twin = dense_twin(model)
    for one in (model, twin):
        rule = fallow.SHiRA(one, mask="rand", r=2, lr=1e-2, include=["2.weight", "4.weight"])
        train(one, rule)
    for name, weight in stored(model):
        torch.testing.assert_close(weight.dense().detach(), twin.get_parameter(name).detach(), rtol=1e-5, atol=1e-6)


def test_equal_layers_get_equal_shares_of_the_smallest_entries_though_many_codes_are_zero():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(4)))
    quantize_(model, "nf4")
    zeros = [(weight.dense() == 0).float().mean().item() for _, weight in stored(model)]
    assert min(zeros) > 0.03  # by the levels alone the first layer's zeros would be all that is chosen
    shares = [chosen / 128**2 for chosen, _ in fallow.SaRA(model, fraction=0.01, lr=1e-3).selected().values()]
    assert max(shares) < 1.5 * min(shares)


@pytest.mark.parametrize("method", [fallow.SaRA, fallow.SHiRA])
def test_a_second_optimizer_goes_on_from_what_the_first_has_trained(trained, method):
    model, first = trained
    first.close()
    reached = model(batch()).detach()
    options = {"fraction": 0.05} if method is fallow.SaRA else {"density": 0.05}
    second = method(model, lr=1e-2, **options)
    assert torch.equal(model(batch()), reached)
    train(model, second, 2)
    moved = model(batch()).detach()
    assert not torch.equal(moved, reached)
    with second.disabled():
        assert torch.equal(model(batch()), reached)
    state = second.state_dict()
    second.load_state_dict(state)
    assert torch.equal(model(batch()), moved)


def test_an_adapter_trained_upon_another_is_refused_where_that_is_missing(trained, tmp_path):
    model, first = trained
    first.close()
    second = fallow.SaRA(model, fraction=0.05, lr=1e-2)
    train(model, second, 2)
    second.save(tmp_path / "upon.safetensors")
    reached = model(batch()).detach()
    second.load(tmp_path / "upon.safetensors")  # onto what it was trained on
    torch.testing.assert_close(model(batch()), reached, rtol=0, atol=1e-5)
    fresh = network(quantised="nf4")
    with pytest.raises(AdapterError, match="base"):
        fallow.Adapters(fresh).add("upon", tmp_path / "upon.safetensors")
