"""MoSA against its equations: the partition, experts that take turns, their mean, and the two passes that agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from one_layer import LAYERS, OneLayer, inputs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fallow.core.errors import ConfigError
from fallow.core.views import view_of
from fallow.deltas.mosa import MoSA, partition, symmetric_kl

ALL = sorted(LAYERS)
SHARES = ["down", "up", "none"]


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    model = OneLayer(layer, "mosa", **{"rank": 3, **options})
    model.delta.randomize()
    return model, inputs(layer)


def draw(model: OneLayer, *experts: int) -> None:
    """Let the next draws be these: for B, then for A."""
    left = list(experts)
    model.delta._draw = lambda: torch.tensor(left.pop(0))


def by_equation(model: OneLayer, x: Tensor, expert: int, a: Tensor, b: Tensor) -> Tensor:
    layer, delta, view = model.layer, model.delta, view_of(model.layer)
    if "B" in delta.split:
        b = b * (delta.B_owner == expert)
    if "A" in delta.split:
        a = delta.A_start + a * (delta.A_owner == expert)
    s = 1.0 if delta.o.alpha is None else delta.o.alpha / delta.o.rank
    weight = view.write(view.read(layer.weight) + s * b @ a, layer.weight)
    return torch.func.functional_call(layer, {"weight": weight}, (x,))


@pytest.mark.parametrize("kind", ["all", "row", "column"])
@pytest.mark.parametrize("shape", [(7, 11), (16, 5), (300, 4)])
@pytest.mark.parametrize("experts", [1, 3, 4])
def test_masks_are_a_partition_into_equal_parts(kind: str, shape: tuple[int, int], experts: int) -> None:
    owner = partition(shape, experts, kind, torch.Generator().manual_seed(1))
    assert owner.shape == shape
    assert owner.dtype == torch.uint8
    masks = torch.stack([owner == j for j in range(experts)])
    assert bool((masks.sum(0) == 1).all())  # disjoint, and nothing is left out
    sizes = {"all": masks.flatten(1).sum(1)[:, None], "row": masks.sum(2), "column": masks.sum(1)}[kind]
    assert int((sizes.amax(0) - sizes.amin(0)).max()) <= 1
    assert not torch.equal(owner, partition(shape, experts, kind, torch.Generator().manual_seed(2))) or experts == 1


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("share", SHARES)
def test_output_is_unchanged_at_the_start_in_training_and_after(kind: str, share: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    model, x = OneLayer(layer, "mosa", rank=4, experts=2, share=share), inputs(layer)
    assert torch.equal(model(x), layer(x))
    assert torch.equal(model.eval()(x), layer(x))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("share", SHARES)
def test_a_drawn_expert_is_its_masked_matrix_in_values_and_gradients(kind: str, share: str) -> None:
    model, x = adapted(kind, share=share, alpha=4.5)
    delta = model.delta
    for expert in range(4):
        a, b = (p.detach().clone().requires_grad_() for p in (delta.A, delta.B))
        draw(model, *[expert] * len(delta.split))
        model.zero_grad()
        got, want = model(x), by_equation(model, x, expert, a, b)
        torch.testing.assert_close(got, want)
        weights = torch.randn_like(got)
        (got * weights).sum().backward()
        (want * weights).sum().backward()
        torch.testing.assert_close(delta.A.grad, a.grad)
        torch.testing.assert_close(delta.B.grad, b.grad)
        for name in delta.split:
            assert getattr(delta, name).grad[getattr(delta, f"{name}_owner") != expert].count_nonzero() == 0


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("share", ["down", "up"])
def test_evaluation_gives_the_mean_of_the_experts_outputs(kind: str, share: str) -> None:
    model, x = adapted(kind, share=share)
    outputs = []
    for expert in range(4):
        draw(model, expert)
        outputs.append(model(x))
    torch.testing.assert_close(model.eval()(x), torch.stack(outputs).mean(0))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("share", SHARES)
def test_merged_equals_evaluation_and_has_theta_over_e(kind: str, share: str) -> None:
    model, x = adapted(kind, share=share, alpha=6.0)
    delta = model.delta
    merged = model.merged()  # while it still trains
    b = delta.B / 4 if "B" in delta.split else delta.B
    a = delta.A_start + delta.A / 4 if "A" in delta.split else delta.A
    torch.testing.assert_close(merged, model.view.read(model.layer.weight) + 2.0 * b @ a)
    model.eval()
    torch.testing.assert_close(model.by_merged(x), model(x))
    model.scale = 0.5
    torch.testing.assert_close(model.by_merged(x), model(x))


@pytest.mark.parametrize("share", SHARES)
def test_what_is_stored_and_what_is_merged_have_the_shapes_of_a_plain_lora(share: str) -> None:
    model, x = adapted("linear", share=share)
    plain = OneLayer(model.layer, "lora", rank=3)
    assert {k: v.shape for k, v in model.delta.state_dict().items()} == {
        k: v.shape for k, v in plain.delta.state_dict().items()
    }
    b, a = model.delta.factors()
    plain.delta.load_state_dict({"A": a.detach(), "B": b.detach()})
    torch.testing.assert_close(plain(x), model.eval()(x))
    assert MoSA.parameter_count((20, 12), model.delta.o) == 3 * 32
    assert sum(p.numel() for p in model.delta.parameters()) == 3 * 32


def train(model: OneLayer, x: Tensor, optimizer: torch.optim.Optimizer, experts: list[int | None]) -> None:
    for expert in experts:
        if expert is not None:
            draw(model, expert)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_only_the_entries_of_the_expert_whose_turn_it_was_are_stepped(make: Callable[..., Any]) -> None:
    model, x = adapted("linear")
    delta = model.delta
    optimizer = make(
        delta.parameters(), lr=1e-2, weight_decay=0.1, **({"momentum": 0.9} if make is not torch.optim.AdamW else {})
    )
    for expert in (0, 1, 2, 3, 1):
        before = {k: v.clone() for k, v in delta.state_dict().items()}
        states = {k: v.clone() for k, v in optimizer.state[delta.B].items() if isinstance(v, Tensor) and v.dim()}
        train(model, x, optimizer, [expert])
        turn = delta.B_owner == expert
        assert torch.equal(delta.B[~turn], before["B"][~turn])
        assert bool((delta.B[turn] != before["B"][turn]).all())
        assert bool((before["A"] != delta.A).all())
        for key, state in states.items():
            now = optimizer.state[delta.B][key]
            assert torch.equal(now[~turn], state[~turn])
            assert bool((now[turn] != state[turn]).any())


def test_dense_adam_moves_experts_that_had_no_turn_by_momentum_and_decay() -> None:
    model, x = adapted("linear", dense_adam=True)
    optimizer = torch.optim.AdamW(model.delta.parameters(), lr=1e-2)
    train(model, x, optimizer, [0])
    before = model.delta.B.detach().clone()
    train(model, x, optimizer, [1])
    assert bool((before != model.delta.B)[model.delta.B_owner == 0].all())


def test_copies_take_turns_too() -> None:
    model, x = adapted("linear")
    twin = deepcopy(model)
    optimizer = torch.optim.AdamW(twin.delta.parameters(), lr=1e-2)
    before = twin.delta.B.detach().clone()
    train(twin, x, optimizer, [2])
    assert torch.equal((before != twin.delta.B), twin.delta.B_owner == 2)


def test_one_expert_is_lora_step_for_step() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 20).double()
    model, plain, x = OneLayer(layer, "mosa", rank=3, experts=1), OneLayer(layer, "lora", rank=3), inputs(layer)
    plain.delta.load_state_dict(model.delta.state_dict())
    for each in (model, plain):
        train(each, x, torch.optim.AdamW(each.delta.parameters(), lr=1e-2), [None] * 5)
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model.delta.A, plain.delta.A)


def test_draws_are_even_and_differ_between_a_and_b_and_between_forwards() -> None:
    model, _ = adapted("linear", share="none")
    seen = torch.zeros(4, 4)
    for _ in range(1600):
        b, a = model.delta._expert()
        one = int(model.delta.B_owner[b != 0][0])
        other = int(model.delta.A_owner[(a - model.delta.A_start).abs() > 1e-12][0])
        seen[one, other] += 1
    assert float(seen.min()) > 60  # 100 expected, deviation 9.7
    assert float(seen.max()) < 140


def test_two_passes_of_one_batch_have_draws_of_their_own() -> None:
    context: dict[str, Any] = {"passes": 2}
    torch.manual_seed(0)
    layer = nn.Linear(12, 20).double()
    model, x = OneLayer(layer, "mosa", rank=3, context=context), inputs(layer)
    model.delta.randomize()
    draw(model, 1, 2)
    first, second = model(torch.cat([x, x])).chunk(2)
    torch.testing.assert_close(first, by_equation(model, x, 1, model.delta.A, model.delta.B))
    torch.testing.assert_close(second, by_equation(model, x, 2, model.delta.A, model.delta.B))
    (first.sum() + second.sum()).backward()
    assert torch.equal(model.delta.B.grad != 0, (model.delta.B_owner == 1) | (model.delta.B_owner == 2))
    with pytest.raises(ConfigError, match="passes=2 do not divide the 3 samples that 'layer' sees"):
        model(x)


def test_symmetric_kl_is_its_formula_and_sends_gradients_to_both() -> None:
    torch.manual_seed(0)
    one, two = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    got = symmetric_kl(one, two)
    p, q = one.softmax(-1), two.softmax(-1)
    want = ((q * (q.log() - p.log())).sum(-1).mean() + (p * (p.log() - q.log())).sum(-1).mean()) / 2
    torch.testing.assert_close(got, want)
    grads = torch.autograd.grad(got, [one, two])
    fixed_p, fixed_q = p.detach(), q.detach()
    to_one = torch.autograd.grad((fixed_q * (fixed_q.log() - one.log_softmax(-1))).sum(-1).mean() / 2, one)[0]
    to_two = torch.autograd.grad((fixed_p * (fixed_p.log() - two.log_softmax(-1))).sum(-1).mean() / 2, two)[0]
    torch.testing.assert_close(grads[0], to_one)
    torch.testing.assert_close(grads[1], to_two)
    assert float(symmetric_kl(one, one)) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(symmetric_kl(one.view(2, 3, 5), two.view(2, 3, 5)), got)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_forwards_repeat_their_draws(reentrant: bool) -> None:
    model, x = adapted("linear", share="none")
    x.requires_grad_()

    def grads(forward: Any) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        sum(forward(x).square().sum() for _ in range(3)).backward()
        return [p.grad for p in model.delta.parameters()]

    for got, want in zip(grads(lambda t: checkpoint(model, t, use_reentrant=reentrant)), grads(model), strict=True):
        torch.testing.assert_close(got, want)


def test_one_compiled_graph_serves_all_experts() -> None:
    model, x = adapted("linear", torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    seen = set()
    for _ in range(24):
        model.zero_grad()
        got = compiled(x)
        got.square().sum().backward()
        (expert,) = model.delta.B_owner[model.delta.B.grad != 0].unique().tolist()
        want = by_equation(model, x, expert, model.delta.A, model.delta.B)
        torch.testing.assert_close(got, want)
        seen.add(expert)
    assert seen == {0, 1, 2, 3}
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
def test_bf16_base_keeps_no_float32_copy_of_the_input(kind: str) -> None:
    model, x = adapted(kind, torch.bfloat16, rank=1, experts=2)
    delta = model.delta
    assert delta.A.dtype == torch.float32
    known = {t.untyped_storage().data_ptr() for t in (x, model.layer.weight, delta.A, delta.B)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x.requires_grad_())
    assert y.dtype == torch.bfloat16
    new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert sum(size for place, size in new.items() if place not in known) < x.numel() * 4


def test_memory_of_training_is_one_matrix_and_one_byte_an_entry_whatever_the_number_of_experts() -> None:
    sizes = {}
    for experts in (2, 8):
        delta = OneLayer(nn.Linear(64, 96), "mosa", rank=8, experts=experts).delta
        sizes[experts] = sum(t.nbytes for t in [*delta.parameters(), *delta.buffers()])
    assert sizes[2] == sizes[8] == 4 * 8 * (64 + 96) + 96 * 8


def test_owners_are_drawn_again_alike_and_state_continues_training_bit_for_bit() -> None:
    model, x = adapted("linear", torch.float32, share="none")
    optimizer = torch.optim.AdamW(model.delta.parameters(), lr=1e-2)
    train(model, x, optimizer, [None] * 3)
    other = OneLayer(model.layer, "mosa", rank=3, share="none", fresh=False)
    assert set(model.delta.state_dict()) == {"A", "B"}
    other.delta.load_state_dict(model.delta.state_dict())
    assert torch.equal(model.delta.B_owner, other.delta.B_owner)
    assert torch.equal(model.delta.A_start, other.delta.A_start)
    resumed = torch.optim.AdamW(other.delta.parameters(), lr=1e-2)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (other, resumed)):
        torch.manual_seed(9)
        train(each, x, its, [None] * 3)
    assert torch.equal(model.eval()(x), other.eval()(x))


def test_start_of_a_is_kaimings() -> None:
    torch.manual_seed(0)
    bound = 1 / math.sqrt(400)
    for share, name in (("down", "A"), ("up", "A_start")):
        a = getattr(OneLayer(nn.Linear(400, 300), "mosa", rank=64, share=share).delta, name).detach()
        assert float(a.abs().max()) <= bound
        assert float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_a_parameter_that_its_module_reads_itself_has_drawn_experts_in_training() -> None:
    from fallow.core.views import ParameterView

    model, _ = adapted("linear")
    delta = model.delta
    delta.view = ParameterView(model.layer.weight)
    draw(model, 3)
    torch.testing.assert_close(delta.delta_weight(), (delta.B * (delta.B_owner == 3)) @ delta.A)
    delta.eval()
    torch.testing.assert_close(delta.delta_weight(), delta.B / 4 @ delta.A)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 13}, "rank=13 is above"),
        ({"alpha": -1}, "alpha=-1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"experts": 0}, "experts=0"),
        ({"experts": 257}, "experts=257"),
        ({"share": "both"}, "share='both'"),
        ({"partition": "block"}, "partition='block'"),
        ({"dense_adam": "yes"}, "dense_adam='yes'"),
        ({"rank": 2, "experts": 3, "partition": "row"}, r"experts=3 get nothing of some row .* give at most 2"),
        ({"rank": 1, "experts": 21}, r"experts=21 get nothing .* give at most 20"),
        ({"merge": "joint"}, "no option merge='joint'"),
    ],
)
def test_impossible_options_are_refused_by_name(bad: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        OneLayer(nn.Linear(12, 20), "mosa", **bad)
