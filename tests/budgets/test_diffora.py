"""DiffoRA: the relaxation, the search, what it chooses, and pairs that modules share."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fallow
from fallow.budgets.diffora import DiffoRARanks, best, place_of, rows_of
from fallow.core.errors import ConfigError, DataError, TrainingError
from fallow.core.trimming import adapters
from fallow.recipes.module_gates import Relaxed, Search

LAYERS, KINDS, WIDTH = 6, ("q", "k", "v"), 32


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        for kind in KINDS:
            setattr(self, kind, nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        for kind in KINDS:
            x = x + 0.3 * torch.tanh(getattr(self, kind)(x))
        return x


class Stack(nn.Module):
    def __init__(self, layers: int = LAYERS, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


PLANTED = ("blocks.0.q", "blocks.1.v", "blocks.3.k", "blocks.4.q", "blocks.5.v")


def planted(seed: int) -> tuple[nn.Module, nn.Module]:
    """A base, and a teacher that differs from it by changes of rank 2 in five modules."""
    torch.manual_seed(seed)
    base = Stack()
    teacher = copy.deepcopy(base)
    with torch.no_grad():
        for name in PLANTED:
            weight = teacher.get_submodule(name).weight
            weight += torch.randn(WIDTH, 2) @ torch.randn(2, WIDTH) / math.sqrt(WIDTH)
    return base, teacher


class Endless:
    """Batches of a teacher, drawn anew from a seed."""

    def __init__(self, teacher: nn.Module, seed: int, width: int = WIDTH, size: int = 64) -> None:
        self.teacher, self.seed, self.width, self.size = teacher, seed, width, size

    def __len__(self) -> int:
        return 10_000

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        chance = torch.Generator().manual_seed(self.seed)
        for _ in range(len(self)):
            x = torch.randn(self.size, self.width, generator=chance)
            yield x, self.teacher(x).detach()


def error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def search(seed: int, **options: Any) -> DiffoRARanks:
    base, teacher = planted(seed)
    torch.manual_seed(seed)
    given = {"steps": 200, "warmup": 40, "rank": 4, "targets": r".*\.[qkv]", **options}
    return fallow.search_modules(base, Endless(teacher, 1), Endless(teacher, 2), loss=error, **given)


def auc(scores: dict[str, float]) -> float:
    inside, outside = [s for n, s in scores.items() if n in PLANTED], [s for n, s in scores.items() if n not in PLANTED]
    return sum((a > b) + 0.5 * (a == b) for a in inside for b in outside) / (len(inside) * len(outside))


# -- the planted test -------------------------------------------------------------------------------------------------


def test_sigmoid_gates_find_the_planted_modules() -> None:
    assert auc(search(0, gate="sigmoid").gates) >= 0.95


def test_softmax_gates_find_them_within_their_layers_and_the_sizes_alone_do_without_a_search() -> None:
    found = search(1, score="change")
    for name in PLANTED:
        row = {n: g for n, g in found.gates.items() if found.rows[n] == found.rows[name]}
        assert max(row, key=lambda n: row[n]) == name
    assert auc(found.scores) == 1.0


# -- the relaxation ---------------------------------------------------------------------------------------------------


def relaxed(
    layers: int = 2, width: int = 6, dtype: torch.dtype = torch.float64, **how: Any
) -> tuple[Relaxed, Any, Any]:
    torch.manual_seed(0)
    model = Stack(layers, width).to(dtype)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for param in teacher.parameters():
            param += 0.3 * torch.randn_like(param)
    fallow.attach(model, "diffora", rank=2, name="module_search", expect_gradients=False)
    deltas = dict(adapters(model, "module_search"))
    made = Relaxed(model, deltas, Search(**{"steps": 10, "warmup": 0, **how}), rows_of(list(deltas)), error)
    made.logits = {row: a.detach().to(dtype).requires_grad_() for row, a in made.logits.items()}
    made.of_gates = torch.optim.Adam(list(made.logits.values()), lr=1e-2)
    x = torch.randn(2, 8, width, dtype=dtype)
    batches = [(part, teacher(part).detach()) for part in x]
    return made, batches[0], batches[1]


def randomize(made: Relaxed) -> None:
    for delta in made.deltas.values():
        delta.randomize()


@pytest.mark.parametrize("mean_one", [False, True])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_the_gradient_of_the_gates_is_that_of_finite_differences_and_zero_where_b_is(gate: str, mean_one: bool) -> None:
    made, batch, _ = relaxed(gate=gate, mean_one=mean_one, temperature=(0.7, 0.7))
    logits = list(made.logits.values())
    for grad in torch.autograd.grad(made.loss_at(batch, made.gates()), logits):
        assert not grad.any()
    randomize(made)
    grads = torch.autograd.grad(made.loss_at(batch, made.gates()), logits)
    for a, grad in zip(logits, grads, strict=True):
        for i in range(len(a)):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    a[i] += sign * 1e-5
                    sides.append(float(made.loss_at(batch, made.gates())))
                    a[i] -= sign * 1e-5
            assert float(grad[i]) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-4, abs=1e-9)


def test_gates_of_a_layer_sum_to_one_and_each_step_moves_its_own_side_only() -> None:
    made, batch, other = relaxed()
    randomize(made)
    for names in made.rows.values():
        assert float(sum(made.gates()[name] for name in names)) == pytest.approx(1.0)
    factors = [param.detach().clone() for param in made.factors]
    made.move_gates(other, batch)
    assert all(torch.equal(a, b) for a, b in zip(factors, made.factors, strict=True))
    logits = [a.detach().clone() for a in made.logits.values()]
    assert all(a.any() for a in logits)
    made.move_factors(batch)
    assert all(torch.equal(a, b) for a, b in zip(logits, made.logits.values(), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(factors, made.factors, strict=True))


def test_the_second_order_is_that_of_a_step_that_autograd_has_unrolled() -> None:
    made, batch, other = relaxed(order="second", lr=0.3)
    randomize(made)
    logits = list(made.logits.values())
    before = [param.detach().clone() for param in made.factors]
    got = made.ahead(other, batch)
    assert all(torch.equal(a, b) for a, b in zip(before, made.factors, strict=True))
    step = torch.autograd.grad(made.loss_at(batch, made.gates()), made.factors, create_graph=True)
    moved = [param - 0.3 * grad for param, grad in zip(made.factors, step, strict=True)]
    gates, at = made.gates(), 0
    for name, delta in made.deltas.items():
        pair = {n: moved[at + i] for i, (n, _) in enumerate(delta.named_parameters())}
        at += len(pair)
        made.deltas[name].__dict__["coefficient"] = gates[name]
        delta.__dict__["pair"] = lambda pair=pair: (pair["B"], pair["A"])
    want = torch.autograd.grad(error(made.model, other), logits)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)
    for delta in made.deltas.values():
        del delta.__dict__["pair"]
    first = torch.autograd.grad(made.loss_at(other, made.gates()), logits)
    assert all(float((a - b).abs().max()) > 1e-4 * float(b.abs().max()) for a, b in zip(got, first, strict=True))


def test_the_temperature_falls_and_the_size_of_a_change_needs_no_change() -> None:
    made, _, _ = relaxed(temperature=(1.0, 0.2), steps=11)
    made.steps = 5
    assert made.temperature() == pytest.approx(0.6)
    randomize(made)
    for delta in made.deltas.values():
        b, a = delta.pair()
        torch.testing.assert_close(delta.size(), (delta.scaling * b @ a).norm().detach())


# -- the search around it ---------------------------------------------------------------------------------------------


def small(**options: Any) -> tuple[nn.Module, DiffoRARanks]:
    torch.manual_seed(0)
    model = Stack(2, 8)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for param in teacher.parameters():
            param += 0.2 * torch.randn_like(param)
    batches = (Endless(teacher, 1, 8, 16), Endless(teacher, 2, 8, 16))
    return model, fallow.search_modules(model, *batches, loss=error, **{"steps": 20, "rank": 2, **options})


def test_a_search_leaves_the_model_as_it_was_and_tells_what_it_saw() -> None:
    torch.manual_seed(0)
    before = Stack(2, 8)
    model, found = small()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    for (name, a), (_, b) in zip(before.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert b.requires_grad
    assert found.steps == 20
    assert 0 < found.entropy <= 1
    assert found.shapes == dict.fromkeys(found.gates, (8, 8))
    assert list(found.gates) == [f"blocks.{i}.{kind}" for i in range(2) for kind in KINDS]


def test_it_stops_where_the_choice_is_settled() -> None:
    _, found = small(steps=200, settled=5)
    assert 40 + 5 <= found.steps < 200


def test_the_same_seed_finds_the_same_and_batches_may_be_few() -> None:
    assert small()[1].gates == small()[1].gates
    model = Stack(1, 8)
    x = torch.randn(2, 4, 8)
    pairs = [(part, part.flip(-1)) for part in x]
    found = fallow.search_modules(model, pairs[:1], pairs[1:], loss=error, steps=6, rank=2)
    assert len(found.chosen) == 2


def test_gates_that_were_not_trained_and_equal_scores_are_refused() -> None:
    with pytest.raises(ConfigError, match="have the same score"):
        small(lr_gates=1e-30, decay_gates=0.0)
    with pytest.raises(ConfigError, match="'a' and 'b' have the same score"):
        best({"a": 0.5, "b": 0.5, "c": 0.1}, 1 / 3)
    assert best({"a": 0.5, "b": 0.5, "c": 0.1}, 0.5) == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": 0}, "steps=0"), ({"warmup": 20}, "warmup=20 of steps=20"), ({"lr_gates": 0.0}, "lr_gates=0.0"),
        ({"gate": "x"}, "gate='x'"), ({"order": "third"}, "order='third'"), ({"share": 1.5}, "share=1.5"),
        ({"scope": "x"}, "scope='x'"), ({"score": "x"}, "score='x'"), ({"temperature": (1.0, 0.0)}, "temperature=0.0"),
        ({"settled": -1}, "settled=-1"), ({"mean_one": 2}, "mean_one=2"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused_by_name(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        small(**options)


def test_batches_that_cannot_be_are_refused() -> None:
    model, batches = Stack(1, 8), [(torch.randn(2, 8), torch.randn(2, 8))]
    with pytest.raises(ConfigError, match="are the same batches"):
        fallow.search_modules(model, batches, batches, loss=error)
    with pytest.raises(DataError, match="validation holds no batch"):
        fallow.search_modules(model, batches, [], loss=error, steps=5, warmup=0, rank=2)
    broken = [(torch.randn(2, 8), torch.full((2, 8), math.nan))]
    with pytest.raises(TrainingError, match="the loss is nan at step 1"):
        fallow.search_modules(model, broken, batches, loss=error, steps=5, rank=2)
    assert not any(isinstance(module, fallow.Delta) for module in model.modules())
    fallow.attach(model, "lora", rank=2)
    with pytest.raises(ConfigError, match="has adapters already"):
        fallow.search_modules(model, batches, broken, loss=error)


# -- what is chosen ---------------------------------------------------------------------------------------------------

SCORES = {f"blocks.{i}.{kind}": float(10 * i + j) for i in range(2) for j, kind in enumerate(("q", "k", "v", "o"))}
SHAPES = {name: ((8, 8) if name[-1] != "o" else (8, 16)) for name in SCORES}


def test_places_are_layers_and_types() -> None:
    assert place_of("model.layers.3.self_attn.q_proj") == ("model.layers.3", "self_attn.q_proj")
    assert place_of("down.0.blocks.1.attn1.to_out.0") == ("down.0.blocks.1", "attn1.to_out.0")
    assert place_of("head") == ("", "head")
    assert rows_of(["0.a", "1.a", "0.b"]) == {"0": ["0.a", "0.b"], "1": ["1.a"]}


@pytest.mark.parametrize(("share", "count"), [(0.5, 2), (0.25, 1), (0.3, 2), (1.0, 4), (0.0, 0)])
def test_of_each_layer_the_best_share_is_chosen_rounded_up(share: float, count: int) -> None:
    found = DiffoRARanks(SCORES, SHAPES, share=share)
    want = [f"blocks.{i}.{kind}" for i in range(2) for kind in ("q", "k", "v", "o")[4 - count :]]
    assert found.chosen == want
    whole = DiffoRARanks(SCORES, SHAPES, share=share, scope="model")
    assert whole.chosen == list(SCORES)[8 - math.ceil(8 * share) :]
    assert found.ranks(SHAPES, 3) == {name: 3 if name in want else 0 for name in SHAPES}
    with pytest.raises(ConfigError, match="searched without 'head'"):
        found.ranks({**SHAPES, "head": (2, 8)}, 3)


def test_what_is_not_chosen_shares_by_type_layer_or_shape_and_never_across_shapes() -> None:
    found = DiffoRARanks(SCORES, SHAPES, share=0.25)
    names = [name for name in SCORES if name[-1] != "o"]
    for sharing, groups in (("type", 3), ("layer", 2), ("shape", 1)):
        patterns = found.patterns(sharing, rank=1)
        assert len(patterns) == len(names)
        assert len({told["group"] for told in patterns.values()}) == groups
        assert {told["rank"] for told in patterns.values()} == {1}
    none = DiffoRARanks(SCORES, SHAPES, share=0.0)
    assert len({told["group"] for told in none.patterns("shape").values()}) == 2
    with pytest.raises(ConfigError, match="sharing='x'"):
        found.patterns("x")  # type: ignore[arg-type]


# -- the form ---------------------------------------------------------------------------------------------------------


def attached(host: str, patterns: dict[str, Any], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model: Any = Stack(2, 8)
    torch.manual_seed(1)
    if host == "own":
        return fallow.attach(model, "diffora", rank=2, alpha=4.0, patterns=patterns, **options)
    peft = pytest.importorskip("peft")
    kinds = list(KINDS)
    return peft.get_peft_model(model, fallow.DiffoRAConfig(rank=2, alpha=4.0, patterns=patterns, target_modules=kinds))


SHARED = {r"blocks\.\d\.k": {"group": "k"}, r"blocks\.1\.v": {"group": "v", "rank": 1}}


@pytest.mark.parametrize("host", ["own", "peft"])
def test_a_shared_pair_is_one_parameter_whose_gradient_is_the_sum_over_its_uses(host: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Stack(2, 8), torch.randn(5, 8)
    model = attached(host, SHARED)
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=1e-6)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 32 + 32 + 16
    for delta in (delta for _, delta in adapters(model)):
        delta.randomize()
    deltas: dict[str, Any] = dict(adapters(model))
    first, second = deltas["blocks.0.k"], deltas["blocks.1.k"]
    assert all(a is b for a, b in zip(first.pair(), second.pair(), strict=True))
    model(x).square().sum().backward()
    total = first.pair()[0].grad.clone()
    uses = []
    for one, rest in ((first, second), (second, first)):
        held = tuple(t.detach() for t in rest.pair())
        rest.__dict__["pair"] = lambda held=held: held
        uses.append(torch.autograd.grad(model(x).square().sum(), one.pair()[0])[0])
        del rest.__dict__["pair"]
    torch.testing.assert_close(total, uses[0] + uses[1], rtol=1e-4, atol=1e-5)
    said = model(x).detach()
    if host == "own":
        again = fallow.load(Stack(2, 8).apply(lambda m: None), fallow.save(model, tmp_path / "a"), force=True)
        again.load_state_dict(base.state_dict(), strict=False)
        fallow.merge(model)
        torch.testing.assert_close(model(x), said, rtol=0, atol=1e-5)
    else:
        from peft import PeftModel

        model.save_pretrained(tmp_path / "a")
        again = PeftModel.from_pretrained(base, tmp_path / "a")
        torch.testing.assert_close(model.merge_and_unload()(x), said, rtol=0, atol=1e-5)
    held = dict(adapters(again))
    assert held["blocks.0.k"].pair()[0] is held["blocks.1.k"].pair()[0]  # type: ignore[operator]
    torch.testing.assert_close(again(x), said, rtol=0, atol=1e-6)


def test_with_all_chosen_it_is_lora_step_for_step() -> None:
    x = torch.randn(5, 8)
    ends = []
    for method in ("lora", "diffora"):
        torch.manual_seed(0)
        model = Stack(2, 8)
        torch.manual_seed(1)
        patterns = DiffoRARanks(dict.fromkeys(("blocks.0.q",), 1.0), {"blocks.0.q": (8, 8)}, share=1.0).patterns()
        assert patterns == {}
        fallow.attach(model, method, rank=2, patterns=patterns)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        ends.append(model(x).detach())
    assert torch.equal(*ends)


def test_a_found_choice_is_a_budget_of_lora_and_patterns_of_diffora() -> None:
    model, found = small()
    plain = copy.deepcopy(model)
    fallow.attach(model, "lora", rank=2, budget=found)
    assert [name for name, _ in adapters(model)] == found.chosen
    fallow.attach(plain, "diffora", rank=2, patterns=found.patterns("shape"))
    assert sum(p.numel() for p in plain.parameters() if p.requires_grad) == (len(found.chosen) + 1) * 32


def test_what_a_shared_pair_cannot_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="group='a b'"):
        attached("own", {"q": {"group": "a b"}})
    with pytest.raises(ConfigError, match=r"group='a' has a pair whose A is \(1, 8\)"):
        attached("own", {"q": {"group": "a", "rank": 1}, "k": {"group": "a"}})
    with pytest.raises(ConfigError, match="a start cannot fill it"):
        attached("own", SHARED, start="pissa")
    model = attached("own", SHARED)
    delta = dict(adapters(model))["blocks.0.k"]
    with pytest.raises(ConfigError, match="cannot have another rank"):
        delta.resize(1)
    assert fallow.trim(model)["blocks.0.k"] == 2
