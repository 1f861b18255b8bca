"""Weights kept in 4 and 8 bits: codes against plain references, layers against dense ones, bytes counted."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from fallow.analysis.memory import LiveBytes
from fallow.core.errors import ConfigError, ModelError
from fallow.core.files import fingerprint, matches
from fallow.core.quantized import quantize_, stored
from fallow.core.weight_codes import CODES, NF4, decode_maxima, decode_nf4, encode_maxima, nf4_codes, pack

MODES = ("fp8", "int8", "nf4")


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 32, 3, padding=1, stride=2), nn.Conv2d(32, 128, 1), nn.Flatten(), nn.Linear(2048, 64)]
    return nn.Sequential(*layers, nn.GELU(), nn.Linear(64, 64, bias=False)).to(dtype)


def dense_twin(model):
    """The same network with the weights that the codes stand for, dense."""
    twin = network(next(model.parameters()).dtype)
    for name, weight in stored(model):
        twin.get_parameter(name).data = weight.dense().detach()
    return twin


def batch(dtype=torch.float32):
    return torch.randn(3, 8, 8, 8, dtype=dtype)


def rows(matrix, codes, top):
    """The equations of fp8 and int8, entry by entry in float64."""
    scale = (matrix.double().abs().amax(1, keepdim=True) / top).float().double()
    return codes(matrix.double() / scale).double() * scale


def test_int8_is_the_nearest_of_255_levels_of_its_row():
    matrix = torch.randn(6, 50)
    out = torch.empty(6, 50)
    CODES["int8"].decode(CODES["int8"].encode(matrix), out)
    torch.testing.assert_close(out.double(), rows(matrix, torch.round, 127.0), rtol=1e-6, atol=1e-7)
    step = matrix.abs().amax(1, keepdim=True) / 127
    assert ((out - matrix).abs() <= step / 2 * 1.001).all()


def test_fp8_errs_by_at_most_a_sixteenth_of_a_value_and_a_thousandth_of_a_step_near_zero():
    matrix = torch.randn(6, 500)
    out = torch.empty(6, 500)
    CODES["fp8"].decode(CODES["fp8"].encode(matrix), out)
    scale = matrix.abs().amax(1, keepdim=True) / 448
    assert ((out - matrix).abs() <= torch.maximum(matrix.abs() / 16, scale * 2**-10) * 1.001).all()
    torch.testing.assert_close(out.abs().amax(1), matrix.abs().amax(1))  # the largest of a row is a level


def test_a_row_of_zeros_stays_one_in_every_code():
    for mode in MODES:
        out = torch.ones(64, 64)
        CODES[mode].decode(CODES[mode].encode(torch.zeros(64, 64)), out)
        assert not out.any()


def test_nf4_takes_the_nearest_level_of_its_block():
    matrix = torch.randn(4, 160)
    parts = CODES["nf4"].encode(matrix)
    out = torch.empty(4, 160)
    CODES["nf4"].decode(parts, out)
    blocks, largest = matrix.view(-1, 64), decode_maxima(parts)[:, None]
    levels = torch.tensor(NF4) * largest[..., None]
    nearest = levels.expand(10, 64, 16).gather(2, (blocks[..., None] - levels).abs().argmin(-1, keepdim=True))[..., 0]
    torch.testing.assert_close(out.view(-1, 64), nearest)
    assert (decode_maxima(parts) - blocks.abs().amax(1)).abs().max() < 0.004 * largest.max()


def test_nf4_codes_and_values_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 128)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    largest = weight.view(-1, 64).abs().amax(1)
    torch.testing.assert_close(state.absmax, largest)
    ours = pack(nf4_codes(weight.view(-1, 64) / largest[:, None]).view(-1))
    assert (ours == theirs.view(-1)).float().mean() > 0.999  # a value in the middle of two levels may take either
    out = torch.empty_like(weight)
    decode_nf4(theirs.view(-1), largest, out.view(-1))
    expected = functional.dequantize_4bit(theirs, state)
    assert (out - expected).abs().max() <= 1e-6 * weight.abs().max()


def test_nf4_decodes_any_number_of_entries_over_its_chunks(monkeypatch):
    from fallow.core import weight_codes

    matrix = torch.randn(7, 1001)
    parts = CODES["nf4"].encode(matrix)
    whole, pieces = torch.empty(7, 1001), torch.empty(7, 1001)
    CODES["nf4"].decode(parts, whole)
    monkeypatch.setattr(weight_codes, "CHUNK", 128)
    CODES["nf4"].decode(parts, pieces)
    assert torch.equal(whole, pieces)
    assert ((whole - matrix).abs() <= 0.16 * matrix.abs().max()).all()  # half of the widest gap between levels


def test_maxima_keep_their_range_in_groups_of_256():
    largest = torch.rand(600) + torch.arange(600) // 256
    parts = encode_maxima(largest)
    assert (decode_maxima(parts) - largest).abs().max() <= 0.5 / 255 * 1.01
    assert sum(part.nbytes for part in parts.values()) == 600 + 3 * 8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_give_the_outputs_and_gradients_of_dense_ones(mode, dtype):
    model = network(dtype)
    assert quantize_(model, mode, min_size=2000) == ["0.weight", "1.weight", "3.weight", "5.weight"]
    twin = dense_twin(model)
    x, y = batch(dtype).requires_grad_(), None
    gradients = []
    for one in (model, twin):
        x.grad = None
        y = one(x)
        y.float().square().sum().backward()
        gradients.append([x.grad, *(param.grad for param in one.parameters())])
    torch.testing.assert_close(model(x), y)
    for ours, theirs in zip(*gradients, strict=True):
        assert type(ours) is torch.Tensor
        torch.testing.assert_close(ours, theirs)


def test_frozen_codes_keep_neither_weights_nor_inputs_for_the_backward_pass():
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4)))
    quantize_(model, "nf4")
    model.requires_grad_(False)
    parts = [part for _, weight in stored(model) for part in weight.store.parts.values()]
    x = torch.randn(2, 512, requires_grad=True)
    model(x).sum().backward()  # what torch makes once
    with LiveBytes(x, *parts) as live:
        y = model(x).sum()
        kept = live.now
        y.backward()
    dense = 512 * 512 * 4
    assert kept < 0.1 * dense
    assert dense < live.peak < 1.8 * dense  # one layer's weight at a time, its maxima and the pieces on their way


@pytest.mark.parametrize(("mode", "most"), [("fp8", 1.05), ("int8", 1.05), ("nf4", 0.56)])
def test_bytes_for_a_weight(mode, most):
    model = nn.Linear(512, 512)
    quantize_(model, mode)
    ((_, weight),) = stored(model)
    assert weight.store.nbytes / weight.numel() <= most


def test_spatial_convolutions_are_kept_in_8_bits_where_matrices_take_4():
    model = network()
    quantize_(model, "nf4", min_size=2000)
    assert [weight.store.mode for _, weight in stored(model)] == ["fp8", "nf4", "nf4", "nf4"]


def test_autocast_takes_a_stored_weight_as_it_takes_a_dense_one():
    model = network()
    quantize_(model, "fp8", min_size=2000)
    twin, x = dense_twin(model), batch()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(x), twin(x)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)


def test_names_classes_and_parameters_stay_and_a_second_copy_is_its_own():
    model = network()
    names = list(model.state_dict())
    quantize_(model, "int8", min_size=2000)
    assert list(model.state_dict()) == names
    assert type(model[3]) is nn.Linear
    assert isinstance(model[3].weight, nn.Parameter)
    assert model[3].weight.shape == (64, 2048)
    twin = copy.deepcopy(model)
    assert twin[3].weight.store is not model[3].weight.store
    twin.load_state_dict(network().state_dict())  # dense weights are coded anew
    assert torch.equal(twin[3].weight.dense(), model[3].weight.dense())
    with torch.no_grad():
        twin[3].weight.copy_(torch.zeros(64, 2048))
    assert not twin[3].weight.dense().any()
    twin.load_state_dict(model.state_dict())  # codes are taken over
    assert torch.equal(twin[3].weight.dense(), model[3].weight.dense())


def test_a_cast_model_acts_in_the_other_dtype_from_the_same_codes():
    model = network()
    quantize_(model, "nf4", min_size=2000)
    before = model[3].weight.dense()
    model.to(torch.bfloat16)
    assert model[3].weight.dtype == torch.bfloat16
    assert torch.equal(model[3].weight.dense(), before.bfloat16())
    assert model(batch(torch.bfloat16)).dtype == torch.bfloat16


def test_a_code_is_known_by_the_weight_that_it_stands_for():
    model, full = network(), network()
    told = fingerprint(full[3].weight)
    quantize_(model, "nf4", min_size=2000)
    assert fingerprint(model[3].weight) == told
    assert matches(told, model[3].weight)
    assert not matches(fingerprint(full[5].weight), model[3].weight)


def test_other_operations_see_the_dense_weight():
    model = network()
    quantize_(model, "fp8", min_size=2000)
    weight = model[5].weight
    dense = weight.dense().detach()
    assert torch.equal(weight.abs().sum(1), dense.abs().sum(1))
    assert torch.equal((torch.eye(64) @ weight).detach(), dense)
    assert type((weight + 0).detach()) is torch.Tensor


@pytest.mark.parametrize("mode", MODES)
def test_lora_of_peft_trains_beside_codes_as_beside_dense_weights(mode):
    losses = []
    base = network()
    quantize_(base, mode, min_size=2000)
    for model in (base, dense_twin(base)):
        torch.manual_seed(1)
        model.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=4, target_modules=["1", "3", "5"]), model)
        rule = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        torch.manual_seed(2)
        x = batch()
        for _ in range(3):
            loss = model(x).square().mean()
            loss.backward()
            rule.step()
            rule.zero_grad()
            losses.append(loss.item())
    assert losses[2] < losses[0]
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)


def test_what_would_write_into_a_code_is_refused():
    model = network()
    quantize_(model, "nf4", min_size=2000)
    with pytest.raises(ModelError, match=r"kept as nf4 cannot be written.*SaRA"):
        model[3].weight.data.mul_(2)
    model(batch()).sum().backward()
    with pytest.raises(ModelError, match="cannot be written"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(ModelError, match="cannot be pickled"):
        pickle.dumps(model[3].weight)


def test_what_cannot_be_quantised_is_named_before_anything_is():
    model = network()
    with pytest.raises(ConfigError, match=r"mode='nf5'.*nf4"):
        quantize_(model, "nf5")
    with pytest.raises(ConfigError, match="exclude='head' matches no weight"):
        quantize_(model, "nf4", exclude="head")
    with pytest.raises(ConfigError, match="regular expression"):
        quantize_(model, "nf4", include="(")
    with pytest.raises(ModelError, match="no linear layer or convolution of 1000000"):
        quantize_(model, "nf4", min_size=1000000)
    assert not list(stored(model))
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["3"]), model)
    with pytest.raises(ModelError, match=r"'3' has an adapter.*quantise the base first"):
        quantize_(model, "nf4")


def test_patterns_choose_and_weights_tied_to_an_embedding_stay_dense():
    model = network()
    assert quantize_(model, "fp8", include=r"^[35]", exclude="5", min_size=2000) == ["3.weight"]
    tied = nn.Sequential(nn.Embedding(128, 64), nn.Linear(64, 128), nn.Linear(128, 64))
    tied[1].weight = tied[0].weight
    assert quantize_(tied, "fp8") == ["2.weight"]
    both = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    both[1].weight = both[0].weight
    assert quantize_(both, "fp8") == ["0.weight"]
    assert both[0].weight is both[1].weight
