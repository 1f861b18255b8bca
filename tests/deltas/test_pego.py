"""PEGO: a group of LoRAs and its two penalties, against their dense forms."""

from __future__ import annotations

import copy
from itertools import combinations

import pytest
import torch
from one_layer import LAYERS, OneLayer, inputs
from torch import nn

import fallow
from fallow.core.errors import ConfigError
from fallow.deltas.pego import PEGO
from fallow.objectives import orthogonality as terms

each = pytest.mark.parametrize("kind", LAYERS)
sides = pytest.mark.parametrize("side", ["input", "output"])
norms = pytest.mark.parametrize("norm", ["l1", "fro2"])


def on(layer, **given):
    return OneLayer(layer, PEGO, **{"rank": 2, "group": 3, **given})


def modules(delta):
    """The dense B_i A_i."""
    r = delta.o.rank
    return [delta.B[:, i * r : (i + 1) * r] @ delta.A[i * r : (i + 1) * r] for i in range(delta.o.group)]


def dense_penalties(w, delta):
    def size(matrix):
        return matrix.abs().sum() if delta.o.norm == "l1" else matrix.square().sum()

    def meet(one, other):
        return one @ other.T if delta.o.side == "input" else one.T @ other

    parts = modules(delta)
    preserve = sum(size(meet(w, part)) for part in parts)
    diversify = sum((size(meet(one, other)) for one, other in combinations(parts, 2)), torch.zeros(()).to(w))
    return preserve, diversify


@each
def test_values_and_gradients_equal_the_sum_of_modules_and_the_start_is_the_base(kind):
    layer = LAYERS[kind]().double()
    model, x = on(layer), inputs(layer)
    assert torch.equal(model(x), layer(x))
    delta = model.delta
    assert delta.parameter_count(model.view.shape, delta.o) == sum(p.numel() for p in delta.parameters())
    delta.randomize()
    changed = model.view.read(layer.weight) + sum(modules(delta))
    wanted = model.view.op(x, changed, getattr(layer, "bias", None))
    upstream = torch.randn_like(wanted)
    expected = torch.autograd.grad((wanted * upstream).sum(), [delta.A, delta.B])
    got = model(x)
    assert torch.allclose(got, wanted, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad((got * upstream).sum(), [delta.A, delta.B]), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-11)


@norms
@sides
@each
def test_penalties_and_their_gradients_equal_the_dense_forms(kind, side, norm, monkeypatch):
    monkeypatch.setattr(terms, "CPU_TILE", (7, 9))  # several tiles, the last ones shorter
    layer = LAYERS[kind]().double()
    model = on(layer, side=side, norm=norm)
    delta = model.delta
    delta.randomize()
    got, wanted = delta.penalties(), dense_penalties(model.view.read(layer.weight), delta)
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10)
        grads = [torch.autograd.grad(term, [delta.A, delta.B], retain_graph=True) for term in (ours, theirs)]
        for one, other in zip(*grads, strict=True):
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)
    assert torch.allclose(delta.loss(), 1e-3 * sum(wanted), rtol=1e-10)
    grads = [torch.autograd.grad(2 * term, [delta.A, delta.B]) for term in (delta.loss(), 1e-3 * sum(wanted))]
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-14)
    delta.A.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(2 * delta.loss(), delta.B)[0], grads[0][1])
    with torch.no_grad():
        assert torch.allclose(delta.loss(), 1e-3 * sum(wanted), rtol=1e-10)


def test_between_forward_and_backward_the_penalty_keeps_its_gradients_alone():
    model = on(nn.Linear(96, 64), rank=2, group=4)
    model.delta.randomize()
    node = model.delta.loss().grad_fn.next_functions[0][0]
    assert [tuple(t.shape) for t in node.saved_tensors] == [(8, 96), (64, 8)]
    assert [type(before).__name__ for before, _ in node.next_functions if before] == ["AccumulateGrad"] * 2


@norms
def test_penalties_and_their_gradients_are_zero_at_the_start(norm):
    delta = on(nn.Linear(12, 20), norm=norm).delta
    loss = delta.loss()
    assert loss == 0
    assert all(grad.abs().max() == 0 for grad in torch.autograd.grad(loss, [delta.A, delta.B]))


