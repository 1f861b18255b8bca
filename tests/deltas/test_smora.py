"""SMoRA: gates against a loop over tokens, a mixture of LoRAs as a special case, and the balance."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from one_layer import LAYERS, OneLayer, backward_both, inputs, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fallow.core.errors import ConfigError, ModelError
from fallow.deltas.smora import SMoRA

KINDS = ["linear", "wide", "conv", "conv1d", "grouped"]


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    model, x = OneLayer(layer, "smora", context={}, **{"rank": 8, "active": 4, **options}), inputs(layer)
    model.delta.randomize()
    with torch.no_grad():
        model.delta.lean.copy_(torch.randint(-10_000_000, 10_000_000, model.delta.lean.shape))
    return model, x


def one_token(delta: SMoRA, x: Tensor, a: Tensor, b: Tensor, router: Tensor) -> Tensor:
    """(alpha / k) B (g * A x) of one token (in,): the equations, rank by rank."""
    o = delta.o
    logits, bias = router @ x, delta.lean.to(x.dtype) * 1e-8
    score = torch.sigmoid(logits) if o.gate == "sigmoid" else logits
    groups = sorted(range(len(logits)), key=lambda i: -float((score[i] + bias[i]).detach()))[: o.active // o.partition]
    raw = score + bias if o.bias_in_gate else score
    raw = raw if o.gate == "sigmoid" else raw.exp()
    total = sum(raw[i] for i in groups) * o.partition
    change = torch.zeros(len(b), dtype=x.dtype)
    for r in range(o.rank):
        if r // o.partition in groups:
            change = change + o.active * raw[r // o.partition] / total * (a[r] @ x) * b[:, r]
    return o.alpha / o.active * change


def by_tokens(model: OneLayer, x: Tensor, a: Tensor, b: Tensor, router: Tensor) -> Tensor:
    """The adapted layer's output, token by token; of a convolution, position by position and group by group."""
    layer, y = model.layer, model.layer(x)
    if isinstance(layer, nn.Linear):
        tokens = x.reshape(-1, x.shape[-1])
        return y + torch.stack([one_token(model.delta, t, a, b, router) for t in tokens]).view_as(y)
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = (0,) * len(layer.stride)
    else:
        padding = layer.padding
    if x.dim() == 3:
        x, kernel, stride, padding = x[:, :, None], (1, *layer.kernel_size), (1, *layer.stride), (0, *padding)
    else:
        kernel, stride = layer.kernel_size, layer.stride
    patches = F.unfold(x, kernel, padding=padding, stride=stride)  # (N, in * groups, positions)
    rows = []
    for one in patches:
        parts = []
        for piece, own in zip(one.chunk(layer.groups), b.chunk(layer.groups), strict=True):
            parts.append(torch.stack([one_token(model.delta, t, a, own, router) for t in piece.T], 1))
        rows.append(torch.cat(parts))
    return y + torch.stack(rows).view_as(y)


@pytest.mark.parametrize("kind", KINDS)
def test_output_is_unchanged_at_the_start(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    model, x = OneLayer(layer, "smora", rank=8, active=4), inputs(layer)
    assert torch.equal(model(x), layer(x))
    bound = model.view.shape[1] ** -0.5
    assert 0.8 * bound < float(model.delta.router.detach().abs().max()) <= bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "given", [{}, {"gate": "softmax"}, {"partition": 2}, {"bias_in_gate": True},
              {"gate": "softmax", "bias_in_gate": True, "partition": 4}],
)  # fmt: skip
def test_values_and_gradients_are_those_of_a_loop_over_tokens(kind: str, given: dict[str, object]) -> None:
    model, x = adapted(kind, **given)
    delta = model.delta
    tensors = [p.detach().clone().requires_grad_() for p in (delta.A, delta.B, delta.router)]
    ours, theirs = x[:1].clone().requires_grad_(), x[:1].clone().requires_grad_()
    got, want = model(ours), by_tokens(model, theirs, *tensors)
    backward_both(got, want)
    for param, reference in zip((delta.A, delta.B, delta.router), tensors, strict=True):
        torch.testing.assert_close(param.grad, reference.grad)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 3, 4, 12)])
