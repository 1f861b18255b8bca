"""DoRA against its equation and against PEFT's own layer."""

from __future__ import annotations

import peft
import pytest
import torch
from one_layer import LAYERS, OneLayer, inputs, with_matrix
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fallow.core.delta import Site
from fallow.core.engine import run_deltas
from fallow.core.errors import ConfigError
from fallow.core.views import view_of
from fallow.deltas.dora import DoRA

ALL = sorted(LAYERS)


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    model, x = OneLayer(layer, "dora", **options), inputs(layer)
    model.delta.randomize()
    return model, x


def by_the_equation(model: OneLayer, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """y' by a whole W', and copies of A, B, m that it depends on."""
    layer, delta = model.layer, model.delta
    a, b, m = (p.detach().clone().requires_grad_() for p in (delta.A, delta.B, delta.magnitude))
    turned = view_of(layer).read(layer.weight) + delta.scaling * (b @ a)
    w = (m / turned.norm(dim=1).detach())[:, None] * turned
    return with_matrix(layer, w, x), [a, b, m]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_merged_weight_are_unchanged_at_the_start_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    model, x = OneLayer(layer, "dora", rank=2), inputs(layer)
    assert torch.equal(model(x), layer(x))
    assert torch.equal(model.merged().to(dtype), model.view.read(layer.weight))
    assert torch.equal(model.delta.magnitude, model.view.read(layer.weight).float().norm(dim=1))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_values_and_gradients_are_those_of_the_equation(kind: str, scaling: str) -> None:
    model, x = adapted(kind, rank=3, alpha=5.0, scaling=scaling)
    if x.is_floating_point():
        x.requires_grad_()
    want, copies = by_the_equation(model, x)
    got = model(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(model.by_merged(x), got)
    weights = torch.randn_like(got)
    delta = model.delta
    mine, true = [delta.A, delta.B, delta.magnitude], copies
    if x.is_floating_point():
        mine, true = [*mine, x], [*true, x]
    found = torch.autograd.grad((got * weights).sum(), mine)
    for g, w in zip(found, torch.autograd.grad((want * weights).sum(), true), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_the_way_through_the_output_equals_the_way_through_the_weight(kind: str) -> None:
    model, x = adapted(kind, rank=3)
    direct = model(x)
    direct.square().sum().backward()
    found = [p.grad.clone() for p in model.delta.parameters()]
    model.zero_grad()
    twin = OneLayer(model.layer, "dora", rank=3)  # at its start, it changes nothing
    active = [(model.delta, 1.0), (twin.delta, 0.0)]  # two at once go through the weight
    through = run_deltas(model.layer, model.layer, "weight", model.view, lambda: model.layer.weight.data, active, x)
    torch.testing.assert_close(through, direct)
    through.square().sum().backward()
    for p, g in zip(model.delta.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_values_and_gradients_are_those_of_pefts_layer_with_the_same_tensors(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]().double()
    config = peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=6, use_dora=True)
    theirs = peft.get_peft_model(nn.Sequential(layer), config, autocast_adapter_dtype=False).double()
    theirs = theirs.base_model.model[0]
    ours = OneLayer(layer, "dora", rank=4, alpha=6.0)
    m = theirs.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(ours.delta.magnitude, m.detach().flatten(), rtol=1e-6, atol=0)
    ours.delta.randomize()
    if kind == "embedding":
        a, b = theirs.lora_embedding_A["default"], theirs.lora_embedding_B["default"]
    else:
        a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.no_grad():
        for p, own in ((a, ours.delta.A), (b, ours.delta.B), (m, ours.delta.magnitude)):
            p.copy_(own.view_as(p))
    x = inputs(layer)
    got, want = ours(x), theirs(x)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    for p, own in ((a, ours.delta.A), (b, ours.delta.B), (m, ours.delta.magnitude)):
        torch.testing.assert_close(own.grad, p.grad.reshape(own.shape))


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "embedding"])
def test_parameter_count_is_loras_and_one_for_each_output(kind: str) -> None:
    model, _ = adapted(kind, rank=2)
    out, inner = model.view.shape
    assert DoRA.parameter_count((out, inner), model.delta.o) == 2 * (out + inner) + out
    assert sum(p.numel() for p in model.delta.parameters()) == 2 * (out + inner) + out


def test_a_weight_that_its_module_reads_itself_is_turned_too() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True).double().requires_grad_(False)
    view = view_of(layer, "in_proj_weight")
    delta = DoRA(Site("attention", view, lambda: layer.in_proj_weight, nn.Module()), rank=2)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    plain = layer(x, x, x)[0]

    def run() -> Tensor:
        weight = layer.in_proj_weight
        return run_deltas(
            lambda *given: layer(*given), layer, "in_proj_weight", view, lambda: weight, [(delta, 1.0)], x, x, x
        )[0]

    torch.testing.assert_close(run(), plain, rtol=1e-12, atol=1e-12)
    delta.randomize()
    changed = run()
    assert float((changed - plain).detach().abs().max()) > 1e-3
    changed.square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in delta.parameters())


