"""Hydra: both heads against their equations, in the form that merges and in the paper's with biases."""

from __future__ import annotations

import copy

import pytest
import torch
from one_layer import LAYERS, OneLayer, inputs
from torch import nn
from torch.nn import functional as F

from fallow.core.errors import ConfigError
from fallow.deltas.hydra import Hydra

each = pytest.mark.parametrize("kind", LAYERS)
heads = pytest.mark.parametrize("ranks", [(2, 3), (4, 0), (0, 3)], ids=str)
PAPERS = [{"sees_bias": True}, {"adapter_bias": True}]


def on(layer, ranks=(2, 3), scale=0.7, **given):
    return OneLayer(layer, Hydra, rank=ranks[0], sequential_rank=ranks[1], scale=scale, **given)


def changed_weight(w, d):
    new = w
    if d.o.rank:
        new = new + d.o.scale * d.parallel_up @ d.parallel_down
    if d.o.sequential_rank:
        new = new + d.o.scale * d.sequential_up @ (d.sequential_down @ w)
    return new


@heads
@each
def test_values_and_gradients_equal_the_equation_on_every_layer(kind, ranks):
    layer = LAYERS[kind]().double()
    model, x = on(layer, ranks), inputs(layer)
    delta = model.delta
    assert torch.equal(model(x), layer(x))
    delta.randomize()
    if x.is_floating_point():
        x.requires_grad_()
    params = [*delta.parameters(), *([x] if x.is_floating_point() else [])]
    weight = changed_weight(model.view.read(layer.weight), delta)
    wanted = model.view.op(x, weight, getattr(layer, "bias", None))
    upstream = torch.randn_like(wanted)
    expected = torch.autograd.grad((wanted * upstream).sum(), params)
    got = model(x)
    assert torch.allclose(got, wanted, atol=1e-12)
    assert (got - layer(x)).abs().max() > 0.01
    for ours, theirs in zip(torch.autograd.grad((got * upstream).sum(), params), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-11)


@heads
@each
def test_merged_equals_unmerged_at_any_scale(kind, ranks):
    layer = LAYERS[kind]()
    model, x = on(layer, ranks), inputs(layer)
    model.delta.randomize()
    for scale in (1.0, 0.4):
        model.scale = scale
        assert torch.allclose(model(x), model.by_merged(x), atol=1e-5)


@pytest.mark.parametrize("given", PAPERS, ids=str)
@pytest.mark.parametrize("kind", ["linear", "wide", "conv", "conv1d", "embedding"])
def test_the_papers_form_with_biases_equals_its_merged_weight_and_bias(kind, given):
    layer = LAYERS[kind]().double()
    if getattr(layer, "bias", None) is not None:
        layer.bias.data.normal_()
    model, x = on(layer, **given), inputs(layer)
    delta = model.delta
    assert torch.equal(model(x), layer(x))
    assert not delta.mergeable
    delta.randomize()
    bias = getattr(layer, "bias", None)
    weight = delta.transform(model.view.read(layer.weight))
    new = delta.new_bias(bias)
    wanted = model.view.op(x, weight, new)
    if kind == "embedding":  # which has no bias to take what is added
        wanted = wanted + new
    assert torch.allclose(model(x), wanted, atol=1e-11)
    if bias is not None:
        assert (new - bias).abs().max() > 0.01
        assert not torch.allclose(model(x), model.view.op(x, weight, bias), atol=1e-3)  # C E b would be forgotten
        assert (delta.new_bias(None) - delta.new_bias(bias)).abs().max() > 0.01


def test_in_the_papers_form_the_sequential_head_sees_the_output_with_its_bias():
    layer, x = nn.Linear(12, 20).double(), torch.randn(6, 12).double()
    model = on(layer, (0, 3), sees_bias=True)
    upstream = torch.randn(6, 20).double()
    (model(x) * upstream).sum().backward()
    expected = 0.7 * upstream.T @ (layer(x) @ model.delta.sequential_down.T)
    assert torch.allclose(model.delta.sequential_up.grad, expected)
    model.delta.randomize()
    mixing = torch.eye(20).double() + 0.7 * model.delta.sequential_up @ model.delta.sequential_down
    assert torch.allclose(model(x), layer(x) @ mixing.T)


