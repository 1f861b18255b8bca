"""What the methods on bases made of the weight, and KaSA, have in common: dtypes, memory, compiling, scales, files."""

from __future__ import annotations

import copy

import pytest
import torch
from one_layer import LAYERS, OneLayer, inputs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fallow.core.delta import Site, make_options, method_of
from fallow.core.engine import run_deltas
from fallow.core.errors import AdapterError
from fallow.core.views import view_of

METHODS = {
    "svfit": {},
    "svfit few": {"rank": 3},
    "kasa": {"rank": 3},
    "loldu": {},
    "loldu few": {"rank": 3, "init": "lu"},
    "salt": {"top": 4, "rank": 2},
    "salt diag": {"top": 4, "rank": 2, "relu": "diag"},
    "salt none": {"top": 4, "rank": 2, "relu": "none"},
}  # fmt: skip
ON_BASES = [method for method in METHODS if method != "kasa"]
ALL = sorted(LAYERS)


def adapted(method: str, kind: str, dtype: torch.dtype = torch.float32, **options: object) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    model = OneLayer(layer, method.split()[0], **{**METHODS[method], **options})
    model.delta.randomize()
    return model, inputs(layer)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("form", ["added", "rewritten"])
def test_merged_weight_equals_the_forward_at_every_scale(method: str, kind: str, form: str) -> None:
    model, x = adapted(method, kind, torch.float64, **({} if method == "kasa" else {"form": form}))
    whole = model(x) - model.layer(x)
    assert float(whole.detach().abs().max()) > 1e-3
    for scale in (1.0, 0.5, -2.0, 0.0):
        model.scale = scale
        torch.testing.assert_close(model.by_merged(x), model(x))
        torch.testing.assert_close(model(x) - model.layer(x), scale * whole)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_its_module_reads_itself_is_adapted(method: str) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    view, weight = view_of(attention, "in_proj_weight"), attention.in_proj_weight
    kind = method_of(method.split()[0])
    delta = kind(Site("a", view, lambda: weight, nn.Module()), make_options(kind, METHODS[method]))
    delta.randomize()
    x = torch.randn(2, 5, 8)
    got = run_deltas(attention, attention, "in_proj_weight", view, lambda: weight.data, [(delta, 1.0)], x, x, x)[0]
    attention.in_proj_weight.data += delta.delta_weight().detach()
    torch.testing.assert_close(got, attention(x, x, x)[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_trains_float32_tensors(method: str, kind: str, dtype: torch.dtype) -> None:
    model, x = adapted(method, kind, dtype)
    y = model(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    for param in model.delta.parameters():
        assert param.dtype == torch.float32
        assert float(param.grad.abs().sum()) > 0
    full = copy.deepcopy(model).float()
    torch.testing.assert_close(y.float(), full(x.float() if kind != "embedding" else x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("method", "kind"), [*((m, "linear") for m in METHODS), ("svfit", "conv"), ("svfit", "embedding")]
)
def test_compiled_and_checkpointed_forwards_have_the_same_gradients(method: str, kind: str) -> None:
    model, x = adapted(method, kind)
    model(x).square().sum().backward()
    want = [p.grad.clone() for p in model.delta.parameters()]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for forward in (compiled, lambda t: checkpoint(model, t, use_reentrant=False)):
        model.zero_grad()
        forward(x).square().sum().backward()
        for param, grad in zip(model.delta.parameters(), want, strict=True):
            torch.testing.assert_close(param.grad, grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_from_a_file_bit_for_bit(method: str) -> None:
    model, x = adapted(method, "linear")

    def train(model: OneLayer, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    optimizer = torch.optim.AdamW(model.delta.parameters(), lr=1e-2)
    train(model, optimizer, 3)
    state, moments = copy.deepcopy(model.delta.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 3)
    again = OneLayer(model.layer, method.split()[0], fresh=False, **METHODS[method])
    again.delta.load_state_dict(state)
    other = torch.optim.AdamW(again.delta.parameters(), lr=1e-2)
    other.load_state_dict(moments)
    train(again, other, 3)
    for got, want in zip(again.delta.parameters(), model.delta.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("method", ON_BASES)
def test_saved_basis_makes_the_file_its_own_proof(method: str) -> None:
    model, x = adapted(method, "linear", save_basis=True)
    torch.manual_seed(5)
    state = model.delta.state_dict()
    again = OneLayer(nn.Linear(12, 20), method.split()[0], fresh=False, save_basis=True, **METHODS[method])
    again.delta.load_state_dict(state)
    torch.testing.assert_close(again(x) - again.layer(x), model(x) - model.layer(x), rtol=1e-4, atol=1e-5)
    plain = {name: t for name, t in state.items() if name in OneLayer(
        model.layer, method.split()[0], **METHODS[method]).delta.state_dict()}  # fmt: skip
    other = OneLayer(nn.Linear(12, 20), method.split()[0], fresh=False, **METHODS[method])
    with pytest.raises(AdapterError, match="another one"):
        other.delta.load_state_dict(plain)


TOKEN = {"svfit": 48, "svfit few": 3, "loldu": 48, "loldu few": 3, "salt": 48, "salt diag": 48, "salt none": 64 + 6}


@pytest.mark.parametrize("method", ON_BASES)
@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_backward_keeps_few_numbers_for_each_token(method: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = OneLayer(nn.Linear(*shape), method.split()[0], **METHODS[method])
    model.delta.randomize()
    x = torch.randn(500, shape[0], requires_grad=True)
    skip = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in skip:
            held[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.delta.delta_forward(x)
    assert sum(held.values()) <= 500 * TOKEN[method] + 6 * 48 * 48
    trained_on_input = method == "salt none" or ("salt" in method and shape == (48, 64))
    assert (x.untyped_storage().data_ptr() in held) == trained_on_input