def test_any_leading_shape_is_taken(shape: tuple[int, ...]) -> None:
    model, _ = adapted("linear")
    x = torch.randn(shape, dtype=torch.float64)
    flat = model(x.reshape(-1, 12))
    torch.testing.assert_close(model(x).reshape(-1, 20), flat)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("partition", [1, 2])
def test_k_gates_are_not_zero_and_sum_to_k(gate: str, partition: int) -> None:
    model, _ = adapted("linear", gate=gate, partition=partition)
    logits = torch.randn(50, 8 // partition)
    gates, chosen = model.delta.gates(logits, 1)
    gates = gates.repeat_interleave(partition, 1)
    assert ((gates != 0).sum(1) == 4).all()
    assert chosen.shape == (50, 4 // partition)
    torch.testing.assert_close(gates.sum(1), torch.full((50,), 4.0))
    model.delta.lean.zero_()
    even, _ = model.delta.gates(torch.zeros(5, 8 // partition), 1)
    torch.testing.assert_close(even[even != 0], torch.ones(5 * 4 // partition))


@pytest.mark.parametrize("given", [{"rank": 4, "active": 4}, {"rank": 4, "active": 4, "partition": 4}])
def test_with_all_ranks_active_and_even_gates_it_is_lora(given: dict[str, int]) -> None:
    model, x = adapted("conv", alpha=6.0, **given)
    if "partition" not in given:  # one gate for all is 1 whatever the router says
        with torch.no_grad():
            model.delta.router.zero_()
    plain = OneLayer(model.layer, "lora", rank=4, alpha=6.0)
    plain.delta.load_state_dict({"A": model.delta.A, "B": model.delta.B})
    torch.testing.assert_close(model(x), plain(x))


def test_in_groups_it_is_a_mixture_of_loras_with_normalised_top_gates() -> None:
    experts, size, top = 4, 2, 2
    model, x = adapted("linear", rank=experts * size, active=top * size, partition=size, alpha=8.0)
    model.delta.lean.zero_()
    o, d = model.delta.o, model.delta
    score = torch.sigmoid(x @ d.router.T)
    best, which = score.topk(top, -1)
    share = torch.zeros_like(score).scatter(-1, which, best / best.sum(-1, True))
    want = model.layer(x)
    for e in range(experts):
        rows = slice(e * size, (e + 1) * size)
        lora = o.alpha / size * (x @ d.A[rows].T @ d.B[:, rows].T)
        want = want + share[..., e : e + 1] * lora
    torch.testing.assert_close(model(x), want)


def test_the_balance_steers_the_choice_alone_unless_it_is_asked_into_the_gate() -> None:
    model, x = adapted("linear")
    before = model(x)
    model.delta.lean += 70_000_000  # 0.7 for every rank
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    model.delta.lean[0] += 500_000_000
    assert (model.delta.gates(torch.randn(50, 8), 1)[0][:, 0] != 0).all()
    released, x = adapted("linear", bias_in_gate=True)
    before = released(x)
    released.delta.lean += 70_000_000
    assert not torch.allclose(released(x), before)


def test_counts_are_of_chosen_ranks_and_the_balance_moves_towards_the_rare_ones() -> None:
    model, x = adapted("linear", balance=1e-3)
    delta = model.delta
    _, chosen = delta.gates(x @ delta.router.T, 2)
    want = torch.bincount(chosen.flatten(), minlength=8)
    model(x).sum().backward()
    assert delta.used.tolist() == want.tolist()
    assert int(want.sum()) == 15 * 4
    before = delta.lean.clone()
    delta.on_step(1, None)
    move = (delta.lean - before) * 1e-8
    torch.testing.assert_close(move, 1e-3 * (7.5 - want.double()).sign(), check_dtype=False)
    assert delta.used.tolist() == [0] * 8


def test_four_passes_of_an_accumulation_count_as_one_and_no_forward_alone_counts() -> None:
    whole, x = adapted("linear")
    parts, _ = adapted("linear")
    x = torch.randn(8, 5, 12, dtype=torch.float64)
    whole(x).square().sum().backward()
    for part in x.split(2):
        parts(part).square().sum().backward()
    parts(x)
    parts.eval()(x).sum().backward()
    assert parts.delta.used.tolist() == whole.delta.used.tolist()
    whole.delta.on_step(1, 10)
    parts.delta.on_step(1, 10)
    assert torch.equal(whole.delta.lean, parts.delta.lean)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_choices_counts_and_gradients(reentrant: bool) -> None:
    plain, x = adapted("linear")
    again, _ = adapted("linear")
    for step in (1, 2):
        plain(x.clone().requires_grad_()).square().sum().backward()
        checkpoint(again, x.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
        assert again.delta.used.tolist() == plain.delta.used.tolist()
        assert int(plain.delta.used.sum()) == 60
        for p, q in zip(plain.delta.parameters(), again.delta.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        plain.delta.on_step(step, 10)
        again.delta.on_step(step, 10)
        assert torch.equal(plain.delta.lean, again.delta.lean)


def test_padding_does_not_count_where_the_mask_fits() -> None:
    model, x = adapted("linear")
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    _, chosen = model.delta.gates(x @ model.delta.router.T, 2)
    model.delta.context["token_mask"] = mask
    model(x).sum().backward()
    assert model.delta.used.tolist() == torch.bincount(chosen[mask.bool()].flatten(), minlength=8).tolist()
    model.delta.used.zero_()
    model(x[:, :2]).sum().backward()  # tokens of another shape
    assert int(model.delta.used.sum()) == 3 * 2 * 4
    conv, picture = adapted("grouped")
    mask = torch.zeros(3, 9, 9, dtype=torch.bool)
    mask[:, :2] = True
    conv.delta.context["token_mask"] = mask
    conv(picture).sum().backward()
    assert int(conv.delta.used.sum()) == 3 * 2 * 9 * 4 * 2  # pictures, rows, columns, active, groups


def test_the_step_of_the_balance_fits_the_length_of_the_run() -> None:
    moved = {}
    for total in (None, 20, 500, 10**6):
        model, x = adapted("linear")
        model(x).sum().backward()
        before = model.delta.lean.clone()
        model.delta.on_step(1, total)
        moved[total] = float((model.delta.lean - before).abs().max()) * 1e-8
    assert moved == pytest.approx({None: 1e-4, 20: 1e-3, 500: 2e-4, 10**6: 1e-5})


def test_the_balance_brings_ranks_back_that_no_token_chooses() -> None:
    dead = {}
    for u in (0.0, 2e-2):
        torch.manual_seed(0)
        model = OneLayer(nn.Linear(12, 20), "smora", rank=12, active=2, balance=u)
        with torch.no_grad():
            model.delta.router.copy_(0.02 * torch.randn(12, 12) + torch.linspace(-0.1, 0.1, 12)[:, None])
        for step in range(1, 101):
            model(1 + torch.randn(64, 12)).sum().backward()
            used = model.delta.used.clone()
            model.delta.on_step(step, 100)
        dead[u] = int((used == 0).sum())
    assert dead[0.0] >= 3
    assert dead[2e-2] == 0


def test_the_balance_is_saved_is_not_trained_and_survives_a_cast_to_half() -> None:
    model, _ = adapted("linear")
    assert sorted(model.delta.state_dict()) == ["A", "B", "lean", "router"]
    assert sorted(n for n, _ in model.delta.named_parameters()) == ["A", "B", "router"]
    kept = model.delta.lean.clone()
    model.half()
    assert torch.equal(model.delta.lean, kept)
    gates, _ = model.delta.gates(torch.randn(3, 8).half(), 1)
    assert gates.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("partition", [1, 4])
def test_parameter_count_includes_the_router(kind: str, partition: int) -> None:
    model, _ = adapted(kind, partition=partition)
    out, inner = model.view.shape
    want = 8 * (out + inner) + 8 // partition * inner
    assert SMoRA.parameter_count((out, inner), model.delta.o) == want
    assert sum(p.numel() for p in model.delta.parameters()) == want


def test_it_cannot_merge_and_says_so_and_counts_scale_times() -> None:
    model, x = adapted("linear")
    assert not model.delta.mergeable
    with pytest.raises(ConfigError, match=r"'smora' acts on a layer's input and output.*cannot merge"):
        model.merged()
    full = model(x) - model.layer(x)
    model.scale = 0.25
    torch.testing.assert_close(model(x) - model.layer(x), 0.25 * full)


def test_on_a_bf16_base_it_is_close_to_float64_and_no_float32_copy_of_x_is_kept() -> None:
    torch.manual_seed(0)
    model = OneLayer(nn.Linear(256, 64).bfloat16(), "smora", rank=16, active=4)
    with torch.no_grad():
        model.delta.B.normal_(std=0.1)
    x, kept = torch.randn(500, 256).bfloat16(), []

    def pack(t: Tensor) -> Tensor:
        kept.append((tuple(t.shape), t.dtype, t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    assert out.dtype == torch.bfloat16
    assert ((500, 256), torch.float32) not in [entry[:2] for entry in kept]
    skip = {t.untyped_storage().data_ptr() for t in [x, *model.parameters()]}
    held = {pointer: size for shape, _, pointer, size in kept if pointer not in skip and shape[0] == 500}
    assert sum(held.values()) == 500 * (4 * (16 + 16) + 8 * 4 + 4 * 16)  # A x and R x, T, g * A x
    wide = OneLayer(nn.Linear(256, 64).double(), "smora", rank=16, active=4)
    wide.layer.load_state_dict({k: v.double() for k, v in model.layer.state_dict().items()})
    wide.delta.load_state_dict(model.delta.state_dict())
    torch.testing.assert_close(out.double(), wide(x.double()), rtol=0.02, atol=0.05)


def test_dropout_acts_in_training_alone_on_router_and_factors() -> None:
    model, x = adapted("linear", dropout=0.5)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_a_loaded_state_continues_bit_for_bit() -> None:
    model, x = adapted("linear", torch.float32)
    optimizer = torch.optim.Adam(model.delta.parameters(), 1e-2)
    train(model, optimizer, x, range(1, 5))
    other = OneLayer(model.layer, "smora", rank=8, active=4)
    other.delta.load_state_dict(model.delta.state_dict())
    second = torch.optim.Adam(other.delta.parameters(), 1e-2)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, x, range(5, 9))
    train(other, second, x, range(5, 9))
    assert torch.equal(model.delta.lean, other.delta.lean)
    assert all(torch.equal(p, q) for p, q in zip(model.delta.parameters(), other.delta.parameters(), strict=True))


def test_compiled_it_gives_the_same_output_gradients_and_counts() -> None:
    model, x = adapted("linear", torch.float32)
    model(x).square().sum().backward()
    want, counts = model.delta.router.grad.clone(), model.delta.used.clone()
    model.delta.zero_grad()
    model.delta.used.zero_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    torch.testing.assert_close(model.delta.router.grad, want)
    assert torch.equal(model.delta.used, counts)


def test_processes_that_train_together_move_the_balance_by_the_counts_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fallow.deltas.smora.ranks", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda counts: counts.add_(torch.tensor([1, 1, 7, 7])))
    delta = OneLayer(nn.Linear(8, 8), "smora", rank=4, active=2, balance=1e-3).delta
    delta.used.copy_(torch.tensor([9, 1, 3, 3]))  # 10, 2, 10, 10 in all: mean 8
    delta.on_step(1, None)
    assert delta.lean.tolist() == [-100_000, 100_000, -100_000, -100_000]
    assert delta.used.tolist() == [0] * 4


@pytest.mark.parametrize(
    "given", [{"rank": 0}, {"active": 9, "rank": 8}, {"partition": 3}, {"active": 3, "partition": 2}, {"gate": "relu"},
              {"balance": -1.0}, {"alpha": 0.0}, {"dropout": 1.0}, {"bias_in_gate": 3}],
)  # fmt: skip
def test_bad_options_are_refused_by_name(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        SMoRA.Options(**given)


def test_more_active_ranks_than_the_layer_has_and_an_embedding_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="active=8 is above what 'layer'"):
        OneLayer(nn.Linear(4, 20), "smora", rank=16, active=8)
    with pytest.raises(ModelError, match=r"'smora' cannot adapt 'layer'.*kind 'embedding'"):
        OneLayer(nn.Embedding(24, 12), "smora", rank=4, active=2)