def test_without_a_sequential_head_it_is_lora():
    layer, x = nn.Linear(12, 20).double(), torch.randn(6, 12).double()
    model = on(layer, (4, 0))
    model.delta.randomize()
    a, b = (t.detach().clone().requires_grad_() for t in (model.delta.parallel_down, model.delta.parallel_up))
    lora = layer(x) + 0.7 * (x @ a.T) @ b.T
    assert torch.allclose(model(x), lora)
    model(x).square().sum().backward()
    lora.square().sum().backward()
    assert torch.allclose(model.delta.parallel_down.grad, a.grad)
    assert torch.allclose(model.delta.parallel_up.grad, b.grad)


@pytest.mark.parametrize("ranks", [(2, 2), (4, 0), (0, 3), (4, 8)])
@pytest.mark.parametrize("biases", [False, True])
def test_the_formula_counts_what_is_trained(ranks, biases):
    model = on(nn.Linear(12, 20), ranks, adapter_bias=biases)
    count = sum(p.numel() for p in model.delta.parameters())
    assert count == model.delta.parameter_count((20, 12), model.delta.o)


def test_the_counts_are_those_of_the_paper():
    roberta = Hydra.Options(rank=4, sequential_rank=8)
    assert 12 * Hydra.parameter_count((768, 3072), roberta) == 331_776
    biased = Hydra.Options(adapter_bias=True)
    assert 12 * Hydra.parameter_count((768, 3072), biased) == 147_504
    assert 12 * sum(Hydra.parameter_count((768, width), biased) for width in (768, 3072)) == 239_712


def test_only_the_sequential_head_stays_in_the_row_space_of_w():
    layer = nn.Linear(12, 20).double()
    layer.weight.data = torch.randn(20, 3).double() @ torch.randn(3, 12).double()
    for ranks, rank in (((0, 3), 3), ((3, 0), 6)):
        model = on(layer, ranks)
        model.delta.randomize()
        change = model.merged() - layer.weight
        assert torch.linalg.matrix_rank(torch.cat([layer.weight, change])) == rank


def test_heads_and_their_ranks_are_independent():
    layer, x = nn.Linear(12, 20).double(), torch.randn(6, 12).double()
    whole = on(layer)
    whole.delta.randomize()
    parts = []
    for ranks in ((2, 0), (0, 3)):
        part = on(layer, ranks)
        part.delta.load_state_dict({k: v for k, v in whole.delta.state_dict().items() if k in part.delta.state_dict()})
        parts.append(part(x) - layer(x))
    assert torch.allclose(whole(x) - layer(x), sum(parts))
    fewer = on(layer, (2, 2))
    state = whole.delta.state_dict()
    state["sequential_up"][:, 2] = 0
    kept = {**state, "sequential_up": state["sequential_up"][:, :2], "sequential_down": state["sequential_down"][:2]}
    fewer.delta.load_state_dict(kept)
    assert torch.allclose(fewer(x), whole(x))


