"""SLTrain against its equations: the layer that replaces W, what it keeps in memory, and the Delta."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_layer import LAYERS, OneLayer, backward_both, inputs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fallow.core.coding import packed
from fallow.core.errors import ConfigError, ModelError
from fallow.core.low_rank_sparse import distinct, distinct_by_rows
from fallow.core.views import view_of
from fallow.deltas.sltrain import SLTrain, SLTrainLinear, sltrain

ALL = sorted(LAYERS)
MANY, FEW = 200, 2  # rows with which W is formed, and with which it is not


def layer(dtype: torch.dtype = torch.float64, **options: Any) -> SLTrainLinear:
    """(24, 40), with B off its zero start."""
    torch.manual_seed(0)
    made = SLTrainLinear(40, 24, **{"rank": 3, "density": 0.1, "alpha": 5.0, **options}).to(dtype)
    with torch.no_grad():
        made.B.normal_()
    return made


def parts(made: SLTrainLinear) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in (made.B, made.A, made.values, made.bias)]


def dense(made: SLTrainLinear, b: Tensor, a: Tensor, values: Tensor) -> Tensor:
    s = torch.zeros(made.out_features * made.in_features, dtype=values.dtype)
    return made.alpha / made.rank * b @ a + s.scatter(0, made.index.long(), values).view(made.out_features, -1)


def transformer() -> nn.Module:
    torch.manual_seed(0)
    blocks = (
        {"attn": nn.ModuleDict({"q": nn.Linear(32, 32)}), "mlp": nn.Linear(32, 64), "head": nn.Linear(64, 32)}
        for _ in range(2)
    )
    return nn.ModuleList([nn.ModuleDict(block) for block in blocks])


# -- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [MANY, FEW, 0])
@pytest.mark.parametrize("layout", ["two", "three", "strided"])
def test_values_and_gradients_are_those_of_the_explicit_weight(rows: int, layout: str) -> None:
    made = layer()
    b, a, values, bias = parts(made)
    one = {
        "two": lambda: torch.randn(rows, 40, dtype=torch.float64),
        "three": lambda: torch.randn(rows, 3, 40, dtype=torch.float64),
        "strided": lambda: torch.randn(40, 2 * rows, dtype=torch.float64)[:, ::2].T,
    }[layout]().requires_grad_()
    other = one.detach().clone().requires_grad_()
    got, want = made(one), F.linear(other, dense(made, b, a, values), bias)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(want)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for mine, true in zip((made.B, made.A, made.values, made.bias, one), (b, a, values, bias, other), strict=True):
        torch.testing.assert_close(mine.grad, true.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [MANY, FEW])
def test_gradients_pass_gradcheck(rows: int) -> None:
    made = SLTrainLinear(6, 5, rank=2, density=0.2, alpha=3.0, bias=False).double()
    x = torch.randn(rows if rows == FEW else 8, 6, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, b: Tensor, a: Tensor, values: Tensor) -> Tensor:
        return torch.func.functional_call(made, {"B": b, "A": a, "values": values}, (x,))

    starts = [torch.randn_like(p).requires_grad_() for p in (made.B, made.A, made.values)]
    assert torch.autograd.gradcheck(f, (x, *starts))


def test_frozen_parts_and_inputs_get_no_gradient() -> None:
    made, x = layer(), torch.randn(MANY, 40, dtype=torch.float64)
    made(x).sum().backward()
    assert x.grad is None
    want = made.values.grad.clone()
    made.zero_grad()
    made.A.requires_grad_(False)
    made(x).sum().backward()
    assert made.A.grad is None
    assert torch.equal(made.values.grad, want)
    made.requires_grad_(False)
    made(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(x.grad, made.weight.sum(0).expand_as(x))


def test_the_operator_keeps_its_promises_to_torch() -> None:
    made = layer()
    inputs = [made.B, made.A, made.values, made.low, made.counts, made.scaling]
    for rows in (MANY, FEW):
        x = torch.randn(rows, 40, dtype=torch.float64, requires_grad=True)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.fallow.low_rank_sparse, (x, *inputs), test_utils=checks)


def test_start_is_the_sparse_matrix_alone_within_one_over_root_in() -> None:
    torch.manual_seed(0)
    made = SLTrainLinear(400, 300, rank=16, density=0.03)
    count = math.floor(0.03 * 400 * 300)
    weight = made.weight.detach()
    assert int(weight.count_nonzero()) == count == len(made.values)
    assert torch.equal(weight.flatten()[made.index.long()], made.values.detach())
    assert float(weight.abs().max()) <= 1 / math.sqrt(400)
    assert float(weight.var()) == pytest.approx(0.03 / (3 * 400), rel=0.05)
    assert float(made.A.detach().std()) == pytest.approx(1 / math.sqrt(3 * 400), rel=0.03)
    assert made.B.count_nonzero() == 0
    assert 0.9 / math.sqrt(300) < float(made.bias.detach().abs().max()) <= 1 / math.sqrt(300)
    assert made.scaling == 32 / 16


@pytest.mark.parametrize(("numel", "count"), [(1000, 30), (1000, 500), (1000, 700), (1000, 1000), (1, 1), (10**6, 7)])
def test_places_are_distinct_sorted_and_as_many_as_asked(numel: int, count: int) -> None:
    index = distinct(numel, count, torch.Generator().manual_seed(0))
    assert index.numel() == count
    assert bool((index.diff() > 0).all())
    assert 0 <= int(index[0]) <= int(index[-1]) < numel


def test_places_are_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = torch.zeros(20)
    for _ in range(3000):
        hits[distinct(20, 6, generator)] += 1
    assert float((hits - 900).abs().max()) < 4 * math.sqrt(3000 * 0.3 * 0.7)


def test_rows_have_as_many_places_each_or_one_more() -> None:
    index = distinct_by_rows((30, 50), 100, torch.Generator().manual_seed(0))
    assert index.numel() == 100
    assert bool((index.diff() > 0).all())
    assert sorted(set(torch.bincount(index // 50, minlength=30).tolist())) == [3, 4]


def test_drawing_places_takes_memory_of_the_order_of_their_number(peak_bytes: Callable[..., int]) -> None:
    count = 30_000
    assert peak_bytes(lambda: distinct(10**6, count, torch.Generator().manual_seed(0))) < 12 * 8 * count < 8 * 10**6


def test_supports_differ_between_layers_and_agree_between_ranks() -> None:
    models = [transformer() for _ in range(3)]
    for number, model in enumerate(models):
        torch.manual_seed(number)  # ranks whose global generators are apart
        sltrain(model, rank=4, density=0.1, seed=number // 2)
    first, again, other = ([m.index for m in model.modules() if isinstance(m, SLTrainLinear)] for model in models)
    assert len(first) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[2])  # the same shape, another layer


def test_places_never_move_and_all_else_stays_zero_in_training() -> None:
    made, x = layer(torch.float32), torch.randn(50, 40)
    before = made.index.clone()
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        made(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(made.index, before)
    rest = made.to_dense().weight - made.scaling * made.B @ made.A
    rest.view(-1)[made.index.long()] = 0
    assert float(rest.abs().max()) < 1e-6


def test_sparse_part_makes_the_rank_full_where_low_rank_stays_at_r() -> None:
    torch.manual_seed(0)
    ranks = {}
    for density in (2 * math.log(128) / 128, 0.005):
        made = SLTrainLinear(128, 128, rank=8, density=density, alpha=8).double()
        optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
        target = torch.randn(128, 128, dtype=torch.float64)
        for _ in range(5):
            optimizer.zero_grad()
            (made.weight - target).square().sum().backward()
            optimizer.step()
        ranks[density] = int(torch.linalg.matrix_rank(made.weight))
        assert int(torch.linalg.matrix_rank(made.B @ made.A)) == 8
    full, few = ranks.values()
    assert full == 128
    assert 8 < few < 128


@pytest.mark.parametrize("rank", [3, 0])
def test_dense_layer_gives_the_same_output(rank: int) -> None:
    made, x = layer(torch.float32, rank=rank), torch.randn(50, 7, 40)
    plain = made.eval().to_dense()
    assert type(plain) is nn.Linear
    assert not plain.training
    torch.testing.assert_close(plain(x), made(x), rtol=1e-5, atol=1e-5)


def test_state_dict_holds_the_places_and_continues_training_bit_for_bit() -> None:
    model = transformer()
    sltrain(model, rank=4, density=0.1, seed=1)
    twin = transformer()
    sltrain(twin, rank=4, density=0.1, seed=2)  # other places, until it is loaded

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        torch.manual_seed(5)
        for _ in range(3):
            optimizer.zero_grad()
            x = torch.randn(20, 32)
            for block in model:
                x = x + block["head"](block["mlp"](block["attn"]["q"](x)))
            x.square().sum().backward()
            optimizer.step()

    first = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, first)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert {"0.mlp.A", "0.mlp.B", "0.mlp.values", "0.mlp.low", "0.mlp.counts", "0.mlp.bias"} <= set(state)
    twin.load_state_dict(state)
    second = torch.optim.Adam(twin.parameters(), lr=1e-2)
    second.load_state_dict(deepcopy(first.state_dict()))
    train(model, first)
    train(twin, second)
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_of_the_size_of_w_is_kept_for_the_backward_or_among_the_states(compiled: bool) -> None:
    made = SLTrainLinear(96, 80, rank=4, density=0.05)
    x = torch.randn(64, 96, requires_grad=True)
    run = torch.compile(made, fullgraph=True, backend="aot_eager") if compiled else made
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = run(x)
    optimizer = torch.optim.Adam(made.parameters())
    y.sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    alive = [*kept, *made.parameters(), *made.buffers(), *(p.grad for p in made.parameters()), *states]
    assert kept
    assert max(t.numel() for t in alive if t is not x and t.numel() != x.numel()) < 80 * 96 / 8
    kept_places = {t.untyped_storage().data_ptr(): t for t in kept}
    ours = {t.untyped_storage().data_ptr() for t in (x, *made.parameters(), *made.buffers())}
    assert set(kept_places) <= ours  # x and what W is made of, nothing new


@pytest.mark.parametrize("needs", [True, False])
def test_one_dense_temporary_is_alive_at_a_time(peak_bytes: Callable[..., int], needs: bool) -> None:
    made = SLTrainLinear(512, 512, rank=8, density=0.01)
    x = torch.randn(128, 512, requires_grad=needs)
    whole, rows = 4 * 512 * 512, 4 * 128 * 512
    peak = peak_bytes(lambda: made(x).sum().backward())
    assert whole < peak < 1.2 * whole + 3 * rows


def test_few_rows_form_no_weight(peak_bytes: Callable[..., int]) -> None:
    made, x = SLTrainLinear(512, 512, rank=8, density=0.01), torch.randn(8, 512)
    assert peak_bytes(lambda: made(x).sum().backward()) < 4 * 512 * 512


def test_a_layer_holds_r_rows_and_columns_k_values_and_about_one_byte_a_place() -> None:
    made = SLTrainLinear(768, 640, rank=16, density=0.03)
    count = math.floor(0.03 * 768 * 640)
    assert sum(p.numel() for p in made.parameters()) == 16 * (768 + 640) + count + 640
    held = sum(t.nbytes for t in made.buffers())
    assert held == packed(count, 768 * 640)[1] < 1.3 * count


@pytest.mark.parametrize(
    ("width", "inner", "blocks", "rank", "millions", "gigabytes"),
    [
        (512, 1376, 8, 128, 44, 0.27),
        (768, 2048, 12, 256, 97, 0.60),
        (1024, 2736, 24, 256, 194, 1.24),
        (2048, 5461, 24, 512, 646, 4.16),
    ],
)
def test_formula_gives_the_papers_parameters_and_memory(
    width: int, inner: int, blocks: int, rank: int, millions: int, gigabytes: float
) -> None:
    shapes = blocks * [*[(width, width)] * 4, *[(inner, width)] * 2, (width, inner)]
    options = SLTrain.Options(rank=rank, density=0.03)
    trained = sum(SLTrain.parameter_count(shape, options) for shape in shapes)
    places = trained - sum(rank * sum(shape) for shape in shapes)
    whole = trained + 2 * 32000 * width + (2 * blocks + 1) * width  # embedding, head and norms
    assert whole / 1e6 == pytest.approx(millions, abs=0.6)
    assert (6 * whole + 8 * places) / 1e9 == pytest.approx(gigabytes, abs=0.006)  # the paper's int64 places


# -- other dtypes, compiling, checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [MANY, FEW])
@pytest.mark.parametrize("way", ["inputs", "autocast", "all"])
def test_bf16_inputs_and_float32_parameters_go_together(rows: int, way: str) -> None:
    made = layer(torch.bfloat16 if way == "all" else torch.float32)
    x = torch.randn(rows, 40, dtype=torch.float32 if way == "autocast" else torch.bfloat16)
    b, a, values, bias = (p.detach().float() for p in (made.B, made.A, made.values, made.bias))
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        y = made(x)
    assert y.dtype == torch.bfloat16
    want = F.linear(x.float(), dense(made, b, a, values), bias)
    torch.testing.assert_close(y.float(), want, rtol=3e-2, atol=3e-2 * float(want.abs().max()))
    y.float().square().sum().backward()
    assert made.values.grad.dtype == made.values.dtype
    assert float(made.values.grad.abs().max()) > 0


@pytest.mark.parametrize("rows", [MANY, FEW])
def test_compiled_and_checkpointed_layers_have_the_same_gradients(rows: int) -> None:
    made, x = layer(), torch.randn(rows, 40, dtype=torch.float64)

    def grads(forward: Any) -> list[Tensor]:
        made.zero_grad()
        forward(x).square().sum().backward()
        return [p.grad for p in made.parameters()]

    once = grads(made)
    for forward in (
        lambda t: checkpoint(made, t, use_reentrant=False),
        torch.compile(made, fullgraph=True, backend="aot_eager"),
    ):
        for got, want in zip(grads(forward), once, strict=True):
            torch.testing.assert_close(got, want)


# -- replacing the layers of a model ----------------------------------------------------------------------------------


def test_named_linear_layers_are_replaced_and_others_are_not() -> None:
    model = transformer().to(torch.bfloat16).eval()
    assert sltrain(model, rank=4) == ["0.attn.q", "0.mlp", "1.attn.q", "1.mlp"]
    assert type(model[0]["head"]) is nn.Linear
    made = model[1]["mlp"]
    assert isinstance(made, SLTrainLinear)
    assert made.values.dtype == torch.bfloat16
    assert not made.training
    assert sltrain(transformer(), rank=4, target_modules=["head"]) == ["0.head", "1.head"]


def test_a_layer_used_twice_stays_one() -> None:
    one = nn.Linear(8, 8)
    model = nn.ModuleDict({"mlp1": one, "mlp2": one})
    assert sltrain(model, rank=2, density=0.2) == ["mlp1", "mlp2"]
    assert model["mlp1"] is model["mlp2"]


@pytest.mark.parametrize("support", ["uniform", "rows", "largest"])
def test_compressed_layer_is_the_truncation_plus_what_it_leaves_at_the_support(support: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": nn.Linear(40, 24)}).double()
    plain = deepcopy(model["mlp"])
    sltrain(model, rank=3, density=0.25, alpha=5.0, start="compress", support=support)
    made, weight = model["mlp"], plain.weight.detach()
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    residual = weight - (u[:, :3] * s[:3]) @ vt[:3]
    torch.testing.assert_close(made.scaling * made.B @ made.A, weight - residual)
    torch.testing.assert_close(made.B.norm(dim=0), made.A.norm(dim=1))  # the root on both sides
    torch.testing.assert_close(made.values, residual.flatten()[made.index.long()])
    left = (weight - made.weight).norm()
    assert float(left) < float(residual.norm())
    if support == "largest":
        least = residual.abs().flatten().sort(descending=True).values[len(made.values) - 1]
        assert float(made.values.abs().min()) == pytest.approx(float(least))
    assert torch.equal(made.bias, plain.bias)


def test_compression_to_full_density_and_no_rank_is_the_weight_itself() -> None:
    model = nn.ModuleDict({"mlp": nn.Linear(40, 24)})
    weight = model["mlp"].weight.detach().clone()
    sltrain(model, rank=0, density=1.0, start="compress")
    assert torch.equal(model["mlp"].weight, weight)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"rank": 33}, r"rank=33 is above what '0.attn.q' of \(32, 32\)"),
        ({"rank": -1}, "rank=-1"),
        ({"density": 0}, "density=0"),
        ({"density": 1.5}, "density=1.5"),
        ({"density": 1e-6}, "density=1e-06 leaves a weight of"),
        ({"alpha": 0}, "alpha=0"),
        ({"start": "svd"}, "start='svd'"),
        ({"support": "columns"}, "support='columns'"),
        ({"support": "largest"}, "start='compress'"),
        ({"target_modules": ["conv"]}, r"target_modules=\['conv'\] is in the path of no Linear.*0.attn.q"),
    ],
)
def test_mistakes_are_told_by_name_and_nothing_is_replaced(bad: dict[str, Any], told: str) -> None:
    model = transformer()
    with pytest.raises(ConfigError, match=told):
        sltrain(model, **{"rank": 4, **bad})
    assert not any(isinstance(m, SLTrainLinear) for m in model.modules())


def test_layers_on_the_meta_device_are_refused() -> None:
    with pytest.raises(ModelError, match="meta device"):
        sltrain(transformer().to("meta"), rank=4)


# -- the Delta --------------------------------------------------------------------------------------------------------


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    base = LAYERS[kind]().to(dtype)
    model = OneLayer(base, "sltrain", **{"rank": 3, "density": 0.1, **options})
    model.delta.randomize()
    return model, inputs(base)


@pytest.mark.parametrize("kind", ALL)
def test_delta_leaves_the_output_unchanged_at_the_start(kind: str) -> None:
    torch.manual_seed(0)
    base = LAYERS[kind]()
    model, x = OneLayer(base, "sltrain", rank=2), inputs(base)
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=0)
    assert model.delta.A.count_nonzero() == model.delta.A.numel()


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("support", ["uniform", "rows"])
def test_delta_is_s_b_a_plus_the_values_at_their_places(kind: str, support: str) -> None:
    model, x = adapted(kind, alpha=4.5, support=support)
    base, delta, view = model.layer, model.delta, view_of(model.layer)
    b, a, values = (p.detach().clone().requires_grad_() for p in (delta.B, delta.A, delta.values))
    sparse = torch.zeros(b.shape[0] * a.shape[1], dtype=torch.float64).scatter(0, delta.index.long(), values)
    weight = view.read(base.weight) + 1.5 * b @ a + sparse.view(b.shape[0], -1)
    one, other = (t.clone().requires_grad_() if t.is_floating_point() else t for t in (x, x))
    want = torch.func.functional_call(base, {"weight": view.write(weight, base.weight)}, (other,))
    got = model(one)
    backward_both(got, want)
    for mine, true in zip((delta.B, delta.A, delta.values), (b, a, values), strict=True):
        torch.testing.assert_close(mine.grad, true.grad)
    if x.is_floating_point():
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(model.merged(), weight.detach())
    torch.testing.assert_close(delta.inverse(model.merged()), view.read(base.weight))
    torch.testing.assert_close(delta.delta_weight(), weight - view.read(base.weight))
    model.scale = 0.5
    torch.testing.assert_close(model.by_merged(x), model(x))


@pytest.mark.parametrize("kind", ["linear", "grouped", "embedding"])
def test_parameter_count_of_the_delta_is_rank_rows_columns_and_the_share(kind: str) -> None:
    model, _ = adapted(kind)
    out, inner = model.view.shape
    count = 3 * (out + inner) + math.floor(0.1 * out * inner)
    assert SLTrain.parameter_count((out, inner), model.delta.o) == count
    assert sum(p.numel() for p in model.delta.parameters()) == count


def test_delta_keeps_no_second_weight_for_the_backward(peak_bytes: Callable[..., int]) -> None:
    model = OneLayer(nn.Linear(512, 512), "sltrain", rank=4, density=0.01)
    x = torch.randn(16, 512)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model(x)
    assert max(kept) < 512 * 512 / 4
    assert peak_bytes(lambda: model(x).sum().backward()) < 2.3 * 4 * 512 * 512  # W' and its gradient


def test_delta_on_a_bf16_base_is_trained_in_float32_and_state_goes_on_bit_for_bit() -> None:
    model, x = adapted("linear", torch.bfloat16)
    optimizer = torch.optim.AdamW(model.delta.parameters(), lr=1e-2)

    def steps(model: OneLayer, optimizer: torch.optim.Optimizer) -> Tensor:
        for _ in range(2):
            optimizer.zero_grad()
            y = model(x)
            y.float().square().sum().backward()
            optimizer.step()
        return y

    y = steps(model, optimizer)
    assert y.dtype == torch.bfloat16
    assert {p.dtype for p in model.delta.parameters()} == {torch.float32}
    assert set(model.delta.state_dict()) == {"A", "B", "values"}  # the places are drawn again
    other = OneLayer(model.layer, "sltrain", rank=3, density=0.1, fresh=False)
    other.delta.load_state_dict(model.delta.state_dict())
    resumed = torch.optim.AdamW(other.delta.parameters(), lr=1e-2)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    assert torch.equal(steps(model, optimizer), steps(other, resumed))


def test_compiled_delta_has_the_same_gradients() -> None:
    model, x = adapted("linear")
    grads = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        forward(x).square().sum().backward()
        grads.append([p.grad for p in model.delta.parameters()])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 13}, "rank=13 is above"),
        ({"alpha": 0}, "alpha=0"),
        ({"density": 0.0}, "density=0.0"),
        ({"density": 0.001}, r"density=0.001 leaves a weight of \(20, 12\) no entry"),
        ({"support": "largest"}, "support='largest'"),
        ({"sparsity": 0.1}, "no option sparsity=0.1"),
    ],
)
def test_impossible_options_of_the_delta_are_refused_by_name(bad: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        OneLayer(nn.Linear(12, 20), "sltrain", **{"rank": 2, **bad})
