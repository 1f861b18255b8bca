"""Small states and weights of low precision: sizes, means over steps, roundings, and resuming with each of them."""

from __future__ import annotations

import io

import pytest
import torch
from steps import drawn, kept, state_bytes, take
from torch import nn

from fallow.core.errors import ConfigError
from fallow.core.small_floats import M4, M8, V4, V8, decode, encode, to_bfloat16
from fallow.optim.lowrank import LowRank

FORMS = ["fp32", "bf16", "8bit", "4bit"]


@pytest.mark.parametrize("form", [M8, V8, M4, V4], ids=["M8", "V8", "M4", "V4"])
def test_a_code_stands_for_its_value_on_average_over_the_steps(form):
    x = drawn((1000,), 1)[0]
    x = x if form.signed else x.square()
    once = decode(*encode(x, form, 3), 1000, form)
    assert (once - x).norm() / x.norm() < (0.05 if form.bits == 8 else 0.35)
    mean = sum(decode(*encode(x, form, step), 1000, form) for step in range(300)) / 300
    assert (mean - x).norm() / x.norm() < 0.002
    codes, _ = encode(x, form, 0)
    assert codes.numel() == -(-1000 // form.block) * form.block * form.bits // 8


def test_zeros_are_zeros_and_what_has_no_sign_is_never_zero_beside_a_number():
    for form in (M8, V8, M4, V4):
        assert not decode(*encode(torch.zeros(300), form, 1), 300, form).any()
    for form in (V8, V4):
        x = torch.full((300,), 1e-30)
        x[0] = 1.0
        assert (decode(*encode(x, form, 1), 300, form)[: form.block] > 0).all()


@pytest.mark.parametrize("form", [M8, V8, M4, V4], ids=["M8", "V8", "M4", "V4"])
def test_every_code_stands_for_the_small_float_of_its_bits(form):
    most = 2 ** (form.exponent + form.mantissa)
    wanted = []
    for code in range(2**form.bits):
        above, part = divmod(code % most, 2**form.mantissa)
        value = (1 + part / 2**form.mantissa) * 2.0 ** (above + 1 - 2**form.exponent)
        wanted.append(0.0 if form.signed and code % most == 0 else -value if code >= most else value)
    codes = torch.arange(2**form.bits).repeat(form.block)[: form.block * -(-(2**form.bits) // form.block)]
    packed = codes.view(-1, 2, form.block // 2)
    kept_codes = codes if form.bits == 8 else (packed[:, 0] | packed[:, 1] << 4).flatten()
    scale = torch.full((codes.numel() // form.block,), form.top)
    found = decode(kept_codes.to(torch.uint8), scale, len(wanted), form)
    assert found.tolist() == wanted
    if form.signed:
        assert not decode(*encode(torch.tensor([-0.0, 1.0]), form, 0), 1, form).any()


def test_every_nan_stays_one_in_bfloat16():
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7FC00000, -1], dtype=torch.int32)
    assert to_bfloat16(bits.view(torch.float32), 3).isnan().all()


def test_bfloat16_is_rounded_to_one_of_its_neighbours_and_exact_on_average():
    x = drawn((30, 40), 1)[0]
    x[0, 0], x[0, 1] = float("inf"), float("nan")
    once = to_bfloat16(x, 5)
    assert torch.isinf(once[0, 0])
    assert torch.isnan(once[0, 1])
    finite = x[1:]
    step = finite.abs() * 2**-7
    assert ((once[1:].float() - finite).abs() <= step).all()
    mean = sum(to_bfloat16(finite, step).double() for step in range(400)) / 400
    assert (mean - finite).norm() / finite.norm() < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_the_update_with_small_states_stays_near_the_exact_one(form):
    grads = [grad + 0.5 for grad in drawn((40, 96), 30)]
    exact, small = nn.Parameter(torch.zeros(40, 96)), nn.Parameter(torch.zeros(40, 96))
    take(LowRank([exact], 1e-2, 16, basis="svd"), exact, grads)
    own = LowRank([small], 1e-2, 16, basis="svd", state_dtype=form, basis_dtype="fp32")
    take(own, small, grads)
    away = float((small - exact).norm() / exact.norm())
    assert away <= {"fp32": 0.0, "bf16": 0.01, "8bit": 0.06, "4bit": 0.4}[form]
    moments = sum(value.nbytes for key, value in kept(own, small).items() if key.startswith(("m", "v")))
    count = 16 * 96
    assert moments == {
        "fp32": 8 * count, "bf16": 4 * count, "8bit": 2 * count + 2 * 4 * count // 256,
        "4bit": count + 2 * 4 * count // 128,
    }[form]  # fmt: skip


def test_a_second_moment_in_bfloat16_moves_though_a_step_is_below_its_precision():
    param = nn.Parameter(torch.zeros(40, 96))
    own = LowRank([param], 0.0, 16, basis="svd", state_dtype="bf16", betas=(0.9, 0.999))
    grad = drawn((40, 96), 1)[0]
    take(own, param, [grad] * 1000)
    p = own.state[param]["basis"].float()
    wanted = (1 - 0.999**1000) * (p.mT @ grad).square()
    assert own.state[param]["v"].dtype == torch.bfloat16
    assert (own.state[param]["v"].float() - wanted).norm() / wanted.norm() < 0.02


def test_plain_tensors_have_small_states_too_but_not_tiny_ones():
    large, small = nn.Parameter(torch.zeros(3000)), nn.Parameter(torch.zeros(100))
    own = LowRank([large, small], 1e-2, 16, inner="adamw8bit")
    for param in (large, small):
        take(own, param, drawn(tuple(param.shape), 1))
    assert state_bytes(own, large) == 2 * 12 * (256 + 4)
    assert state_bytes(own, small) == 2 * 4 * 100


@pytest.mark.parametrize("form", ["bf16", "8bit", "4bit"])
@pytest.mark.parametrize("rank", [None, 16])
def test_small_states_of_a_large_tensor_are_decoded_a_part_at_a_time_alike(form, rank, monkeypatch, peak_bytes):
    found = []
    for part in (1 << 20, 512):
        monkeypatch.setattr("fallow.optim.moments.PART", {"cpu": part})
        param = nn.Parameter(torch.ones(70, 260))
        own = LowRank([param], 1e-2, rank, state_dtype=form, basis_dtype="fp32", weight_decay=0.1)
        take(own, param, drawn((70, 260), 4))
        states = [value.clone() for value in kept(own, param).values()]
        param.grad = drawn((70, 260), 1)[0]
        found.append((param.detach().clone(), states, peak_bytes(own.step)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))
    assert found[1][2] < (0.3 if rank is None else 0.7) * found[0][2]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("form", ["fp32", "8bit"])
def test_a_large_plain_weight_of_low_precision_moves_a_part_at_a_time_alike(form, rounding, monkeypatch, peak_bytes):
    found = []
    for part in (1 << 20, 512):
        monkeypatch.setattr("fallow.optim.moments.PART", {"cpu": part})
        param = nn.Parameter(torch.ones(70, 130).bfloat16())
        own = LowRank([param], 1e-2, None, state_dtype=form, rounding=rounding, weight_decay=0.1)
        grads = [grad.bfloat16() for grad in drawn((70, 130), 5)]
        take(own, param, grads[:4])
        param.grad = grads[4]
        found.append((param.detach().float(), kept(own, param), peak_bytes(own.step)))
    assert (found[0][0] - found[1][0]).norm() < 2**-9 * found[0][0].norm()
    if "lost" in found[0][1]:
        whole = [values + states["lost"].float() for values, states, _ in found]
        torch.testing.assert_close(whole[0], whole[1], rtol=1e-4, atol=0)
    assert found[1][2] < 0.3 * found[0][2]


# -- weights of low precision -----------------------------------------------------------------------------------------


def weights(rounding: str, shape=(24, 40), steps=400, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """What many small steps come to in bfloat16, and in float32."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        param = nn.Parameter(torch.ones(shape, dtype=dtype))
        own = LowRank([param], 1e-4, 6, **{"basis": "svd", "rounding": rounding, "refresh_every": 1000, **options})
        grad = drawn(shape, 1)[0].bfloat16()
        take(own, param, [grad.to(dtype)] * steps)
        found.append(param.detach().float() - 1)
    return found[0], found[1]


@pytest.mark.parametrize(
    "options",
    [{}, {"residual": "fira"}, {"residual": {"name": "sign", "noise": 0.01}}, {"rank": None}],
    ids=str,
)
def test_steps_below_the_precision_of_bfloat16_are_lost_but_not_if_rounded_stochastically_or_compensated(options):
    rank = options.pop("rank", 6) if "rank" in options else 6
    options = {**options}
    found, wanted = weights("nearest", **options) if rank else weights("nearest", shape=(960,), **options)
    assert float(found.norm() / wanted.norm()) < 0.6
    for rounding, most in (("stochastic", 0.3), ("compensated", 0.12)):
        found, wanted = weights(rounding, **options) if rank else weights(rounding, shape=(960,), **options)
        assert float((found - wanted).norm() / wanted.norm()) < most, rounding


def test_a_compensated_weight_and_what_it_lost_are_the_float32_weight():
    param, exact = nn.Parameter(torch.ones(12, 30).bfloat16()), nn.Parameter(torch.ones(12, 30))
    grads = [grad.bfloat16() for grad in drawn((12, 30), 20)]
    own = LowRank([param], 1e-3, 4, basis="svd", rounding="compensated")
    take(own, param, grads)
    take(LowRank([exact], 1e-3, 4, basis="svd"), exact, [grad.float() for grad in grads])
    whole = param.detach().float() + own.state[param]["lost"].float()
    assert (whole - exact).abs().max() < 1e-4
    assert (param.detach().float() - exact).abs().max() > 1e-4


def test_a_large_weight_is_moved_in_blocks_of_columns_alike(monkeypatch):
    grads = [grad.bfloat16() for grad in drawn((30, 50), 5)]
    found = []
    for most in (1 << 30, 200):
        monkeypatch.setattr("fallow.optim.writing.BLOCK", {"cpu": most})
        for shape, flip in (((30, 50), False), ((50, 30), True)):
            for residual in ("drop", "fira", "sign", "sgd"):
                param = nn.Parameter(torch.ones(shape).bfloat16())
                own = LowRank([param], 1e-2, 4, basis="svd", residual=residual, weight_decay=0.1)
                take(own, param, [grad.mT if flip else grad for grad in grads])
                found.append(param.detach())
    half = len(found) // 2
    for one, other in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(one, other)


def test_float16_weights_are_not_rounded_stochastically():
    with pytest.raises(ConfigError, match="some are float16; take 'compensated'"):
        LowRank([nn.Parameter(torch.ones(12, 30).half())], rounding="stochastic")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"state_dtype": "8bit"},
        {"state_dtype": "4bit", "basis_dtype": "nf4"},
        {"state_dtype": "bf16", "residual": "feedback", "rounding": "stochastic"},
        {"basis_dtype": "int8", "rounding": "compensated", "residual": "fira"},
        {"basis": "dct", "inner": {"name": "polar", "momentum": 0.0}, "residual": "momentum", "refresh_every": 1},
        {"basis": "gaussian", "residual": "apollo", "inner": "adafactor"},
        {"basis": "block", "rank": 0.5, "residual": "sign", "moments": "reset", "state_dtype": "8bit"},
    ],
    ids=str,
)
def test_with_any_states_a_resumed_run_goes_on_bit_for_bit(options, dtype):
    def fresh():
        torch.manual_seed(0)
        shapes = [(40, 96), (96, 40), (64,), (6, 5, 3, 3)]
        params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
        return params, LowRank(params, 1e-2, **{"rank": 16, "refresh_every": 4, **options})

    def go(params, optimizer, steps):
        for step in steps:
            for at, param in enumerate(params):
                param.grad = drawn(tuple(param.shape), 1, seed=10 * step + at)[0].to(dtype)
            optimizer.step()

    params, own = fresh()
    go(params, own, range(6))
    file = io.BytesIO()
    torch.save({"optimizer": own.state_dict(), "params": params}, file)
    go(params, own, range(6, 11))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others, resumed = fresh()
    with torch.no_grad():
        for param, value in zip(others, saved["params"], strict=True):
            param.copy_(value)
    resumed.load_state_dict(saved["optimizer"])
    go(others, resumed, range(6, 11))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
