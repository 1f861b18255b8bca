"""LoRA against its equation and against PEFT's own layer."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from one_layer import LAYERS, OneLayer, backward_both, inputs, with_matrix
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fallow.core.errors import ConfigError
from fallow.core.views import view_of
from fallow.deltas.lora import LoRA

ALL = sorted(LAYERS)


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    model, x = OneLayer(layer, "lora", **options), inputs(layer)
    model.delta.randomize()
    return model, x


def peft_layer(kind: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """PEFT's adapted layer in float64, and the plain one."""
    torch.manual_seed(0)
    layer = LAYERS[kind]().double()
    config = peft.LoraConfig(target_modules=["0"], **options)
    model = peft.get_peft_model(nn.Sequential(layer), config, autocast_adapter_dtype=False).double()
    return model.base_model.model[0], layer


@pytest.mark.parametrize("kind", ALL)
def test_output_is_unchanged_at_the_start_bit_for_bit(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    model, x = OneLayer(layer, "lora", rank=2), inputs(layer)
    assert torch.equal(model(x), layer(x))
    assert (model.delta.B if kind == "embedding" else model.delta.A).count_nonzero() > 0


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_layer_is_w_plus_s_b_a_in_values_and_gradients(kind: str, scaling: str) -> None:
    model, x = adapted(kind, rank=3, alpha=5.0, scaling=scaling)
    layer, delta = model.layer, model.delta
    s = 5 / 3 if scaling == "standard" else 5 / math.sqrt(3)
    a, b = (p.detach().clone().requires_grad_() for p in (delta.A, delta.B))
    w = view_of(layer).read(layer.weight) + s * (b @ a)
    want = with_matrix(layer, w, x)
    got = model(x)
    backward_both(got, want)
    torch.testing.assert_close(delta.A.grad, a.grad)
    torch.testing.assert_close(delta.B.grad, b.grad)
    torch.testing.assert_close(model.by_merged(x), got)


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])  # PEFT's merged layer differs on circular padding
@pytest.mark.parametrize("rslora", [False, True])
def test_values_and_gradients_are_those_of_pefts_layer_with_the_same_tensors(kind: str, rslora: bool) -> None:
    theirs, layer = peft_layer(kind, r=4, lora_alpha=6, use_rslora=rslora)
    ours = OneLayer(layer, "lora", rank=4, alpha=6.0, scaling="rslora" if rslora else "standard")
    ours.delta.randomize()
    if kind == "embedding":
        a, b = theirs.lora_embedding_A["default"], theirs.lora_embedding_B["default"]
    else:
        a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(ours.delta.A.view_as(a))
        b.copy_(ours.delta.B.view_as(b))
    x = inputs(layer)
    got, want = ours(x), theirs(x)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(ours.delta.A.grad, a.grad.flatten(1))
    torch.testing.assert_close(ours.delta.B.grad, b.grad.flatten(1))


def test_start_has_pefts_distribution() -> None:
    torch.manual_seed(0)
    delta = OneLayer(nn.Linear(400, 300), "lora", rank=64).delta
    bound = 1 / math.sqrt(400)  # what kaiming_uniform(a=sqrt(5)) comes to
    assert delta.A.abs().max() <= bound
    assert float(delta.A.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    table = OneLayer(nn.Embedding(500, 300), "lora", rank=64).delta
    assert float(table.B.detach().std()) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "embedding"])
