"""MoS against a slow build of its factors, and against LoRA."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import pytest
import torch
from one_layer import LAYERS, OneLayer, inputs, with_matrix
from safetensors.torch import save
from torch import Tensor, nn

import fallow.deltas.lora  # noqa: F401  # the yardstick
from fallow.core.errors import ConfigError
from fallow.core.views import view_of
from fallow.deltas.mos import MoS

SPECIAL = {"rank": 6, "equivalent_rank": 3, "shards": 4, "private_rank": 1, "dropout": 0.0}
KINDS = ["linear", "wide", "conv", "conv1d", "grouped", "embedding"]


def group(
    layers: int = 4, kind: str = "linear", dtype: torch.dtype = torch.float64, seed: int = 0, **options: object
) -> list[OneLayer]:
    """Layers of one type that share a pool, changed."""
    torch.manual_seed(0)
    common = nn.Module()
    made = [
        OneLayer(LAYERS[kind]().to(dtype), "mos", common=common, name=f"blocks.{i}.q", seed=seed, **(SPECIAL | options))
        for i in range(layers)
    ]
    for model in made:
        model.delta.randomize()
    return made


def slow(delta: MoS, pools: Sequence[Tensor], private: Sequence[Tensor]) -> Tensor:
    """D (out, in): rows of A and columns of B, one shard after the other."""
    o, sides = delta.o, []
    for side, (pool, own) in enumerate(zip(pools, private, strict=True)):
        index = delta.shared(delta.index)[side, delta.place].tolist()
        vectors = []
        for j in range(o.rank - o.private_rank):
            vectors.append(torch.cat([pool[row] for row in index[j * o.shards : (j + 1) * o.shards]]))
        sides.append(torch.stack([*vectors, *own]))
    a, bt = sides
    assert a.shape == (o.rank, delta.view.shape[1])
    return o.alpha / o.rank * sum(torch.outer(bt[j], a[j]) for j in range(o.rank))


def tensors(delta: MoS) -> tuple[list[Tensor], list[Tensor]]:
    return [delta.shared(name) for name in delta.pools], [delta.private_a, delta.private_b]


@pytest.mark.parametrize("kind", KINDS)
def test_output_is_unchanged_at_the_start_bit_for_bit(kind: str) -> None:
    common = nn.Module()
    for i in range(3):
        layer = LAYERS[kind]()
        model, x = OneLayer(layer, "mos", common=common, name=f"{i}.q", **SPECIAL), inputs(layer)
        assert torch.equal(model(x), layer(x))
    pool = model.delta.shared(model.delta.pools[1 if kind == "embedding" else 0])
    assert pool.count_nonzero() == pool.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_w_plus_slowly_built_factors_in_values_and_gradients(kind: str) -> None:
    models = group(3, kind)
    x = inputs(models[0].layer)
    pools, _ = tensors(models[0].delta)
    plain = [pool.detach().clone().requires_grad_() for pool in pools]
    for model in models:
        private = [p.detach().clone().requires_grad_() for p in tensors(model.delta)[1]]
        d = slow(model.delta, plain, private)
        w = view_of(model.layer).read(model.layer.weight) + d
        want = with_matrix(model.layer, w, x)
        got = model(x)
        torch.testing.assert_close(model.delta.delta_weight(), d)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(model.by_merged(x), got)
        weights = torch.randn_like(got)
        (got * weights).sum().backward()
        (want * weights).sum().backward()
        for own, other in zip(tensors(model.delta)[1], private, strict=True):
            torch.testing.assert_close(own.grad, other.grad)
    for pool, other in zip(pools, plain, strict=True):  # of all layers together
        torch.testing.assert_close(pool.grad, other.grad)


def test_a_public_shard_gets_the_sum_of_gradients_of_the_vectors_that_it_is_in() -> None:
    models = group(4)
    x = inputs(models[0].layer)
    sum(model(x).square().sum() for model in models).backward()
    pool = models[0].delta.shared(models[0].delta.pools[0])
    want = torch.zeros_like(pool)
    for model in models:
        _, a = model.delta.factors()
        (grad,) = torch.autograd.grad(model(x).square().sum(), [pool], retain_graph=True)  # of this layer alone
        rows = model.delta.shared(model.delta.index)[0, model.delta.place]
        assert set(grad.abs().sum(1).nonzero().flatten().tolist()) == set(rows.tolist())
        want += grad
        assert a.shape == (6, 12)
    torch.testing.assert_close(pool.grad, want)


def test_shards_of_a_layer_are_all_different_and_those_of_a_and_b_are_drawn_apart() -> None:
    models = group(5)
    table = models[0].delta.shared(models[0].delta.index)
    assert table.shape == (2, 5, 5 * 4)
    assert int(table.max()) < len(models[0].delta.shared(models[0].delta.pools[0])) == 2 * 5 * 4
    rows = {tuple(row.tolist()) for side in table for row in side}
    assert len(rows) == 10
    assert all(len(set(row)) == 20 for row in rows)


def test_rows_are_equally_likely() -> None:
    common = nn.Module()
    for i in range(60):
        made = OneLayer(nn.Linear(4, 4), "mos", common=common, name=f"{i}.q", rank=3, equivalent_rank=2, shards=2)
    table = common.get_buffer(made.delta.index)
    counts = torch.bincount(table.flatten(), minlength=120)
    assert counts.sum() == 2 * 60 * 4
    assert ((counts - 4) ** 2 / 4).sum() / 119 == pytest.approx(1.0, abs=0.4)  # chi square
    shared = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(*table, strict=True)) / 60
    assert shared == pytest.approx(4 * 4 / 120, abs=0.1)  # A's and B's rows of a layer have nothing to do with another


def test_private_vectors_are_the_last_and_have_gradients_of_one_layer() -> None:
    first, second, *_ = group(4, private_rank=2)
    b, a = first.delta.factors()
    torch.testing.assert_close(a[-2:], first.delta.private_a)
    torch.testing.assert_close(b[:, -2:].T * (6 / 16), first.delta.private_b)
    first(inputs(first.layer)).square().sum().backward()
    assert first.delta.private_a.grad.abs().min() > 0
    assert second.delta.private_a.grad is None


@pytest.mark.parametrize(("e", "r", "p", "l"), [(2, 8, 0, 1), (3, 6, 1, 4), (4, 4, 4, 2), (3, 3, 2, 4)])
def test_trained_numbers_are_those_of_lora_of_rank_e(e: int, r: int, p: int, l: int) -> None:  # noqa: E741
    models = group(5, equivalent_rank=e, rank=r, private_rank=p, shards=l)
    o, shapes = models[0].delta.o, [model.view.shape for model in models]
    own = sum(param.numel() for model in models for param in model.delta.parameters())
    pooled = sum(param.numel() for param in models[0].common.parameters())
    assert own == sum(MoS.parameter_count(shape, o) for shape in shapes)
    assert pooled == MoS.shared_count(shapes, o)
    assert own + pooled == sum(e * (out + inner) for out, inner in shapes)


def test_pools_are_counted_once_and_the_file_is_of_rank_e() -> None:
    models = group(6, dtype=torch.float32, rank=9, equivalent_rank=2)
    state = models[0].common.state_dict() | {
        f"{i}.{key}": value for i, model in enumerate(models) for key, value in model.delta.state_dict().items()
    }
    assert sum(value.numel() for value in state.values()) == 6 * 2 * (12 + 20)
    assert len(save(state)) < 4 * 6 * 2 * 32 + 2048


def test_all_private_is_lora_step_by_step() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 20)
    x, target = inputs(layer), torch.randn(3, 5, 20)
    mos = OneLayer(layer, "mos", **(SPECIAL | {"rank": 3, "private_rank": 3}), alpha=5.0)
    lora = OneLayer(layer, "lora", rank=3, alpha=5.0)
    assert not list(mos.common.parameters())
    with torch.no_grad():
        lora.delta.A.copy_(mos.delta.private_a), lora.delta.B.copy_(mos.delta.private_b.T)
    steps = [torch.optim.Adam(model.delta.parameters(), 0.01) for model in (mos, lora)]
    for _ in range(5):
        for model, step in zip((mos, lora), steps, strict=True):
            step.zero_grad()
            (model(x) - target).square().mean().backward()
            step.step()
        torch.testing.assert_close(mos(x), lora(x), rtol=0, atol=1e-6)


def test_rank_of_a_trained_layer_is_r_and_above_e() -> None:
    models = group(4)
    steps = torch.optim.Adam(models[0].delta.all_parameters(), 0.01)
    x, target = inputs(models[0].layer), torch.randn(3, 5, 20, dtype=torch.float64)
    for _ in range(5):
        steps.zero_grad()
        sum((model(x) - target).square().sum() for model in models).backward()
        steps.step()
    for model in models:
        values = torch.linalg.svdvals(model.delta.delta_weight().detach())
        assert int((values > 1e-9 * values[0]).sum()) == 6


def test_a_small_group_acts_with_the_rank_that_its_pool_has() -> None:
    for layers, rank in ((1, 3), (2, 5), (3, 6), (4, 6)):  # p + (e - p) L, at most r
        for model in group(layers):
            b, a = model.delta.factors()
            assert b.shape == (20, rank)
            assert a.shape == (rank, 12)
            own = model.delta.private_b
            torch.testing.assert_close(b[:, -1], 16 / rank * own[0])


def test_rows_do_not_depend_on_the_order_in_which_layers_come() -> None:
    found = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        common = nn.Module()
        deltas = {
            i: OneLayer(nn.Linear(12, 20), "mos", common=common, name=f"blocks.{i}.q", **SPECIAL).delta for i in order
        }
        table = common.get_buffer(deltas[0].index)
        found.append([table[:, deltas[i].place].tolist() for i in range(4)])
    assert found[0] == found[1]


def test_pools_and_a_seed_give_the_layers_back() -> None:
    models, again, other = group(3), group(3), group(3, seed=1)
    x = inputs(models[0].layer)
    for copy in (again, other):
        copy[0].common.load_state_dict(models[0].common.state_dict())
        for made, source in zip(copy, models, strict=True):
            made.delta.randomize()
            made.layer.load_state_dict(source.layer.state_dict())
            made.delta.load_state_dict(source.delta.state_dict())
        copy[0].common.load_state_dict(models[0].common.state_dict())
    for one, two, three in zip(models, again, other, strict=True):
        assert torch.equal(one(x), two(x))
        assert not torch.allclose(one(x), three(x))
    assert set(models[0].common.state_dict()) == set(models[0].delta.pools)


def test_types_shapes_and_options_have_pools_of_their_own() -> None:
    def pools(group_by: str) -> int:
        common = nn.Module()
        for name, out in (("0.q", 20), ("0.k", 20), ("0.up", 40), ("1.q", 20)):
            OneLayer(nn.Linear(12, out), "mos", common=common, name=name, group_by=group_by, **SPECIAL)
        OneLayer(nn.Linear(12, 20), "mos", common=common, name="2.q", group_by=group_by, **(SPECIAL | {"shards": 2}))
        return len(list(common.parameters())) // 2

    assert pools("type") == 4
    assert pools("shape") == 3


def test_shards_that_do_not_divide_a_layer_are_as_many_as_do() -> None:
    common = nn.Module()
    for i in range(4):
        delta = OneLayer(nn.Linear(12, 20), "mos", common=common, name=f"{i}.q", **(SPECIAL | {"shards": 6})).delta
    assert delta.shared(delta.pools[0]).shape == (2 * 4 * 2, 6)  # gcd(12, 20, 6) = 2 shards of 6 and of 10
    assert delta.shared(delta.pools[1]).shape == (2 * 4 * 2, 10)
    assert delta.factors()[0].shape == (20, 6)


def test_one_shard_shares_whole_vectors() -> None:
    models = group(4, shards=1)
    pool, rows = models[2].delta.shared(models[2].delta.pools[0]), models[2].delta.shared(models[2].delta.index)[0, 2]
    assert pool.shape == (8, 12)
    torch.testing.assert_close(models[2].delta.factors()[1][:5], pool[rows])


def test_start_has_loras_distribution_of_the_whole_width() -> None:
    torch.manual_seed(0)
    delta = OneLayer(nn.Linear(400, 300), "mos", name="q", rank=60, equivalent_rank=60, private_rank=20).delta
    for part in (delta.private_a, delta.shared(delta.pools[0])):
        assert part.abs().max() <= 1 / 20
        assert part.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.03)


def test_an_interrupted_training_goes_on_bit_for_bit() -> None:
    def train(models: list[OneLayer], steps: torch.optim.Optimizer, times: int) -> None:
        for _ in range(times):
            sum(model(x).square().mean() for model in models).backward()
            steps.step()
            steps.zero_grad()

    def optimizer(models: list[OneLayer]) -> torch.optim.Optimizer:
        return torch.optim.Adam(dict.fromkeys(p for model in models for p in model.delta.all_parameters()), 0.01)

    whole, part, rest = (group(2, dtype=torch.float32) for _ in range(3))
    x = inputs(whole[0].layer)
    first, second, third = map(optimizer, (whole, part, rest))
    train(whole, first, 5)
    train(part, second, 2)
    rest[0].common.load_state_dict(part[0].common.state_dict())
    for new, old in zip(rest, part, strict=True):
        new.delta.load_state_dict(old.delta.state_dict())
    third.load_state_dict(second.state_dict())
    train(rest, third, 3)
    for a, b in zip(rest[0].delta.all_parameters(), whole[0].delta.all_parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("private", [0, 1])
def test_bf16_and_compiled_layers_train_float32(private: int) -> None:
    model = group(3, dtype=torch.bfloat16, private_rank=private)[1]
    x = inputs(model.layer)
    assert model.delta.dtype == torch.float32
    assert model(x).dtype == torch.bfloat16

    def gradients(run: object) -> list[Tensor]:
        for param in model.delta.all_parameters():
            param.grad = None
        run(x).float().square().sum().backward()
        return [p.grad.clone() for p in model.delta.all_parameters()]

    plain = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled), plain, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=5e-2, atol=3e-2 * float(want.abs().max()))


def test_backward_keeps_no_more_than_loras_does_beside_the_shared_pools() -> None:
    model = group(4, dtype=torch.float32)[1]
    x = inputs(model.layer)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        model(x)
    assert max(kept) <= max(x.numel(), 6 * 20)


def test_dropout_acts_on_the_input_in_training_only() -> None:
    model = group(3, dropout=0.5)[0]
    x = inputs(model.layer)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_eighty_layers_of_a_type_are_set_up_in_no_time() -> None:
    common, layer = nn.Module(), nn.Linear(64, 64)
    before = time.process_time()
    for i in range(80):
        OneLayer(layer, "mos", common=common, name=f"{i}.q")
    assert time.process_time() - before < 2.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank=0"),
        ({"equivalent_rank": 0}, "equivalent_rank=0"),
        ({"equivalent_rank": 7}, "equivalent_rank=7"),
        ({"rank": 13, "equivalent_rank": 13}, "equivalent_rank=13 is above"),
        ({"private_rank": 4}, "private_rank=4"),
        ({"private_rank": -1}, "private_rank=-1"),
        ({"private_rank": 3}, "private_rank=3 leaves nothing to share"),
        ({"shards": 0}, "shards=0"),
        ({"alpha": 0}, "alpha=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"group_by": "name"}, "group_by='name'"),
        ({"chunks": 3}, "chunks=3"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        OneLayer(nn.Linear(12, 20), "mos", **(SPECIAL | options))
