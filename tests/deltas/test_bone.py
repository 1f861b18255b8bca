"""Bone: MiSS, mini and Bat against their equations and against PEFT's own MiSS."""

from __future__ import annotations

import copy

import pytest
import torch
from one_layer import LAYERS, OneLayer, inputs
from peft import MissConfig, get_peft_model
from torch import nn

from fallow.core.delta import make_options
from fallow.core.errors import ConfigError
from fallow.deltas.bone import Bone

KINDS = [
    {"rank": 4},
    {"rank": 5},  # divides no layer here
    {"rank": 9},  # the size of a 3x3 kernel: channels are summed
    {"rank": 4, "kind": "mini", "mini_rank": 2},
    {"rank": 4, "kind": "bat"},
    {"rank": 4, "kind": "bat", "group": "in"},
]
both = pytest.mark.parametrize("given", KINDS, ids=str)
each = pytest.mark.parametrize("kind", LAYERS)


def reference(w, delta):
    """W' of W by loops over the equations."""
    options, new = delta.o, w.clone()
    out, width = w.shape
    if options.kind == "bat":
        r = options.rank
        for j in range(out // r):
            for m in range(width // r):
                b = delta.blocks[j if options.group == "out" else m]
                block = w[j * r : (j + 1) * r, m * r : (m + 1) * r]
                new[j * r : (j + 1) * r, m * r : (m + 1) * r] = block @ (torch.eye(r).to(w) + b) + b
        return new
    r, q = delta.shared_block.shape
    change = [[delta.shared_block[c % r, a % q] for c in range(width)] for a in range(out)]
    return w + torch.stack([torch.stack(row) for row in change])


@both
@each
def test_values_and_gradients_equal_the_equations_on_every_layer(kind, given):
    layer = LAYERS[kind]().double()
    model, x = OneLayer(layer, Bone, **given), inputs(layer)
    assert torch.equal(model(x), layer(x))
    model.delta.randomize()
    if x.is_floating_point():
        x.requires_grad_()
    wanted = model.view.op(x, reference(model.view.read(layer.weight), model.delta), getattr(layer, "bias", None))
    upstream = torch.randn_like(wanted)
    params = [*model.delta.parameters(), *([x] if x.is_floating_point() else [])]
    expected = torch.autograd.grad((wanted * upstream).sum(), params)
    got = model(x)
    assert torch.allclose(got, wanted, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad((got * upstream).sum(), params), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-11)


@both
@each
def test_merged_equals_unmerged_at_any_scale_and_the_inverse_brings_w_back(kind, given):
    layer = LAYERS[kind]()
    model, x = OneLayer(layer, Bone, **given), inputs(layer)
    model.delta.randomize()
    for scale in (1.0, 0.3):
        model.scale = scale
        assert torch.allclose(model(x), model.by_merged(x), atol=1e-5)
    model.scale = 1.0
    back = model.delta.inverse(model.merged())
    assert torch.allclose(back, model.view.read(layer.weight), atol=1e-5)
    assert not torch.allclose(model(x), layer(x), atol=1e-2)


@both
@each
def test_the_formula_counts_what_is_trained(kind, given):
    model = OneLayer(LAYERS[kind](), Bone, **given)
    count = sum(p.numel() for p in model.delta.parameters())
    assert count == model.delta.parameter_count(model.view.shape, model.delta.o)


def test_the_counts_are_those_of_the_paper():
    bone = Bone
    assert bone.parameter_count((256, 128), make_options(bone, {"rank": 64})) == 64 * 256
    assert bone.parameter_count((256, 128), make_options(bone, {"rank": 64, "kind": "bat"})) == 4 * 64**2
    assert bone.parameter_count((256, 128), make_options(bone, {"kind": "mini", "mini_rank": 32})) == 64 * 32


def test_ranks_of_the_change_are_those_of_the_equations():
    def rank_of(**given):
        layer = nn.Linear(24, 36, dtype=torch.float64)
        model = OneLayer(layer, Bone, **given)
        model.delta.randomize()
        return int(torch.linalg.matrix_rank(model.merged() - layer.weight))

    assert rank_of(rank=6) == 6
    assert rank_of(rank=6, kind="mini", mini_rank=4) == 4
    assert rank_of(rank=6, kind="bat") == 24


def test_factors_give_the_change_exactly_where_there_are_any():
    for given in KINDS[:4]:
        model = OneLayer(nn.Linear(22, 20), Bone, **given)
        model.delta.randomize()
        b, a = model.delta.factors()
        assert model.delta.exact
        assert torch.equal(b @ a, model.delta.delta_weight())
    bat = OneLayer(nn.Linear(12, 20), Bone, rank=4, kind="bat").delta
    assert (bat.exact, bat.mode, bat.mergeable) == (False, "weight", True)
    with pytest.raises(ConfigError, match="'bone' is no product"):
        bat.factors()


def test_the_gradient_of_d_is_the_dense_gradient_summed_over_shards():
    layer, x = nn.Linear(10, 6, dtype=torch.float64), torch.randn(7, 10, dtype=torch.float64)
    model = OneLayer(layer, Bone, rank=4)
    upstream = torch.randn(7, 6, dtype=torch.float64)
    (model(x) * upstream).sum().backward()
    dense = upstream.T @ x  # (out, in)
    summed = sum(dense[:, c : c + 1].T * (torch.arange(4) == c % 4)[:, None] for c in range(10))
    assert torch.allclose(model.delta.shared_block.grad, summed, atol=1e-12)


def test_whole_shards_may_change_places_and_features_within_them_may_not():
    model = OneLayer(nn.Linear(12, 6), Bone, rank=4)
    model.delta.randomize()
    x = torch.randn(5, 12)
    swapped = x.view(5, 3, 4)[:, [2, 0, 1]].reshape(5, 12)
    turned = x.view(5, 3, 4)[:, :, [1, 0, 2, 3]].reshape(5, 12)
    assert torch.allclose(model.delta.delta_forward(x), model.delta.delta_forward(swapped), atol=1e-6)
    assert (model.delta.delta_forward(x) - model.delta.delta_forward(turned)).abs().max() > 0.05


def test_the_gradient_norm_at_the_start_is_several_times_that_of_lora():
    torch.manual_seed(0)
    w, x = torch.randn(96, 96) / 10, torch.randn(400, 96)
    target = x @ torch.randn(96, 96) / 10
    layer = nn.Linear(96, 96, bias=False)
    layer.weight.data = w
    model = OneLayer(layer, Bone, rank=8)
    (model(x) - target).square().mean().backward()
    a, b = torch.empty(6, 96), torch.zeros(96, 6, requires_grad=True)
    nn.init.kaiming_uniform_(a, a=5**0.5)
    (layer(x) + x @ a.T @ b.T - target).square().mean().backward()
    assert model.delta.shared_block.grad.norm() > 5 * b.grad.norm()


PEFT = {"miss": {"init_weights": True}, "mini": {"init_weights": "mini", "mini_r": 8}, "bat": {"init_weights": "bat"}}


def pair(kind, width=48, out=64, rank=16):
    """Our layer and PEFT's, of the same tensors."""
    layer = nn.Linear(width, out)
    given = {"mini_rank": 8} if kind == "mini" else {}
    ours = OneLayer(layer, Bone, rank=rank, kind=kind, **given)
    copy = nn.Sequential(nn.Linear(width, out))
    copy[0].load_state_dict(layer.state_dict())
    theirs = get_peft_model(copy, MissConfig(r=rank, target_modules=["0"], **PEFT[kind]))
    ours.delta.randomize()
    (param,) = ours.delta.parameters()
    theirs.base_model.model[0].miss_block["default"].data.copy_(param.data)
    return ours, theirs, param


@pytest.mark.parametrize("kind", PEFT)
@pytest.mark.parametrize("width", [48, 37])
def test_the_numbers_are_those_of_peft_from_the_same_tensors(kind, width):
    if kind == "bat" and width == 37:
        return  # which does not divide
    ours, theirs, param = pair(kind, width)
    x = torch.randn(5, 7, width)
    got, wanted = ours(x), theirs(x)
    assert torch.allclose(got, wanted, atol=1e-5)
    upstream = torch.randn_like(got)
    (got * upstream).sum().backward()
    (wanted * upstream).sum().backward()
    assert torch.allclose(param.grad, theirs.base_model.model[0].miss_block["default"].grad, atol=1e-4)
    theirs.merge_adapter()
    assert torch.allclose(ours.merged(), theirs.base_model.model[0].weight, atol=1e-5)


def kept_bytes(run, x, params):
    """Bytes that the backward keeps, without x itself and the parameters."""
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(x)
    known = {tensor.untyped_storage().data_ptr() for tensor in params}
    return {place: size for place, size in seen.items() if place not in known}, out


def test_the_backward_keeps_the_shard_sum_and_not_the_input():
    ours, _, _ = pair("miss")
    x = torch.randn(1000, 48)
    kept, _ = kept_bytes(ours, x, [*ours.parameters()])
    assert x.untyped_storage().data_ptr() not in kept
    assert sum(kept.values()) == 1000 * 16 * 4


@pytest.mark.parametrize("kind", PEFT)
def test_no_more_is_kept_than_by_peft(kind, peak_bytes):
    ours, theirs, _ = pair(kind, width=256, out=256, rank=32)
    x = torch.randn(64, 256)

    def total(model):
        kept, _ = kept_bytes(model, x, [x, *model.parameters()])
        return sum(kept.values())

    assert total(ours) <= total(theirs)
    if kind == "bat":
        assert total(ours) == 0  # no second weight between forward and backward
    peaks = [peak_bytes(lambda m=m: m(x).sum().backward()) for m in (ours, theirs)]
    assert peaks[0] <= 1.05 * peaks[1]


def test_half_precision_input_is_summed_in_float32_without_overflow():
    layer = nn.Linear(4096, 8).half()
    model = OneLayer(layer, Bone, rank=4)
    model.delta.randomize()
    x = torch.full((2, 4096), 100.0).half()  # a slot's sum is 102,400, above float16's largest number
    change = model.delta.delta_forward(x)
    assert change.dtype == torch.float32
    assert torch.allclose(change, (100.0 * 1024) * model.delta.shared_block.sum(0).expand(2, 8), rtol=1e-5)
    for given in KINDS:
        bf16 = OneLayer(nn.Linear(12, 20).bfloat16(), Bone, **given)
        bf16.delta.randomize()
        x = torch.randn(3, 12).bfloat16()
        assert bf16(x).dtype == torch.bfloat16
        exact = x.float() @ reference(bf16.layer.weight.float(), bf16.delta).T + bf16.layer.bias.float()
        assert torch.allclose(bf16(x).float(), exact, rtol=0.02, atol=0.03)


def test_dropout_acts_on_the_input_in_training_only():
    model = OneLayer(nn.Linear(16, 8), Bone, rank=4, dropout=0.5)
    model.delta.randomize()
    x = torch.ones(2000, 16)
    assert not torch.equal(model(x)[0], model(x)[1])
    mean = model(x).mean(0)
    model.eval()
    assert torch.allclose(model(x).mean(0), mean, atol=0.1)
    assert torch.equal(model(x), model(x))


def test_the_padding_row_of_an_embedding_gets_no_gradient():
    layer = nn.Embedding(10, 6, padding_idx=1)
    model = OneLayer(layer, Bone, rank=10)
    model(torch.tensor([[1, 2]])).sum().backward()
    assert model.delta.shared_block.grad.sum(1).nonzero().flatten().tolist() == [2]


@both
def test_a_saved_state_goes_on_bit_for_bit(given):
    def steps(model, optimizer, batches):
        for x in batches:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    batches = torch.randn(6, 5, 12)
    layer = nn.Linear(12, 20)
    first, second = (OneLayer(layer, Bone, **given) for _ in range(2))
    one = torch.optim.AdamW(first.delta.parameters(), 1e-2)
    steps(first, one, batches[:3])
    second.delta.load_state_dict(first.delta.state_dict())
    two = torch.optim.AdamW(second.delta.parameters(), 1e-2)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    steps(first, one, batches[3:])
    steps(second, two, batches[3:])
    assert all(torch.equal(a, b) for a, b in zip(first.delta.parameters(), second.delta.parameters(), strict=True))
    assert first.delta.state_dict().keys() == {"blocks" if given.get("kind") == "bat" else "shared_block"}


def test_a_compiled_layer_has_no_graph_break():
    for kind in ("miss", "mini"):
        model = OneLayer(nn.Linear(22, 16), Bone, rank=4, kind=kind, mini_rank=8)
        model.delta.randomize()
        x = torch.randn(3, 22)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_bad_options_are_refused_by_name():
    bad = [
        ({"rank": 0}, "rank=0"),
        ({"kind": "disha"}, "kind='disha'"),
        ({"group": "rows"}, "group='rows'"),
        ({"mini_rank": 0}, "mini_rank=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"kind": "bat", "dropout": 0.1}, "dropout=0.1"),
        ({"kind": "bat", "rank": 5}, "rank=5 must divide both sides of 'layer'"),
        ({"kind": "mini", "mini_rank": 7}, "mini_rank=7 must divide the 20 outputs of 'layer'"),
    ]
    for given, message in bad:
        with pytest.raises(ConfigError, match=message):
            OneLayer(nn.Linear(12, 20), Bone, **given)


def test_gradients_of_w_itself_are_those_of_bats_equation():
    for group in ("out", "in"):
        delta = OneLayer(nn.Linear(6, 8).double(), Bone, rank=2, kind="bat", group=group).delta
        delta.randomize()
        w = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
        for upstream in (torch.ones(8, 6).double(), torch.randn(8, 6, dtype=torch.float64)):
            got = torch.autograd.grad((delta.transform(w) * upstream).sum(), [w, delta.blocks])
            wanted = torch.autograd.grad((reference(w, delta) * upstream).sum(), [w, delta.blocks])
            assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, wanted, strict=True))