def test_a_bf16_base_keeps_its_dtype_and_no_float32_copy_of_its_input_or_output():
    layer = nn.Linear(64, 48).bfloat16()
    model, x = on(layer), torch.randn(500, 64).bfloat16()
    assert torch.equal(model(x), layer(x))
    model.delta.randomize()
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = (tensor.dtype, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        got = model(x)
    assert got.dtype == torch.bfloat16
    assert max(size for dtype, size in seen.values() if dtype == torch.float32) <= 500 * 5
    wanted = F.linear(x.float(), model.merged().float(), layer.bias.float())
    assert torch.allclose(got.float(), wanted, rtol=0.02, atol=0.1)


def test_no_second_weight_is_made_in_training(peak_bytes):
    model, x = on(nn.Linear(1024, 1024)), torch.randn(4, 1024)
    model.delta.randomize()
    assert peak_bytes(lambda: model(x).sum().backward()) < 1024 * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@heads
def test_the_operator_of_training_gives_what_the_forward_on_outputs_gives(dtype, ranks):
    layer = nn.Linear(700, 400).to(dtype)
    model = on(layer, ranks)
    with torch.no_grad():
        for param in model.delta.parameters():
            param.add_(0.03 * torch.randn_like(param))
    params = [*model.delta.parameters(), torch.randn(30, 700).to(dtype).requires_grad_()]
    got, y = model(params[-1]), layer(params[-1])
    wanted = model.delta.output(params[-1], y, layer.weight, layer.bias).to(dtype)
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    torch.testing.assert_close(got, wanted, **near)
    with torch.no_grad():
        assert torch.equal(model(params[-1]), wanted)
    upstream = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, params, upstream), torch.autograd.grad(wanted, params, upstream), strict=True
    ):
        assert float((ours - theirs).norm() / theirs.norm()) < (1e-5 if dtype == torch.float32 else 0.02)


def test_no_output_is_kept_for_the_backward():
    model, x = on(nn.Linear(32, 640)), torch.randn(100, 32)
    model.delta.randomize()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.numel()), t)[1], lambda t: t):
        model(x)
    assert max(seen) <= 32 * 640 < 100 * 640


def test_dropout_acts_between_the_projections_in_training_only():
    model, x = on(nn.Linear(12, 20), dropout=0.5), torch.ones(3000, 12)
    model.delta.randomize()
    assert not torch.equal(model(x)[0], model(x)[1])
    mean = model(x).mean(0)
    model.eval()
    assert torch.equal(model(x)[0], model(x)[1])
    assert torch.allclose(model(x)[0], mean, atol=0.1)


def test_a_saved_state_goes_on_bit_for_bit():
    layer = nn.Linear(12, 20)

    def steps(model, optimizer, batches):
        for x in batches:
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()

    batches = torch.randn(6, 5, 12)
    first, second = on(layer), on(layer)
    one = torch.optim.AdamW(first.delta.parameters(), 1e-2)
    steps(first, one, batches[:3])
    second.delta.load_state_dict(first.delta.state_dict())
    two = torch.optim.AdamW(second.delta.parameters(), 1e-2)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    steps(first, one, batches[3:])
    steps(second, two, batches[3:])
    assert all(torch.equal(a, b) for a, b in zip(first.delta.parameters(), second.delta.parameters(), strict=True))
    assert set(first.delta.state_dict()) == {"parallel_down", "parallel_up", "sequential_down", "sequential_up"}


def test_a_compiled_layer_has_no_graph_break():
    for given in ({}, {"adapter_bias": True}):
        model, x = on(nn.Linear(12, 20), **given), torch.randn(3, 12)
        model.delta.randomize()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_bad_options_are_refused_by_name():
    bad = [
        ({"rank": -1}, "rank=-1"),
        ({"rank": 13}, "rank=13 is above what 'layer'"),
        ({"sequential_rank": -1}, "sequential_rank=-1"),
        ({"sequential_rank": 21}, "sequential_rank=21 is above the 20 outputs of 'layer'"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"rank": 0, "sequential_rank": 0}, "leave no head"),
    ]
    for given, message in bad:
        with pytest.raises(ConfigError, match=message):
            OneLayer(nn.Linear(12, 20), Hydra, **given)
    with pytest.raises(ConfigError, match=r"dropout=0\.1 has no place in 'layer'"):
        OneLayer(LAYERS["grouped"](), Hydra, dropout=0.1)
    for given in PAPERS:
        with pytest.raises(ConfigError, match="which 'layer' does not allow"):
            OneLayer(LAYERS["grouped"](), Hydra, **given)
