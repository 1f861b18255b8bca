"""NOLA against its equations, written with stored dense bases."""

from __future__ import annotations

import math

import pytest
import torch
from one_layer import LAYERS, OneLayer, in_another_process, inputs, with_matrix
from safetensors.torch import save
from torch import Tensor, nn

from fallow.core import noise
from fallow.core.errors import ConfigError
from fallow.core.views import view_of
from fallow.deltas.nola import NOLA

ALL = sorted(LAYERS)
SMALL = {"num_basis": 6, "rank": 3}


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    model, x = OneLayer(layer, "nola", **(SMALL | options)), inputs(layer)
    model.delta.randomize()
    return model, x


def bases(delta: NOLA, name: str, rows: int, columns: int) -> Tensor:
    """(k, rows, columns), uniform in ±1 / sqrt(k), in float64."""
    k = delta.o.num_basis
    drawn = noise.matrix(delta.keys[name], (k, rows * columns)).double() / math.sqrt(3 * k)
    return drawn.view(k, rows, columns)


def by_the_equation(delta: NOLA) -> tuple[Tensor, list[Tensor]]:
    """D (out, in), and copies of the coefficients that it is made of."""
    r, (out, inner) = delta.o.rank, delta.view.shape
    own = [p.detach().double().requires_grad_() for p in delta.parameters()]
    if delta.o.target == "full":
        return delta.o.alpha / r * torch.einsum("i,ijk->jk", own[0], bases(delta, "bases_w", out, inner)), own
    a = torch.einsum("i,ijk->jk", own[0], bases(delta, "bases_a", r, inner))
    b = torch.einsum("i,ijk->jk", own[1], bases(delta, "bases_b", out, r))
    if delta.o.anchor:
        a = a + delta.shared("anchor")[:r, :inner] / math.sqrt(3 * inner)
    return delta.o.alpha / r * (b @ a), own


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("options", [{}, {"anchor": False}, {"target": "full"}, {"stored": False}])
def test_output_is_unchanged_at_the_start_bit_for_bit(kind: str, options: dict[str, object]) -> None:
    layer = LAYERS[kind]()
    model, x = OneLayer(layer, "nola", **SMALL, **options), inputs(layer)
    assert torch.equal(model(x), layer(x))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("options", [{}, {"anchor": False}, {"target": "full"}])
def test_layer_is_w_plus_combined_bases_in_values_and_gradients(
    kind: str, stored: bool, options: dict[str, object]
) -> None:
    model, x = adapted(kind, stored=stored, **options)
    d, own = by_the_equation(model.delta)
    w = view_of(model.layer).read(model.layer.weight) + d
    want = with_matrix(model.layer, w, x)
    got = model(x)
    torch.testing.assert_close(model.delta.delta_weight(), d, rtol=0, atol=1e-12)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-8)
    weights = torch.randn_like(got)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for ours, plain in zip(model.delta.parameters(), own, strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=0, atol=1e-8)
    torch.testing.assert_close(model.by_merged(x), got)  # the official merge gives the base here


def test_at_the_start_only_b_has_a_gradient_and_a_after_one_step() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 20)
    model, x = OneLayer(layer, "nola", **SMALL), inputs(layer)
    model(x).square().sum().backward()
    assert not model.delta.a.grad.any()
    assert model.delta.b.grad.abs().min() > 0
    torch.optim.SGD(model.delta.parameters(), 0.01).step()
    model(x).square().sum().backward()
    assert model.delta.a.grad.abs().min() > 0


def test_without_an_anchor_a_starts_at_random_as_a_fresh_start_does() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(400, 300)
    one, other = (OneLayer(layer, "nola", num_basis=2000, rank=4, anchor=False) for _ in range(2))
    assert not torch.equal(one.delta.a, other.delta.a)
    assert one.delta.a.std().item() == pytest.approx(1 / 20, rel=0.1)
    with_anchor = OneLayer(layer, "nola", num_basis=4, rank=4).delta.factors()[1]
    for a in (one.delta.factors()[1], with_anchor):
        assert a.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.15)
    one(inputs(layer)).square().sum().backward()
    assert one.delta.b.grad.abs().min() > 0


