"""A Linear with a low-rank change in one operator, against plain ones; and when the engine takes that way."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fallow
from fallow.core import engine, low_rank_linear
from fallow.core.delta import Delta, Site
from fallow.core.errors import ModelError
from fallow.core.low_rank_linear import low_rank_linear as fused
from fallow.core.views import view_of
from fallow.deltas.lora import LoRA
from fallow.deltas.sora import SoRA

OUT, IN, RANK, INNER = 7, 6, 3, 2


def tensors(middle: str, outer: bool, bias: bool, trained: str = "xabmc") -> dict[str, Any]:
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...] | None] = {
        "x": (2, 5, IN), "a": (RANK, IN), "b": (OUT, INNER if middle == "matrix" else RANK),
        "m": {"none": None, "gates": (RANK,), "matrix": (INNER, RANK)}[middle], "c": (OUT,) if outer else None,
        "w": (OUT, IN), "bias": (OUT,) if bias else None,
    }  # fmt: skip
    return {
        name: None if shape is None else torch.randn(shape, dtype=torch.float64).requires_grad_(name in trained)
        for name, shape in shapes.items()
    }


def by_equation(x: Tensor, w: Tensor, bias: Any, b: Tensor, a: Tensor, m: Any = None, c: Any = None) -> Tensor:
    change = b @ (a if m is None else (torch.diag(m) if m.dim() == 1 else m) @ a)
    return F.linear(x, w + (change if c is None else torch.diag(c) @ change), bias)


def given(t: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(t[name] for name in ("x", "w", "bias", "b", "a", "m", "c"))


@pytest.mark.parametrize("middle", ["none", "gates", "matrix"])
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("trained", ["xabmc", "abmc", "xbmc", "xmc", "xac", "x", "a"])
def test_values_and_gradients_are_the_equations(middle: str, outer: bool, trained: str) -> None:
    t = tensors(middle, outer, bias=True, trained=trained)
    got, want = fused(*given(t)), by_equation(*given(t))
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(got)
    needed = [value for value in t.values() if value is not None and value.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(got, needed, upstream), torch.autograd.grad(want, needed, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(IN,), (4, IN), (0, IN), (2, 3, 2, IN)])
def test_any_number_of_dimensions_is_taken(shape: tuple[int, ...]) -> None:
    t = tensors("none", False, bias=False)
    t["x"] = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    got, want = fused(*given(t)), by_equation(*given(t))
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), [t["x"], t["a"]]), torch.autograd.grad(want.sum(), [t["x"], t["a"]]), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_an_input_that_is_not_contiguous_and_an_output_that_is_written_into() -> None:
    t = tensors("none", False, bias=True)
    x = torch.randn(5, 2, IN, dtype=torch.float64, requires_grad=True)
    got = fused(x.transpose(0, 1), *given(t)[1:]).relu_()
    want = by_equation(x.transpose(0, 1), *given(t)[1:]).relu()
    torch.testing.assert_close(torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(want.sum(), x)[0])


@pytest.mark.parametrize(("middle", "outer"), itertools.product(["none", "gates", "matrix"], [False, True]))
def test_half_precision_is_cast_by_rows_and_rounded_once(middle: str, outer: bool, monkeypatch: Any) -> None:
    t = tensors(middle, outer, bias=True)
    low = {k: v if v is None else v.detach().to(torch.bfloat16 if k in ("x", "w", "bias") else torch.float32)
           for k, v in t.items()}  # fmt: skip
    low = {k: v if v is None else v.requires_grad_(k in "xabmc") for k, v in low.items()}
    monkeypatch.setattr(low_rank_linear, "CPU_PIECE", 1)  # so that several pieces are made
    assert len(list(low_rank_linear._pieces(low["x"].flatten(0, 1), OUT, low["b"]))) > 1
    got = fused(*given(low))
    assert got.dtype == torch.bfloat16
    x, w, bias, b, a, m, c = (v if v is None else v.detach().double() for v in given(low))
    base = F.linear(low["x"], low["w"], low["bias"]).double()
    want = base + by_equation(x, torch.zeros_like(w), None, b, a, m, c)
    assert float(((got - want).detach().abs() / want.detach().abs().clamp_min(1.0)).max()) < 2**-8
    got.backward(torch.ones_like(got))
    exact = [v if v is None else v.requires_grad_() for v in (x, b, a, m, c)]
    by_equation(exact[0], w, bias, *exact[1:]).sum().backward()
    for name, reference in zip("xbamc", exact, strict=True):
        if reference is not None:
            assert low[name].grad.dtype == low[name].dtype
            scale = float(reference.grad.abs().max())
            assert float((low[name].grad - reference.grad).abs().max()) < scale * (2e-2 if name in "xc" else 1e-5)


def test_second_derivatives_are_right_or_refused() -> None:
    t = tensors("gates", True, bias=True)
    chosen = [t[name] for name in "xbamc"]
    assert torch.autograd.gradgradcheck(lambda x, b, a, m, c: fused(x, t["w"], t["bias"], b, a, m, c), chosen)
    frozen = tensors("none", False, bias=False, trained="xb")
    with pytest.raises(ModelError, match="second derivatives"):
        torch.autograd.grad(fused(*given(frozen)).sum(), frozen["x"], create_graph=True)


def test_one_output_and_one_gradient_are_the_height_of_memory(peak_bytes: Any) -> None:
    layer = nn.Linear(256, 256).requires_grad_(False)
    delta = LoRA(Site("layer", view_of(layer), lambda: layer.weight, nn.Module()), rank=2)
    x, upstream = torch.randn(512, 256, requires_grad=True), torch.randn(512, 256)

    def step() -> None:
        engine.run_deltas(layer, layer, "weight", delta.view, lambda: layer.weight, [(delta, 1.0)], x).backward(
            upstream
        )

    step()
    x.grad = None
    assert peak_bytes(step) < 2.2 * x.numel() * 4


# -- when the engine takes it ------------------------------------------------------------------------------------------


class Counting(LoRA):
    """Says how often the operator was used."""

    calls = 0

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        self.calls += 1
        return super().linear(x, w, bias)


def adapted(layer: nn.Module) -> tuple[Counting, Any]:
    view = view_of(layer)
    delta = Counting(Site("layer", view, lambda: layer.weight, nn.Module()), rank=2)
    delta.randomize()
    return delta, lambda x, scale=1.0: engine.run_deltas(
        layer, layer, "weight", view, lambda: layer.weight, [(delta, scale)], x
    )


def frozen() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT).requires_grad_(False)


def test_a_plain_frozen_linear_is_run_along_with_its_change() -> None:
    layer = frozen()
    delta, run = adapted(layer)
    x = torch.randn(4, IN)
    torch.testing.assert_close(run(x), layer(x) + x @ delta.delta_weight().T)
    assert delta.calls == 1


def test_whatever_else_a_layer_does_is_left_to_it() -> None:
    x, seen = torch.randn(4, IN), []
    hooked = frozen()
    hooked.register_forward_hook(lambda *args: seen.append(1))
    trained = frozen()
    trained.bias.requires_grad_()
    replaced = frozen()
    replaced.forward = lambda x: F.linear(x, 2 * replaced.weight)  # as libraries that offload weights do
    for layer in (hooked, trained, replaced):
        delta, run = adapted(layer)
        torch.testing.assert_close(run(x), layer(x) + x @ delta.delta_weight().T)
        run(x).sum().backward()
        assert delta.calls == 0
    assert len(seen) == 3
    torch.testing.assert_close(trained.bias.grad, torch.full((OUT,), 4.0))
    delta, run = adapted(frozen())
    with torch.autocast("cpu", torch.bfloat16):
        assert run(x).dtype == torch.bfloat16
    gradient = torch.func.grad(lambda x: run(x).sum())(x)
    torch.testing.assert_close(gradient, (frozen().weight + delta.delta_weight()).sum(0).expand(4, IN))
    run(x, 0.5)
    assert delta.calls == 0


def test_a_method_written_anew_is_not_passed_over() -> None:
    class Doubled(LoRA):
        def delta_forward(self, x: Tensor) -> Tensor:
            return 2 * super().delta_forward(x)

    class Kept(SoRA):
        pass

    layer = frozen()
    site = Site("layer", view_of(layer), lambda: layer.weight, nn.Module())
    made: dict[type[Delta], bool] = {kind: kind(site, rank=2).has_linear for kind in (LoRA, SoRA, Kept, Doubled)}
    assert made == {LoRA: True, SoRA: True, Kept: True, Doubled: False}


def test_forward_mode_derivatives_go_the_plain_way() -> None:
    layer = frozen()
    delta, run = adapted(layer)
    x, tangent = torch.randn(4, IN), torch.randn(4, IN)
    with torch.autograd.forward_ad.dual_level():
        dual = run(torch.autograd.forward_ad.make_dual(x, tangent))
        got = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(got, tangent @ (layer.weight + delta.delta_weight()).T)


def test_hosted_layers_take_it_too() -> None:
    model = nn.Sequential(frozen())
    x = torch.randn(4, IN)
    before = model(x)
    fallow.attach(model, "lora", rank=2)
    assert torch.equal(model(x), before)
    kinds = {node.name() for node in [model(x).grad_fn]}
    assert kinds == {"_LowRankLinearBackward"}