def test_a_group_without_penalty_is_one_lora_of_its_ranks_together():
    layer = nn.Linear(12, 20)
    model = on(layer, orthogonality=0)
    assert model.delta.loss() is None
    a, b = (nn.Parameter(t.detach().clone()) for t in (model.delta.A, model.delta.B))
    one, two = torch.optim.Adam(model.delta.parameters(), 1e-2), torch.optim.Adam([a, b], 1e-2)
    for _ in range(20):
        x = torch.randn(8, 12)
        for optimizer, out in ((one, model(x)), (two, layer(x) + x @ a.T @ b.T)):
            optimizer.zero_grad()
            (out - 1).square().mean().backward()
            optimizer.step()
    assert torch.allclose(model.delta.A, a, atol=1e-5)
    assert torch.allclose(model.delta.B, b, atol=1e-5)


@each
def test_merged_equals_unmerged_at_any_scale(kind):
    layer = LAYERS[kind]()
    model, x = on(layer), inputs(layer)
    model.delta.randomize()
    for scale in (1.0, 0.4):
        model.scale = scale
        assert torch.allclose(model(x), model.by_merged(x), atol=1e-5)


def test_a_vit_b_has_the_papers_number_of_parameters():
    options = PEGO.Options()
    assert 12 * 2 * PEGO.parameter_count((768, 768), options) == 589_824
    assert 12 * 2 * PEGO.parameter_count((768, 768), PEGO.Options(group=2)) == 294_912


def test_updates_in_the_null_space_of_w_cost_nothing_and_w_itself_costs_its_gram():
    layer = nn.Linear(12, 20, bias=False).double()
    u, s, v = torch.linalg.svd(layer.weight.data, full_matrices=False)
    layer.weight.data = u[:, :6] * s[:6] @ v[:6]
    delta = on(layer, rank=6, group=1).delta
    with torch.no_grad():
        delta.A.copy_(v[6:])
        delta.B.copy_(torch.randn(20, 6))
    assert delta.penalties()[0] < 1e-10
    with torch.no_grad():
        delta.A.copy_(v[:6])
        delta.B.copy_(u[:, :6] * s[:6])
    w = layer.weight
    assert torch.allclose(delta.penalties()[0], (w @ w.T).abs().sum())
    assert delta.penalties()[1] == 0  # one module has no other


def test_modules_on_disjoint_inputs_are_diverse():
    delta = on(nn.Linear(12, 20), rank=2, group=2).delta
    with torch.no_grad():
        delta.B.normal_()
        delta.A.zero_()
        delta.A[:2, :6] = torch.randn(2, 6)
        delta.A[2:, 6:] = torch.randn(2, 6)
    assert delta.penalties()[1] == 0
    with torch.no_grad():
        delta.A[2:, :6] = 1
    assert delta.penalties()[1] > 1


