"""RandLoRA against its equation and against PEFT's own layer."""

from __future__ import annotations

from math import ceil

import peft
import pytest
import torch
from one_layer import LAYERS, OneLayer, backward_both, in_another_process, inputs, with_matrix
from torch import Tensor, nn

from fallow.core.delta import Site
from fallow.core.errors import ConfigError
from fallow.core.views import view_of
from fallow.deltas.randlora import RandLoRA, _Linear, _Scaled

ALL = sorted(LAYERS)


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    model, x = OneLayer(layer, "randlora", **({"rank": 5} | options)), inputs(layer)
    model.delta.randomize()
    return model, x


def by_the_equation(delta: RandLoRA) -> tuple[Tensor, Tensor, Tensor]:
    """D (out, in), and copies of lambda and gamma that it is made of."""
    r, (out, inner) = delta.o.rank, delta.view.shape
    a, b = (delta.shared(name) for name in delta.names)
    lambda_, gamma = (p.detach().clone().requires_grad_() for p in (delta.lambda_, delta.gamma))
    m, total = min(out, inner), 0.0
    for i in range(ceil(m / r)):
        b_i = b[: max(out, inner), i * r : (i + 1) * r]
        total = total + b_i @ torch.diag(lambda_[i]) @ a[:, :m] @ torch.diag(gamma[i])
    scale = 2 / ceil(m / r) ** 0.5
    return scale * (total if inner <= out else total.T), lambda_, gamma


@pytest.mark.parametrize("kind", ALL)
def test_output_is_unchanged_at_the_start_bit_for_bit(kind: str) -> None:
    layer = LAYERS[kind]()
    model, x = OneLayer(layer, "randlora", rank=4), inputs(layer)
    assert torch.equal(model(x), layer(x))
    assert not model.delta.lambda_.any()
    m = min(model.view.shape)
    assert model.delta.gamma.unique().tolist() == pytest.approx([1 / max(m, ceil(m / 4))])


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("rows", [1, 40])  # few: through the bases; many: D is formed
@pytest.mark.parametrize("form", ["added", "rewritten"])
def test_layer_is_w_plus_sum_of_scaled_bases_in_values_and_gradients(kind: str, rows: int, form: str) -> None:
    model, x = adapted(kind, form=form)
    assert model.delta.mode == ("add" if form == "added" else "weight")
    if x.is_floating_point():
        x = x[:1].repeat(rows, *[1] * (x.dim() - 1)).requires_grad_()
        assert model.delta._dense(x) == (rows == 40 and kind in ("linear", "wide", "conv1d"))
    d, lambda_, gamma = by_the_equation(model.delta)
    plain = x.detach().clone().requires_grad_(x.requires_grad)
    w = view_of(model.layer).read(model.layer.weight) + d
    want = with_matrix(model.layer, w, plain)
    got = model(x)
    torch.testing.assert_close(model.delta.delta_weight(), d)
    backward_both(got, want)
    torch.testing.assert_close(model.delta.lambda_.grad, lambda_.grad)
    torch.testing.assert_close(model.delta.gamma.grad, gamma.grad)
    if x.requires_grad:
        torch.testing.assert_close(x.grad, plain.grad)
    torch.testing.assert_close(model.by_merged(x), got)