def test_a_trained_bias_gets_its_gradient() -> None:
    model, x = adapted("linear", rank=2)
    model.layer.bias.requires_grad_()
    model(x).sum().backward()
    torch.testing.assert_close(model.layer.bias.grad, torch.full_like(model.layer.bias, 15.0))


def test_a_zero_row_stays_zero_and_gives_no_nan() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False)
    layer.weight.data[1] = 0
    model, x = OneLayer(layer, "dora", rank=2), torch.randn(5, 6)
    optimizer = torch.optim.Adam(model.delta.parameters(), 0.1)
    for _ in range(3):
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.merged()[1], torch.zeros(6))
    assert bool(torch.isfinite(model(x)).all())
    assert float((model.merged() - layer.weight).abs().max()) > 0.01


def test_training_moves_the_lengths_of_rows_to_the_magnitude() -> None:
    model, _ = adapted("linear", rank=2)
    torch.testing.assert_close(model.merged().norm(dim=1), model.delta.magnitude.detach().abs())


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
def test_backward_on_a_bf16_base_keeps_the_output_and_h_only(kind: str) -> None:
    model, x = adapted(kind, torch.bfloat16, rank=2)
    skip = {t.untyped_storage().data_ptr() for t in [x, *model.parameters(), *model.buffers()]}
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in skip:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x.requires_grad_())
    hidden = {"linear": 3 * 5 * 2, "conv": 3 * 2 * 25, "grouped": 3 * 4 * 81}[kind]
    vectors = (2 + 2) * model.view.shape[0]  # c, n, and c s B
    assert y.dtype == torch.bfloat16
    assert sum(held.values()) <= 2 * y.numel() + 4 * (hidden + vectors)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_bf16_base_works_checkpointed_compiled_and_under_autocast(kind: str) -> None:
    model, x = adapted(kind, torch.bfloat16, rank=2)
    model(x).float().square().sum().backward()
    once = [p.grad.clone() for p in model.delta.parameters()]

    def autocast(t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(t)

    ways = [
        (lambda t: checkpoint(model, t, use_reentrant=False), 1e-6),
        (torch.compile(model, fullgraph=True, backend="aot_eager"), 3e-2),
        (autocast, 5e-2),
    ]
    for forward, close in ways:
        model.zero_grad()
        forward(x).float().square().sum().backward()
        for p, want in zip(model.delta.parameters(), once, strict=True):
            torch.testing.assert_close(p.grad, want, rtol=close, atol=close * float(want.abs().max()))


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    model, x = adapted("conv", torch.float32, rank=2)
    again, _ = adapted("conv", torch.float32, rank=2)
    again.delta.randomize()
    again.delta.load_state_dict(model.delta.state_dict())
    assert torch.equal(again(x), model(x))
    assert set(model.delta.state_dict()) == {"A", "B", "magnitude"}


def test_half_the_scale_is_half_the_way_from_w() -> None:
    model, x = adapted("linear", rank=2)
    model.scale = 0.5
    whole = model.delta.new_weight(model.layer.weight.data)
    torch.testing.assert_close(model.merged(), (model.layer.weight + whole) / 2)
    torch.testing.assert_close(model(x), model.by_merged(x))


def test_resize_keeps_the_layer_as_it_is() -> None:
    model, x = adapted("linear", rank=3, alpha=6.0)
    before = model(x)
    model.delta.resize(5)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("options", [{"rank": 0}, {"dropout": 0.1}, {"scaling": "x"}, {"alpha": -1}])
def test_bad_options_are_refused_by_name(options: dict[str, object]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        OneLayer(nn.Linear(12, 20), "dora", **options)
