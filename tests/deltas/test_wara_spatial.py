"""WaRA over a grid of tokens against its equation with explicit transforms."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from one_layer import OneLayer
from torch import Tensor, nn

from fallow.core.errors import ConfigError, ModelError
from fallow.core.wavelets import dwt
from fallow.deltas.wara_spatial import WaRASpatial


def adapted(
    rows: int = 4, columns: int = 6, prefix: int = 1, dtype: torch.dtype = torch.float64, **options: object
) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    given = {"rank": 3, "grid": (rows, columns), "prefix": prefix, **options}
    model = OneLayer(nn.Linear(10, 8, dtype=dtype), "wara-spatial", **given)
    model.delta.randomize()
    return model, torch.randn(2, prefix + rows * columns, 10, dtype=dtype)


def reference(model: OneLayer, x: Tensor) -> Tensor:
    """Every band of every input channel through A, phi, gains and B, then back, with matrices."""
    delta, o = model.delta, model.delta.o
    (rows, columns), prefix = o.grid, o.prefix
    hr, hc = (dwt(torch.eye(n, dtype=torch.float64), o.wavelet, dim=0) for n in (rows, columns))
    phi = F.gelu if o.phi == "gelu" else (lambda t: t)
    c = torch.einsum("ih,jw,bhwc->bijc", hr, hc, x[:, prefix:].reshape(len(x), rows, columns, -1))
    c = phi(c @ delta.A.T)
    gains = torch.zeros_like(c)
    r, q = hr.shape[0] // 2, hc.shape[0] // 2
    gains[:, :r, :q], gains[:, :r, q:], gains[:, r:, :q], gains[:, r:, q:] = delta.gains.detach()
    c = (c * gains) @ delta.B.T
    tokens = torch.einsum("ih,jw,bijc->bhwc", hr, hc, c).flatten(1, 2)
    first = phi(x[:, :prefix] @ delta.A.T) @ delta.B.T
    return delta.scaling * torch.cat([first if o.adapt_prefix else torch.zeros_like(first), tokens], 1)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4"])
@pytest.mark.parametrize(("rows", "columns", "prefix"), [(4, 6, 1), (5, 3, 0), (4, 4, 5)])
@pytest.mark.parametrize("phi", ["identity", "gelu"])
@pytest.mark.parametrize("adapt_prefix", [True, False])
def test_update_is_the_equation_also_for_odd_grids(wavelet, rows, columns, prefix, phi, adapt_prefix) -> None:
    model, x = adapted(rows, columns, prefix, wavelet=wavelet, phi=phi, adapt_prefix=adapt_prefix, alpha=1.5)
    torch.testing.assert_close(model(x) - model.layer(x), reference(model, x))


def test_output_is_unchanged_at_the_start_and_tokens_before_the_grid_stay_so() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(10, 8), torch.randn(2, 17, 10)
    model = OneLayer(layer, "wara-spatial", rank=3)
    assert torch.equal(model(x), layer(x))
    model.delta.randomize()
    assert torch.equal(model(x)[:, 0], layer(x)[:, 0])
    assert not torch.allclose(model(x)[:, 1:], layer(x)[:, 1:], atol=1e-3)


def test_with_equal_gains_it_is_lora_and_with_others_it_is_not() -> None:
    model, x = adapted(adapt_prefix=True)
    delta = model.delta
    lora = x @ delta.A.T @ delta.B.T
    with torch.no_grad():
        delta.gains.fill_(1)
    torch.testing.assert_close(model(x) - model.layer(x), lora)
    with torch.no_grad():
        delta.gains[0] = 2
    assert (model(x) - model.layer(x) - lora).abs().max() > 0.01


def test_gradients_are_those_of_finite_differences() -> None:
    model, x = adapted(3, 4, phi="gelu")
    delta = model.delta
    names = ["A", "B", "gains"]

    def run(*tensors: Tensor) -> Tensor:
        return torch.func.functional_call(delta, dict(zip(names, tensors, strict=True)), (x, torch.zeros(2, 13, 8)))

    assert torch.autograd.gradcheck(run, tuple(getattr(delta, name) for name in names))
    assert sum(p.numel() for p in delta.parameters()) == 3 * (10 + 8) + 12
    assert WaRASpatial.parameter_count((8, 10), delta.o) == 66


def test_a_sample_does_not_see_another_and_other_tokens_are_seen() -> None:
    model, x = adapted(wavelet="db2")
    with torch.no_grad():
        model.delta.gains[0] = 3
    one = model(x)
    x[1] = 0
    x[0, 3] += 1
    two = model(x)
    torch.testing.assert_close(two[0, 0], one[0, 0])
    assert float((two[0, 1] - one[0, 1]).abs().max()) > 1e-4  # a neighbour within the filter


def test_it_has_no_weight_to_merge() -> None:
    model, _ = adapted()
    with pytest.raises(ConfigError, match="'wara-spatial' acts on a layer's input and output"):
        model.merged()


@pytest.mark.parametrize(("tokens", "options"), [(16, {}), (18, {}), (13, {"grid": (3, 5)}), (1, {})])
def test_tokens_that_are_no_grid_are_refused(tokens: int, options: dict) -> None:
    model = OneLayer(nn.Linear(10, 8), "wara-spatial", rank=2, **options)
    with pytest.raises(ConfigError, match="give grid="):
        model(torch.randn(2, tokens, 10))
    with pytest.raises(ConfigError, match="give grid="):
        model(torch.randn(tokens, 10))


def test_bf16_scale_dropout_and_a_state_dict() -> None:
    model, x = adapted(dtype=torch.bfloat16)
    want = reference(copy.deepcopy(model).double(), x.double())
    got = model(x)
    assert got.dtype == torch.bfloat16
    assert model.delta.gains.dtype == torch.float32
    torch.testing.assert_close(got.double() - model.layer(x).double(), want, atol=0.06, rtol=0.05)
    exact, x = adapted()
    base, once = exact.layer(x), exact(x)
    exact.scale = 0.5
    torch.testing.assert_close(exact(x), base + 0.5 * (once - base))
    again = OneLayer(exact.layer, "wara-spatial", rank=3, grid=[4, 6])
    again.delta.load_state_dict(exact.delta.state_dict())
    assert torch.equal(again(x), once)
    dropped = adapted(dropout=0.5)[0]
    assert not torch.equal(dropped(x), dropped(x))
    assert torch.equal(dropped.eval()(x), once)


def test_the_compiled_layer_is_the_layer() -> None:
    model, x = adapted(dtype=torch.float32)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("wavelet", "random_orthogonal"),
        ("rank", 0),
        ("alpha", 0.0),
        ("dropout", 1.0),
        ("grid", (3,)),
        ("grid", (3, 0)),
        ("grid", 4),
        ("prefix", -1),
        ("adapt_prefix", 2),
        ("phi", "relu"),
    ],
)
def test_impossible_options_are_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{option}="):
        WaRASpatial.Options(**{option: value})


def test_other_layers_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="a layer of the kind 'conv'"):
        OneLayer(nn.Conv2d(4, 4, 1), "wara-spatial", rank=2)