@pytest.mark.parametrize("runs", [1, 7, 64, 200])
def test_bases_are_the_same_numbers_in_runs_of_any_length_now_and_in_the_backward(
    runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Tensor] = []
    plain = noise.part

    def part(*args: object, **kwargs: object) -> Tensor:
        made.append(plain(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(noise, "BLOCK", runs * 5)
    monkeypatch.setattr(noise, "part", part)
    coefficients = torch.randn(200, dtype=torch.float64, requires_grad=True)
    noise.combine(11, coefficients, 5).sum().backward()
    assert len(made) == 2 * math.ceil(200 / runs)
    whole = torch.cat(made)
    monkeypatch.undo()
    assert torch.equal(whole[:200], noise.matrix(11, (200, 5)))
    assert torch.equal(whole[200:], whole[:200])
    torch.testing.assert_close(coefficients.grad, whole[:200].double().sum(1))


@pytest.mark.parametrize("stored", [True, False])
def test_torchs_own_random_numbers_are_left_alone(stored: bool) -> None:
    state = torch.random.get_rng_state()
    layer = nn.utils.skip_init(nn.Linear, 12, 20)
    nn.init.ones_(layer.weight), nn.init.ones_(layer.bias)
    model = OneLayer(layer, "nola", **SMALL, stored=stored)
    model(torch.ones(2, 12)).sum().backward()
    assert torch.equal(state, torch.random.get_rng_state())


def test_coefficients_and_a_seed_are_less_than_a_kilobyte_and_give_the_layer_back_in_another_process() -> None:
    model, x = adapted("linear", torch.float32, num_basis=40)
    state = model.delta.state_dict()
    assert not model.common.state_dict()
    assert len(save(state)) < 1024 + 4 * 80
    assert torch.equal(in_another_process("nola", model, x, num_basis=40, rank=3), model(x))


@pytest.mark.parametrize("stored", [True, False])
def test_nothing_of_the_size_of_the_bases_is_kept_for_the_backward(stored: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 64)
    model, x = OneLayer(layer, "nola", num_basis=100, rank=4, stored=stored), inputs(layer)
    once = {t.untyped_storage().data_ptr() for t in model.common.buffers()}
    sizes = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in once:
            sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    assert max(sizes) <= max(64 * 4, x.numel())
    assert {name for name, _ in model.common.named_buffers()} == (
        {"anchor", "bases_a", "bases_b"} if stored else {"anchor"}
    )


def test_layers_slice_the_same_bases_whichever_comes_first() -> None:
    sizes = [(12, 20), (30, 8), (16, 16)]
    weights = []
    for order in (sizes, sizes[::-1]):
        common = nn.Module()
        deltas = {size: OneLayer(nn.Linear(*size), "nola", **SMALL, common=common).delta for size in order}
        assert common.bases_a.shape == (6, 3 * 30)
        assert common.bases_b.shape == (6, 3 * 20)
        for delta in deltas.values():
            delta.a.data.fill_(1.0), delta.b.data.fill_(1.0)
        weights.append([deltas[size].delta_weight() for size in sizes])
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("target", ["factors", "full"])
def test_parameter_count_is_k_for_each_factor_whatever_the_layer(target: str) -> None:
    for kind in ("linear", "conv", "embedding"):
        model, _ = adapted(kind, num_basis=7, target=target)
        want = 7 * (2 if target == "factors" else 1)
        assert NOLA.parameter_count(model.view.shape, model.delta.o) == want
        assert sum(p.numel() for p in model.delta.parameters()) == want


def test_rank_is_reached_after_a_few_steps_and_never_passed() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(20, 26).double()
    model, x = OneLayer(layer, "nola", num_basis=30, rank=5), torch.randn(64, 20, dtype=torch.float64)
    steps = torch.optim.Adam(model.delta.parameters(), 0.02)
    for _ in range(5):
        model(x).square().sum().backward()
        steps.step()
        steps.zero_grad()
    values = torch.linalg.svdvals(model.delta.delta_weight().detach())
    assert int((values > 1e-10 * values[0]).sum()) == 5


def test_fewer_numbers_than_a_rank_of_one_still_learn() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 64)
    model, x = OneLayer(layer, "nola", num_basis=20, rank=8), torch.randn(128, 48)
    target = layer(x).detach() + (model.delta.randomize(), model(x) - layer(x))[1].detach()
    model = OneLayer(layer, "nola", num_basis=20, rank=8)
    assert sum(p.numel() for p in model.delta.parameters()) < 48 + 64
    steps, losses = torch.optim.Adam(model.delta.parameters(), 0.02), []
    for _ in range(150):
        loss = (model(x) - target).square().mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("stored", [True, False])
def test_bf16_autocast_and_compiled_forwards_combine_in_float32(stored: bool) -> None:
    model, x = adapted("linear", torch.bfloat16, stored=stored)
    assert model(x).dtype == torch.bfloat16
    d, own = by_the_equation(model.delta)
    torch.testing.assert_close(model.delta.delta_weight().double(), d, rtol=1e-5, atol=1e-6)

    def gradients(run: object) -> list[Tensor]:
        model.zero_grad()
        run(x).float().square().sum().backward()
        return [p.grad.clone() for p in model.delta.parameters()]

    def autocast(t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            assert model.delta.factors()[0].dtype == torch.float32
            return model(t)

    plain = gradients(model)
    compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    for got, rough, want in zip(compiled, gradients(autocast), plain, strict=True):
        for found in (got, rough):
            torch.testing.assert_close(found, want, rtol=5e-2, atol=3e-2 * float(want.abs().max()))
    assert len(own) == 2


def test_an_interrupted_training_goes_on_bit_for_bit() -> None:
    def train(model: OneLayer, steps: torch.optim.Optimizer, times: int) -> None:
        for _ in range(times):
            model(x).square().mean().backward()
            steps.step()
            steps.zero_grad()

    torch.manual_seed(0)
    layer = nn.Linear(12, 20)
    x = inputs(layer)
    whole, part, rest = (OneLayer(layer, "nola", **SMALL) for _ in range(3))
    first, second, third = (torch.optim.Adam(m.delta.parameters(), 0.01) for m in (whole, part, rest))
    train(whole, first, 5)
    train(part, second, 2)
    rest.delta.load_state_dict(part.delta.state_dict())
    third.load_state_dict(second.state_dict())
    train(rest, third, 3)
    assert torch.equal(rest.delta.a, whole.delta.a)
    assert torch.equal(rest.delta.b, whole.delta.b)


def test_dropout_acts_on_the_input_in_training_only() -> None:
    model, x = adapted("linear", dropout=0.5)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_a_full_target_is_no_product_of_factors() -> None:
    model, _ = adapted("linear", target="full")
    assert not model.delta.exact
    with pytest.raises(ConfigError, match="'nola' is no product"):
        model.delta.factors()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_basis": 0}, "num_basis=0"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 13}, "rank=13 is above"),
        ({"alpha": 0}, "alpha=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"target": "both"}, "target='both'"),
        ({"stored": "no"}, "stored='no'"),
        ({"anchor": None}, "anchor=None"),
        ({"num_bases": 3}, "num_bases=3"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        OneLayer(nn.Linear(12, 20), "nola", **(SMALL | options))
