"""PETALface against its equation: two branches, the gate of each sample, one branch of rank 2r."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_layer import LAYERS, OneLayer, backward_both, inputs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fallow.core.errors import ConfigError
from fallow.core.views import view_of
from fallow.deltas.petalface import PETALface, calibrated

ALL = sorted(LAYERS)
Q = torch.tensor([0.0, 0.3, 1.0])


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[OneLayer, Tensor, dict[str, Any]]:
    """The layer with a changed start, three samples for it, and the context that its gates read."""
    torch.manual_seed(0)
    layer, context = LAYERS[kind]().to(dtype), {"quality": Q.to(dtype)}
    model = OneLayer(layer, "petalface", context=context, **{"rank": 3, "branch_dropout": 0.0, **options})
    model.delta.randomize()
    return model, inputs(layer), context


def by_equation(model: OneLayer, x: Tensor, g: Tensor, a: Tensor, b: Tensor, s: float = 1.0) -> Tensor:
    """A layer with a weight of its own for each sample: W + s ((1 - g) B1 A1 + g B2 A2)."""
    layer, view, r = model.layer, view_of(model.layer), model.delta.o.rank
    rows = []
    for sample, share in zip(x, g, strict=True):
        d = (1 - share) * b[:, :r] @ a[:r] + share * b[:, r:] @ a[r:]
        weight = view.write(view.read(layer.weight) + s * d, layer.weight)
        rows.append(torch.func.functional_call(layer, {"weight": weight}, (sample[None],)))
    return torch.cat(rows)


@pytest.mark.parametrize("kind", ALL)
def test_output_is_unchanged_at_the_start_whatever_the_quality(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    layer.apply(lambda module: nn.init.trunc_normal_(module.weight, std=0.02))  # the host's own, before
    model, x = OneLayer(layer, "petalface", rank=2, context={"quality": torch.rand(3)}), inputs(layer)
    assert torch.equal(model(x), layer(x))
    assert torch.equal(model.eval()(x), layer(x))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_each_sample_has_the_blend_of_its_quality_in_values_and_gradients(kind: str, alpha: float | None) -> None:
    model, x, _ = adapted(kind, alpha=alpha)
    delta = model.delta
    a, b = (p.detach().clone().requires_grad_() for p in (delta.A, delta.B))
    one, other = (t.clone().requires_grad_() if t.is_floating_point() else t for t in (x, x))
    got, want = model(one), by_equation(model, other, Q.double(), a, b, 1.0 if alpha is None else 2.0)
    backward_both(got, want)
    torch.testing.assert_close(delta.A.grad, a.grad)
    torch.testing.assert_close(delta.B.grad, b.grad)
    if x.is_floating_point():
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("kind", ALL)
def test_one_branch_of_rank_2r_is_two_branches_of_scaled_inputs(kind: str) -> None:
    """As the official code has it: LoRA_1((1 - g) x) + LoRA_2(g x)."""
    model, x, _ = adapted(kind)
    delta, view, r = model.delta, model.view, 3
    a, b = (p.detach().clone().requires_grad_() for p in (delta.A, delta.B))
    got = delta.delta_forward(x)
    g = Q.double().reshape(-1, *[1] * (got.dim() - 1))
    want = (1 - g) * view.up(view.down(x, a[:r]), b[:, :r]) + g * view.up(view.down(x, a[r:]), b[:, r:])
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(delta.A.grad, a.grad)
    torch.testing.assert_close(delta.B.grad, b.grad)


def test_low_quality_reaches_branch_1_only_and_high_quality_branch_2_only() -> None:
    model, x, context = adapted("linear")
    for quality, idle, busy in ((0.0, slice(3, 6), slice(0, 3)), (1.0, slice(0, 3), slice(3, 6))):
        context["quality"] = torch.full((3,), quality)
        model.zero_grad()
        before = model(x)
        before.square().sum().backward()
        assert model.delta.B.grad[:, idle].count_nonzero() == 0
        assert model.delta.A.grad[idle].count_nonzero() == 0
        assert model.delta.B.grad[:, busy].abs().min() > 0
        with torch.no_grad():
            model.delta.B[:, idle] += 1
        assert torch.equal(model(x), before)


def test_gradients_of_b_are_in_proportion_to_the_gate_and_the_output_is_linear_in_it() -> None:
    model, x, context = adapted("linear")
    outputs, grads = {}, {}
    for quality in (0.0, 0.25, 0.75, 1.0):
        context["quality"] = quality
        model.zero_grad()
        outputs[quality] = model(x)
        outputs[quality].sum().backward()
        grads[quality] = model.delta.B.grad.clone()
    torch.testing.assert_close(outputs[0.25] + outputs[0.75], outputs[0.0] + outputs[1.0])
    torch.testing.assert_close(grads[0.25][:, :3], 0.75 * grads[0.0][:, :3])
    torch.testing.assert_close(grads[0.25][:, 3:], 0.25 * grads[1.0][:, 3:])


def test_a_batch_gives_what_its_samples_give_alone() -> None:
    model, x, context = adapted("conv")
    together = model(x)
    for i in range(3):
        context["quality"] = Q[i : i + 1]
        torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1])


def test_windows_of_one_sample_share_its_quality() -> None:
    model, _, context = adapted("linear", windowed=True)
    x = torch.randn(3 * 4, 5, 12, dtype=torch.float64)  # four windows of each sample, one after the other
    together = model(x)
    for i in range(3):
        context["quality"] = Q[i : i + 1]
        torch.testing.assert_close(model(x[4 * i : 4 * i + 4]), together[4 * i : 4 * i + 4])
    context["quality"] = torch.rand(5)
    with pytest.raises(ConfigError, match="5 scores, 'layer' sees 12 samples"):
        model(x)


def test_gate_is_a_half_at_the_threshold_affine_and_clamped_unless_told_otherwise() -> None:
    model, _, context = adapted("linear", threshold=40.0, slope=0.05)
    context["quality"] = torch.tensor([40.0, 44.0, 90.0, -10.0], requires_grad=True)
    gate = model.delta.gate()
    assert gate.tolist() == pytest.approx([0.5, 0.7, 1.0, 0.0])
    assert not gate.requires_grad
    official, _, context = adapted("linear", threshold=40.0, clamp=False)
    context["quality"] = torch.tensor([40.0, 90.0])
    assert official.delta.gate().tolist() == [0.5, 50.5]
    plain, _, context = adapted("linear")
    context["quality"] = Q
    torch.testing.assert_close(plain.delta.gate(), Q)  # with the defaults a quality in [0, 1] is the gate


def test_calibration_puts_the_mean_at_a_half_and_two_deviations_at_the_ends() -> None:
    scores = torch.tensor([20.0, 30.0, 40.0])
    options = calibrated(scores)
    deviation = (200 / 3) ** 0.5
    assert options == pytest.approx({"threshold": 30.0, "slope": 1 / (4 * deviation)})
    model, _, context = adapted("linear", **options)
    context["quality"] = torch.tensor([30.0, 30 + 2 * deviation, 30 - deviation])
    assert model.delta.gate().tolist() == pytest.approx([0.5, 1.0, 0.25])
    for useless in (torch.ones(5), torch.empty(0), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ConfigError, match="tell no quality apart"):
            calibrated(useless)


@pytest.mark.parametrize("kind", ALL)
def test_merged_at_one_quality_equals_unmerged_at_it(kind: str) -> None:
    model, x, context = adapted(kind, alpha=4.5)
    for quality in (0.2, torch.tensor([0.7, 0.7, 0.7])):
        context["quality"] = quality
        b, a = model.delta.factors()
        assert a.shape[0] == b.shape[1] == 6
        model.scale = 0.5
        torch.testing.assert_close(model.by_merged(x), model(x))


def test_qualities_that_differ_cannot_merge() -> None:
    model, _, _ = adapted("linear")
    with pytest.raises(ConfigError, match="3 qualities given; to merge, give one number"):
        model.merged()


@pytest.mark.parametrize("action", ["forward", "merged"])
def test_missing_quality_is_told_by_name(action: str) -> None:
    model, x, context = adapted("linear")
    context.clear()
    with pytest.raises(
        ConfigError, match=r"'layer' .* 'quality', which is not given.*fallow\.condition\(model, quality"
    ):
        model(x) if action == "forward" else model.merged()


def test_quality_of_another_batch_or_of_two_dimensions_is_refused() -> None:
    model, x, context = adapted("linear")
    for count in (2, 6, 1, 0):
        context["quality"] = torch.rand(count)
        with pytest.raises(ConfigError, match=f"quality holds {count} scores, 'layer' sees 3 samples"):
            model(x)
    context["quality"] = torch.rand(3, 1)
    with pytest.raises(ConfigError, match=r"quality of the shape \(3, 1\)"):
        model(x)


@pytest.mark.parametrize("kind", ALL)
def test_dropout_falls_on_what_each_branch_puts_out(kind: str) -> None:
    model, x, context = adapted(kind, branch_dropout=0.25)
    context["quality"] = 0.5
    delta, view, r = model.delta, model.view, 3
    low = 0.5 * view.up(view.down(x, delta.A[:r]), delta.B[:, :r])
    high = 0.5 * view.up(view.down(x, delta.A[r:]), delta.B[:, r:])
    torch.manual_seed(3)
    got = delta.delta_forward(x)
    torch.manual_seed(3)
    torch.testing.assert_close(got, F.dropout(low, 0.25) + F.dropout(high, 0.25))
    model.eval()
    torch.testing.assert_close(delta.delta_forward(x), low + high)


@pytest.mark.parametrize("kind", ["linear", "grouped", "embedding"])
def test_parameter_count_is_twice_a_loras(kind: str) -> None:
    model, _, _ = adapted(kind)
    count = 2 * 3 * sum(model.view.shape)
    assert PETALface.parameter_count(model.view.shape, model.delta.o) == count
    assert sum(p.numel() for p in model.delta.parameters()) == count


def test_layers_of_the_papers_swin_train_1_130_496_numbers() -> None:
    options = PETALface.Options(rank=8)
    qkv = [(3 * width, width) for width, depth in ((384, 2), (768, 18), (1536, 2)) for _ in range(depth)]
    assert sum(PETALface.parameter_count(shape, options) for shape in qkv) == 1_130_496


def test_branches_start_apart_with_a_deviation_of_one_over_the_rank() -> None:
    torch.manual_seed(0)
    delta = OneLayer(nn.Linear(500, 300), "petalface", rank=16).delta
    first, second = delta.A.detach()[:16], delta.A.detach()[16:]
    for branch in (first, second):
        assert float(branch.std()) == pytest.approx(1 / 16, rel=0.03)
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.05


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
def test_bf16_base_keeps_no_float32_copy_of_the_input_and_has_the_plain_gradients(kind: str) -> None:
    model, x, _ = adapted(kind, torch.bfloat16, rank=1)
    delta = model.delta
    assert delta.A.dtype == torch.float32
    known = {t.untyped_storage().data_ptr() for t in (x, model.layer.weight, delta.A, delta.B)}
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept.append(t.numel())
        return t

    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert sum(kept) < x.numel()
    plain = x.detach().float().requires_grad_()
    want = by_equation(OneLayer(model.layer.float(), "lora", rank=1), plain, Q.bfloat16().float(), delta.A, delta.B)
    weights = torch.randn_like(want)
    mine = torch.autograd.grad((delta.delta_forward(x) * weights).sum(), [delta.A, delta.B])
    true = torch.autograd.grad((want * weights).sum(), [delta.A, delta.B])
    for got, wanted in zip(mine, true, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_compiled_and_checkpointed_forwards_have_the_same_gradients() -> None:
    model, x, _ = adapted("linear", torch.float32)

    def grads(forward: Any) -> list[Tensor]:
        model.zero_grad()
        forward(x).square().sum().backward()
        return [p.grad for p in model.delta.parameters()]

    once = grads(model)
    for forward in (
        lambda t: checkpoint(model, t, use_reentrant=False),
        torch.compile(model, fullgraph=True, backend="aot_eager"),
    ):
        for got, want in zip(grads(forward), once, strict=True):
            torch.testing.assert_close(got, want)


def test_checkpointed_backward_without_its_quality_is_refused() -> None:
    model, x, context = adapted("linear")
    y = checkpoint(model, x, use_reentrant=False)
    context.clear()
    with pytest.raises(ConfigError, match="with gradient checkpointing"):
        y.sum().backward()


def test_state_dict_continues_training_bit_for_bit() -> None:
    def steps(model: OneLayer, x: Tensor, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    model, x, context = adapted("linear", torch.float32)
    optimizer = torch.optim.AdamW(model.delta.parameters(), lr=1e-2)
    steps(model, x, optimizer, 2)
    other = OneLayer(model.layer, "petalface", rank=3, branch_dropout=0.0, context=context, fresh=False)
    other.delta.load_state_dict(model.delta.state_dict())
    resumed = torch.optim.AdamW(other.delta.parameters(), lr=1e-2)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    steps(model, x, optimizer, 2)
    steps(other, x, resumed, 2)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 13}, "rank=13 is above"),
        ({"alpha": 0}, "alpha=0"),
        ({"branch_dropout": 1.0}, "branch_dropout=1.0"),
        ({"slope": 0}, "slope=0"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"tau": 1}, "no option tau=1"),
    ],
)
def test_impossible_options_are_refused_by_name(bad: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        OneLayer(nn.Linear(12, 20), "petalface", **bad)