def test_the_penalty_lowers_overlap_with_the_base_and_between_modules():
    def train(penalty):
        torch.manual_seed(0)
        layer = nn.Linear(24, 24)
        model = on(layer, orthogonality=penalty)
        target = layer.weight @ torch.randn(24, 24) / 5
        optimizer = torch.optim.Adam(model.delta.parameters(), 1e-2)
        for _ in range(100):
            x = torch.randn(64, 24)
            optimizer.zero_grad()
            loss = (model(x) - x @ target.T).square().mean()
            loss = loss if model.delta.loss() is None else loss + model.delta.loss()
            loss.backward()
            optimizer.step()
        parts, w = [part.detach() for part in modules(model.delta)], layer.weight
        change = sum(parts)
        overlap = float((w @ change.T).norm() / w.norm() / change.norm())
        pairs = [float((one @ other.T).norm() / one.norm() / other.norm()) for one, other in combinations(parts, 2)]
        return overlap, sum(pairs) / len(pairs)

    none, some, much = (train(penalty) for penalty in (0.0, 3e-4, 1e-2))
    assert none[0] > some[0] > much[0]
    assert none[1] > 1.2 * some[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_bases_have_a_finite_penalty_equal_to_that_of_float32(dtype):
    layer = nn.Linear(512, 512).to(dtype)
    layer.weight.data.fill_(1.0)
    model = on(layer, rank=4)
    model.delta.randomize()
    model.delta.A.data += 1
    with torch.autocast("cpu", torch.bfloat16):
        preserve, diversify = model.delta.penalties()
    wanted = dense_penalties(layer.weight.float(), model.delta)
    assert preserve.dtype == torch.float32
    assert preserve > 65504
    assert torch.allclose(preserve, wanted[0], rtol=1e-4)
    assert torch.allclose(diversify, wanted[1], rtol=1e-4)
    x = torch.randn(2, 512, dtype=dtype)
    assert model(x).dtype == dtype


def test_the_penalty_makes_no_matrix_as_large_as_the_weight(peak_bytes, monkeypatch):
    monkeypatch.setattr(terms, "CPU_TILE", (128, 128))
    model = on(nn.Linear(512, 512, bias=False), rank=4, group=4)
    model.delta.randomize()
    whole = 512 * 512 * 4
    assert peak_bytes(lambda: dense_penalties(model.layer.weight, model.delta)[1].backward()) > 4 * whole
    model.delta.zero_grad()
    assert peak_bytes(lambda: model.delta.loss().backward()) < whole


def test_the_weight_is_read_when_the_penalty_is_asked_for():
    layer = nn.Linear(12, 20)
    model = on(layer)
    model.delta.randomize()
    before = model.delta.penalties()[0]
    layer.weight.data = 2 * layer.weight.data
    assert torch.allclose(model.delta.penalties()[0], 2 * before)


def test_a_host_adds_the_penalty_to_the_gradient_of_an_optimizers_step():
    def gradient(orthogonality):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 20))
        fallow.attach(net, "pego", ["0"], rank=2, group=2, orthogonality=orthogonality)
        (delta,) = (module for module in net.modules() if isinstance(module, PEGO))
        delta.randomize()
        net(torch.ones(3, 12)).sum().backward()
        before = delta.B.grad.clone()
        torch.optim.SGD([delta.A, delta.B], lr=0.0).step()
        wanted = torch.autograd.grad(delta.loss(), delta.B)[0] if orthogonality else torch.zeros_like(before)
        return delta.B.grad - before, wanted

    for orthogonality in (0.0, 0.5):
        added, wanted = gradient(orthogonality)
        assert torch.allclose(added, wanted, rtol=1e-4, atol=1e-4)
        assert bool(added.abs().max() > 0.1) == bool(orthogonality)


def test_a_saved_state_goes_on_bit_for_bit():
    layer = nn.Linear(12, 20)

    def steps(model, optimizer, batches):
        for x in batches:
            optimizer.zero_grad()
            ((model(x) - 1).square().mean() + model.delta.loss()).backward()
            optimizer.step()

    batches = torch.randn(6, 5, 12)
    first, second = on(layer), on(layer)
    one = torch.optim.Adam(first.delta.parameters(), 1e-2)
    steps(first, one, batches[:3])
    second.delta.load_state_dict(first.delta.state_dict())
    two = torch.optim.Adam(second.delta.parameters(), 1e-2)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    steps(first, one, batches[3:])
    steps(second, two, batches[3:])
    assert torch.equal(first.delta.A, second.delta.A)
    assert torch.equal(first.delta.B, second.delta.B)
    assert first.delta.state_dict().keys() == {"A", "B"}


def test_bad_options_are_refused_by_name():
    bad = [
        ({"rank": 0}, "rank=0"),
        ({"group": 0}, "group=0"),
        ({"orthogonality": -1.0}, "orthogonality=-1.0"),
        ({"side": "left"}, "side='left'"),
        ({"norm": "l2"}, "norm='l2'"),
        ({"rank": 5, "group": 3}, r"group=3 times rank=5 is above what 'layer' of \(20, 12\)"),
    ]
    for given, message in bad:
        with pytest.raises(ConfigError, match=message):
            on(nn.Linear(12, 20), **given)