def test_parameter_count_is_rank_times_out_plus_in(kind: str) -> None:
    model, _ = adapted(kind, rank=2)
    out, inner = model.view.shape
    assert LoRA.parameter_count((out, inner), model.delta.o) == 2 * (out + inner)
    assert sum(p.numel() for p in model.delta.parameters()) == 2 * (out + inner)


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that the backward keeps, each storage once, without x itself and the parameters."""
    skip = {t.untyped_storage().data_ptr() for t in [x, *model.parameters()]}
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in skip:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(held.values())


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
def test_bf16_base_keeps_no_float32_copy_of_the_input(kind: str) -> None:
    model, x = adapted(kind, torch.bfloat16, rank=2)
    assert model.delta.A.dtype == torch.float32
    assert model(x).dtype == torch.bfloat16
    hidden = {"linear": 3 * 5 * 2, "conv": 3 * 2 * 25, "grouped": 3 * 4 * 81}[kind]  # h, of 2 channels for each group
    assert kept_bytes(model, x.requires_grad_()) == 4 * hidden


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "conv1d"])
@pytest.mark.parametrize("frozen", ["", "A", "B", "x"])
def test_gradients_on_a_bf16_base_are_those_of_plain_operators(kind: str, frozen: str) -> None:
    model, x = adapted(kind, torch.bfloat16, rank=2)
    delta, view = model.delta, model.view
    x.requires_grad_(frozen != "x")
    for name in ("A", "B"):
        getattr(delta, name).requires_grad_(frozen != name)
    got = delta.delta_forward(x)
    plain = x.detach().clone().requires_grad_(frozen != "x")
    want = view.up(view.down(plain.float(), delta.A), delta.B)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(got)
    wanted = [p for p in (delta.A, delta.B) if p.requires_grad]
    mine = torch.autograd.grad((got * weights).sum(), [*wanted, *([x] if x.requires_grad else [])])
    true = torch.autograd.grad((want * weights).sum(), [*wanted, *([plain] if plain.requires_grad else [])])
    for g, w in zip(mine, true, strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_bf16_base_works_used_twice_checkpointed_compiled_and_under_autocast(kind: str) -> None:
    model, x = adapted(kind, torch.bfloat16, rank=2)
    model(x).float().square().sum().backward()
    once = [p.grad.clone() for p in model.delta.parameters()]

    def run(forward: object, times: int = 1) -> list[Tensor]:
        model.zero_grad()
        sum(forward(x).float().square().sum() for _ in range(times)).backward()
        return [p.grad / times for p in model.delta.parameters()]

    for found in (run(model, 2), run(lambda t: checkpoint(model, t, use_reentrant=False))):
        for got, want in zip(found, once, strict=True):
            torch.testing.assert_close(got, want)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled), once, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))

    def autocast(t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(t)

    for got, want in zip(run(autocast), once, strict=True):
        torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2 * float(want.abs().max()))


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "embedding"])
def test_resize_keeps_the_most_important_ranks_and_growth_changes_nothing(kind: str) -> None:
    model, x = adapted(kind, rank=4, alpha=6.0, scaling="rslora")
    delta = model.delta
    before, parts = model(x), delta.importance()
    for k in range(4):
        b, a = delta.B[:, [k]] * 3.0, delta.A[[k]]  # s = 6 / sqrt(4)
        assert float(parts[k]) == pytest.approx(float((b @ a).detach().norm()), rel=1e-9)
    delta.resize(6)
    assert delta.A.shape[0] == delta.B.shape[1] == delta.o.rank == 6
    torch.testing.assert_close(model(x), before)
    delta.resize(4)
    torch.testing.assert_close(model(x), before)  # the new ranks are worth nothing and go first
    weakest = int(parts.argmin())
    want = delta.delta_weight() - delta.scaling * delta.B[:, [weakest]] @ delta.A[[weakest]]
    delta.resize(3)
    torch.testing.assert_close(delta.delta_weight(), want)
    assert isinstance(delta.A, nn.Parameter)
    assert delta.A.requires_grad


def test_resize_leaves_the_options_of_other_layers_alone() -> None:
    model, _ = adapted("linear", rank=4)
    shared = model.delta.o
    model.delta.resize(2)
    assert (shared.rank, model.delta.o.rank) == (4, 2)


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    model, x = adapted("linear", torch.float32, rank=2)
    again, _ = adapted("linear", torch.float32, rank=2)
    again.delta.randomize()
    again.delta.load_state_dict(model.delta.state_dict())
    assert torch.equal(again(x), model(x))
    assert set(model.delta.state_dict()) == {"A", "B"}


def test_dropout_acts_on_the_input_in_training_only() -> None:
    model, x = adapted("linear", rank=2, dropout=0.5)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 13}, "rank=13 is above"),
        ({"alpha": 0}, "alpha=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"scaling": "sqrt"}, "scaling='sqrt'"),
        ({"rnak": 3}, "rnak=3"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        OneLayer(nn.Linear(12, 20), "lora", **options)


def test_a_saved_rank_above_the_layers_is_taken() -> None:
    model = OneLayer(nn.Linear(12, 20), "lora", rank=16, fresh=False)
    assert model.delta.A.shape == (16, 12)