@pytest.mark.parametrize("tall", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_gradients_pass_gradcheck(tall: bool, dense: bool) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    lambda_, gamma = (torch.randn(3, n, dtype=torch.float64, requires_grad=True) for n in (2, 5))
    x = torch.randn(2, 3, 5 if tall else 7, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, lambda_: Tensor, gamma: Tensor) -> Tensor:
        return _Linear.apply(x, a, b, lambda_, gamma, tall, dense, torch.float64)

    assert torch.autograd.gradcheck(run, (x, lambda_, gamma))
    assert torch.autograd.gradcheck(lambda u, v: _Scaled.apply(a, u, v), (lambda_, gamma))


@pytest.mark.parametrize("rows", [2, 5, 9])  # nothing is formed; D in one direction; D in both
@pytest.mark.parametrize("tall", [True, False])
def test_the_linear_along_with_its_update_is_the_two_apart(rows: int, tall: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(*((5, 7) if tall else (7, 5))).double()
    model, x = OneLayer(layer, "randlora", rank=2), torch.randn(rows, layer.in_features, dtype=torch.float64)
    model.delta.randomize()
    numbers, x = (model.delta.lambda_, model.delta.gamma), x.requires_grad_()
    got, want = model(x), layer(x) + model.delta.delta_forward(x)
    assert "BasesLinear" in got.grad_fn.name()
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(got)
    for ours, theirs in zip(*(torch.autograd.grad(y, (x, *numbers), upstream) for y in (got, want)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rows", [20, 500])
@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
def test_on_a_bf16_base_values_and_gradients_are_near_the_exact_ones(rows: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(*shape).bfloat16()
    model, x = OneLayer(layer, "randlora", rank=8), torch.randn(rows, shape[0]).bfloat16().requires_grad_()
    model.delta.randomize()
    got, (low, up) = model(x), (x.detach().double().requires_grad_(), torch.randn(rows, shape[1]).bfloat16())
    assert "BasesLinear" in got.grad_fn.name()
    w = layer.weight.double() + model.delta.delta_weight().double()
    want = torch.nn.functional.linear(low, w, layer.bias.double())
    numbers = (model.delta.lambda_, model.delta.gamma)
    ours, theirs = torch.autograd.grad(got, (x, *numbers), up), torch.autograd.grad(want, (low, *numbers), up.double())
    for one, other in zip((got, *ours), (want, *theirs), strict=True):
        assert float((one - other).norm() / other.norm()) < 6e-3


@pytest.mark.parametrize("shape", [(20, 48), (48, 20), (24, 24)])  # (out, in)
def test_values_and_gradients_are_those_of_pefts_layer_with_the_same_tensors(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer, r = nn.Linear(shape[1], shape[0]), 6
    config = peft.RandLoraConfig(r=r, target_modules=["0"], randlora_alpha=30)
    theirs = peft.get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    ours = OneLayer(layer, "randlora", rank=r, alpha=30.0, scaling="peft")
    ours.delta.randomize()
    n, m, wide = ours.delta.bases, min(shape), max(shape)
    lambda_, gamma = theirs.randlora_lambda["default"], theirs.randlora_gamma["default"]
    with torch.no_grad():
        lambda_.copy_(ours.delta.lambda_.T)
        gamma.copy_(ours.delta.gamma)
        a, b = (ours.delta.shared(name) for name in ours.delta.names)
        a.copy_(theirs.randlora_A["default"].reshape(r, m))
        # theirs multiplies column k n + i of B with row (k, i) of U
        b.copy_(theirs.randlora_B["default"].reshape(wide, r, n).transpose(1, 2).reshape(wide, n * r))
    x = torch.randn(3, 5, shape[1])
    got, want = ours(x), theirs(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(ours.delta.lambda_.grad, lambda_.grad.T, rtol=1e-3, atol=1e-4 * lambda_.grad.abs().max())
    torch.testing.assert_close(ours.delta.gamma.grad, gamma.grad, rtol=1e-3, atol=1e-4 * gamma.grad.abs().max())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_rank_is_r_after_one_step_and_full_after_two(optimizer: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(20, 26).double()
    model, x = OneLayer(layer, "randlora", rank=3), torch.randn(64, 20, dtype=torch.float64)
    target = torch.randn(64, 26, dtype=torch.float64)
    steps = optimizer(model.delta.parameters(), lr=0.01)
    for rank in (3, 20):
        (model(x) - target).square().sum().backward()
        steps.step()
        steps.zero_grad()
        values = torch.linalg.svdvals(model.delta.delta_weight().detach())
        assert int((values > 1e-10 * values[0]).sum()) == rank


@pytest.mark.parametrize("kind", ["linear", "wide", "conv", "embedding"])
def test_parameter_count_is_n_times_r_plus_m_for_every_rank(kind: str) -> None:
    for rank in (1, 4, 5):
        model, _ = adapted(kind, rank=rank)
        m = min(model.view.shape)
        want = ceil(m / rank) * (rank + m)
        assert RandLoRA.parameter_count(model.view.shape, model.delta.o) == want
        assert sum(p.numel() for p in model.delta.parameters() if p.requires_grad) == want


def test_layers_slice_one_pair_of_bases_whichever_comes_first() -> None:
    sizes = [(12, 20), (30, 8), (16, 16)]
    weights = []
    for order in (sizes, sizes[::-1]):
        common = nn.Module()
        deltas = {size: OneLayer(nn.Linear(*size), "randlora", rank=4, common=common).delta for size in order}
        assert {delta.sliced()[0].data_ptr() for delta in deltas.values()} == {common.bases_a_0.data_ptr()}
        assert {delta.sliced()[1].data_ptr() for delta in deltas.values()} == {common.bases_b_0.data_ptr()}
        assert common.bases_a_0.shape == (4, 16)
        assert common.bases_b_0.shape == (30, 16)
        for delta in deltas.values():
            delta.lambda_.data.fill_(1.0)
        weights.append([deltas[size].delta_weight() for size in sizes])
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)


def test_ranks_of_their_own_and_other_kinds_of_bases_live_in_one_adapter() -> None:
    common = nn.Module()
    low, high, sparse = (
        OneLayer(nn.Linear(12, 20), "randlora", rank=rank, zeros=zeros, common=common).delta
        for rank, zeros in ((3, 0.0), (8, 0.0), (3, 2 / 3))
    )
    assert low.sliced()[0].shape == (3, 12)
    assert high.sliced()[1].shape == (20, 16)
    assert (sparse.sliced()[1] == 0).any()
    assert not (low.sliced()[1] == 0).any()


def test_a_file_of_coefficients_and_the_seed_give_the_layer_back_in_another_process() -> None:
    model, x = adapted("linear", torch.float32, rank=3, zeros=0.5)
    assert set(model.delta.state_dict()) == {"lambda_", "gamma"}
    assert not model.common.state_dict()
    assert torch.equal(in_another_process("randlora", model, x, rank=3, zeros=0.5), model(x))


def test_another_seed_gives_other_bases() -> None:
    one, other = (OneLayer(nn.Linear(12, 20), "randlora", rank=3, seed=seed).delta for seed in (0, 1))
    assert not (one.sliced()[1] == other.sliced()[1]).any()


@pytest.mark.parametrize(("zeros", "share"), [(2 / 3, 2 / 3), (0.0, 0.0)])
def test_bases_have_variance_one_and_the_share_of_zeros(zeros: float, share: float) -> None:
    a, b = OneLayer(nn.Linear(400, 500), "randlora", rank=32, zeros=zeros).delta.sliced()
    for bases in (a, b):
        assert bases.std().item() == pytest.approx(1.0, abs=0.02)
        assert (bases == 0).float().mean().item() == pytest.approx(share, abs=0.02)
        assert bases.unique().numel() == 3 if zeros else bases.abs().max() <= 3**0.5


def kept(model: OneLayer, x: Tensor) -> list[tuple[int, ...]]:
    """The shapes that the backward keeps, without x, the trained tensors and the shared bases."""
    skip = {t.untyped_storage().data_ptr() for t in [x, *model.parameters(), *model.common.buffers()]}
    shapes = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in skip:
            shapes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_the_smaller_side_and_nothing_of_the_size_of_the_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for layer, hidden in ((nn.Linear(64, 96), []), (nn.Linear(96, 32), [(7, 32)])):  # wide: x B, of n r channels
        model = OneLayer(layer.to(dtype), "randlora", rank=8)
        x = torch.randn(7, layer.in_features, dtype=dtype, requires_grad=True)
        assert not model.delta._dense(x)
        assert [shape for shape in kept(model, x) if shape[0] * shape[1] > model.delta.columns] == hidden
        many = torch.randn(900, layer.in_features, dtype=dtype, requires_grad=True)
        assert all(shape[0] <= model.delta.bases or shape == (900, 32) for shape in kept(model, many))


def test_rewritten_layer_keeps_its_input_and_the_coefficients_only() -> None:
    torch.manual_seed(0)
    model = OneLayer(nn.Linear(64, 96), "randlora", rank=8, form="rewritten")
    assert not kept(model, torch.randn(7, 64, requires_grad=True))


def test_bf16_layer_trains_float32_and_gives_bf16() -> None:
    model, x = adapted("linear", torch.bfloat16)
    x.requires_grad_()
    y = model(x)
    assert y.dtype == torch.bfloat16
    d, lambda_, _ = by_the_equation(model.delta)
    torch.testing.assert_close(model.delta.delta_forward(x), x.float() @ d.T)
    y.float().sum().backward()
    assert model.delta.gamma.grad.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16
    (x.detach().float() @ d.T).sum().backward()
    torch.testing.assert_close(model.delta.lambda_.grad, lambda_.grad, rtol=1e-2, atol=1e-2 * lambda_.grad.abs().max())


@pytest.mark.parametrize("kind", ["linear", "wide"])
def test_autocast_and_compiled_forward_train_the_same(kind: str) -> None:
    model, x = adapted(kind, torch.float32)

    def gradients(run: object) -> list[Tensor]:
        model.zero_grad()
        run(x).float().square().sum().backward()
        return [p.grad.clone() for p in model.delta.parameters()]

    def autocast(t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(t)

    plain = gradients(model)
    compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    for got, rough, want in zip(compiled, gradients(autocast), plain, strict=True):
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(rough, want, rtol=5e-2, atol=3e-2 * float(want.abs().max()))


def test_a_parameter_of_a_module_is_changed_too() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 2).requires_grad_(False)
    view = view_of(attention, "in_proj_weight")
    delta = RandLoRA(Site("a", view, lambda: attention.in_proj_weight, nn.Module()), rank=5)
    delta.randomize()
    torch.testing.assert_close(delta.delta_weight(), by_the_equation(delta)[0])


def test_dropout_acts_on_the_input_in_training_only() -> None:
    model, x = adapted("linear", dropout=0.5)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_an_interrupted_training_goes_on_bit_for_bit() -> None:
    def train(model: OneLayer, steps: torch.optim.Optimizer, times: int) -> None:
        for _ in range(times):
            model(x).square().mean().backward()
            steps.step()
            steps.zero_grad()

    torch.manual_seed(0)
    layer = nn.Linear(12, 20)
    x = inputs(layer)
    whole, part, rest = (OneLayer(layer, "randlora", rank=5) for _ in range(3))
    first, second, third = (torch.optim.Adam(m.delta.parameters(), 0.01) for m in (whole, part, rest))
    train(whole, first, 5)
    train(part, second, 2)
    rest.delta.load_state_dict(part.delta.state_dict())
    third.load_state_dict(second.state_dict())
    train(rest, third, 3)
    assert torch.equal(rest.delta.gamma, whole.delta.gamma)
    assert torch.equal(rest.delta.lambda_, whole.delta.lambda_)


@pytest.mark.parametrize(
    ("scaling", "alpha", "want"), [("official", None, 2 / 2), ("peft", None, 20), ("peft", 3, 0.5)]
)
def test_scale_has_both_conventions(scaling: str, alpha: float | None, want: float) -> None:
    delta = OneLayer(nn.Linear(24, 30), "randlora", rank=6, scaling=scaling, alpha=alpha).delta  # n = 4
    assert delta.scale == pytest.approx(want)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 13}, "rank=13 is above"),
        ({"alpha": 0}, "alpha=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"zeros": 1.0}, "zeros=1.0"),
        ({"form": "merged"}, "form='merged'"),
        ({"form": "rewritten", "dropout": 0.1}, "dropout=0.1 acts on"),
        ({"scaling": "sqrt"}, "scaling='sqrt'"),
        ({"base": 3}, "base=3"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        OneLayer(nn.Linear(12, 20), "randlora", **({"rank": 4} | options))


def test_one_vector_bases_reach_any_target_where_lora_of_the_same_size_cannot() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 32, bias=False)
    nn.init.zeros_(layer.weight)
    target = torch.randn(32, 32)
    delta = OneLayer(layer, "randlora", rank=1, scaling="peft", alpha=1.0).delta
    a, b = delta.sliced()
    delta.lambda_.data.fill_(1.0)
    delta.gamma.data = torch.linalg.solve(b, target) / a
    values = torch.linalg.svdvals(target)
    lora = (values[16:].square().sum() / values.square().sum()).item()  # the best of rank 16: 1024 numbers
    assert sum(p.numel() for p in delta.parameters()) == 1056
    assert (delta.delta_weight() - target).square().sum() / target.square().sum() < 1e-6
    assert lora > 0.09


def test_pairing_of_peft_takes_the_columns_of_b_in_its_order_and_keeps_the_bases_in_the_file() -> None:
    model, _ = adapted("linear", pairing="peft")
    delta = model.delta
    b = delta.shared(delta.names[1])[: delta.large, : delta.columns]
    mine = delta.sliced()[1]
    for i in range(delta.bases):
        for k in range(delta.o.rank):
            assert torch.equal(mine[:, i * delta.o.rank + k], b[:, k * delta.bases + i])
    assert set(model.common.state_dict()) == set(delta.names)
    assert not adapted("linear")[0].common.state_dict()
    with pytest.raises(ConfigError, match="pairing='official'"):
        RandLoRA.Options(pairing="official")
