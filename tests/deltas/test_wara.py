"""WaRA against its equations with explicit wavelet matrices, and against the paper's layer."""

from __future__ import annotations

import copy

import pytest
import torch
from one_layer import LAYERS, OneLayer, inputs, with_matrix
from torch import Tensor, nn

from fallow.core.errors import ConfigError, ModelError
from fallow.core.views import view_of
from fallow.core.wavelets import dwt, idwt, padded
from fallow.deltas.wara import WaRA

KINDS = [kind for kind in sorted(LAYERS) if kind != "embedding"]
FORMS = [
    {"rank": 2},
    {"rank": 2, "levels": 2},
    {"rank": 2, "levels": 2, "variant": "weight"},
    {"bands": (2, 0, 1, 2), "variant": "weight", "wavelet": "haar"},
    {"rank": 2, "tiny": "full"},
    {"rank": 2, "tiny": "diag", "wavelet": "random_orthogonal"},
    {"rank": 2, "wavelet": "random_orthogonal"},
]


def adapted(layer: nn.Module | str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = (LAYERS[layer]() if isinstance(layer, str) else layer).to(dtype)
    model = OneLayer(layer, "wara", **{"rank": 2, **options})
    model.delta.randomize()
    return model, inputs(layer)


def matrix(n: int, wavelet: str, levels: int = 1, taps: int = 1) -> Tensor:
    """H (padded, n) of n channels, for rows of n * taps."""
    h = dwt(torch.eye(n, dtype=torch.float64), wavelet, levels, dim=0)
    return torch.kron(h.contiguous(), torch.eye(taps, dtype=torch.float64))


def block(rows: list[list[Tensor]]) -> Tensor:
    return torch.cat([torch.cat(row, 1) for row in rows])


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_unchanged_at_the_start_bit_for_bit(kind: str, options: dict) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    model, x = OneLayer(layer, "wara", **options), inputs(layer)
    assert torch.equal(model(x), layer(x))


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_w_plus_d_in_values_gradients_and_merged(kind: str, options: dict) -> None:
    model, x = adapted(kind, alpha=3.0, **options)
    layer = model.layer
    y = model(x)
    w = view_of(layer).read(layer.weight) + model.delta.delta_weight()
    want = with_matrix(layer, w, x)
    torch.testing.assert_close(y, want)
    weights = torch.randn_like(y)
    params = list(model.delta.parameters())
    got, expected = (torch.autograd.grad((t * weights).sum(), params) for t in (y, want))
    assert all(float(g.abs().max()) > 1e-6 for g in got)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(model.by_merged(x), y)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4"])
@pytest.mark.parametrize(("out", "width"), [(12, 20), (7, 9)])
@pytest.mark.filterwarnings("ignore:wavelet='haar'")
def test_feature_is_the_equation_with_explicit_matrices_also_for_odd_sides(wavelet: str, out: int, width: int) -> None:
    delta = adapted(nn.Linear(width, out), wavelet=wavelet, alpha=3.0)[0].delta
    m = delta.B1 @ delta.A1
    want = 1.5 * matrix(out, wavelet).T @ torch.block_diag(m, m) @ matrix(width, wavelet)
    torch.testing.assert_close(delta.delta_weight(), want)
    assert int(torch.linalg.matrix_rank(want)) == 4


def test_levels_of_feature_have_a_pair_each_and_the_coarsest_low_band_shares_its_own() -> None:
    delta = adapted(nn.Linear(24, 16), levels=3)[0].delta
    m = [getattr(delta, f"B{j}") @ getattr(delta, f"A{j}") for j in (1, 2, 3)]
    want = matrix(16, "db2", 3).T @ torch.block_diag(m[2], m[2], m[1], m[0]) @ matrix(24, "db2", 3)
    torch.testing.assert_close(delta.delta_weight(), want)
    assert m[2].shape == (2, 3)


def test_weight_has_a_product_for_each_band_and_goes_on_in_the_low_one() -> None:
    model, _ = adapted(nn.Linear(24, 16), variant="weight", bands=(1, 2, 0, 2))
    delta = model.delta
    ll, lh, _, hh = (b @ a for b, a in zip(delta.B1.split((1, 2, 0, 2), 1), delta.A1.split((1, 2, 0, 2)), strict=True))
    s = block([[ll, lh], [torch.zeros_like(ll), hh]])
    torch.testing.assert_close(delta.delta_weight(), matrix(16, "db2").T @ s @ matrix(24, "db2"))
    delta = adapted(nn.Linear(24, 16), variant="weight", rank=1, levels=2)[0].delta
    ll, lh, hl, hh = (b @ a for b, a in zip(delta.B2.split(1, 1), delta.A2.split(1), strict=True))
    low = matrix(8, "db2").T @ block([[ll, lh], [hl, hh]]) @ matrix(12, "db2")
    lh, hl, hh = (b @ a for b, a in zip(delta.B1.split(1, 1), delta.A1.split(1), strict=True))
    want = matrix(16, "db2").T @ block([[low, lh], [hl, hh]]) @ matrix(24, "db2")
    torch.testing.assert_close(delta.delta_weight(), want)
    assert int(torch.linalg.matrix_rank(want)) == 7


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.filterwarnings("ignore:wavelet='haar'")
def test_feature_is_the_papers_layer_with_its_transform_over_tokens(wavelet: str) -> None:
    """2-D transform of X (in, N), the four bands through one M, and back."""
    model, _ = adapted(nn.Linear(20, 12, bias=False), wavelet=wavelet)
    x = torch.randn(20, 6, dtype=torch.float64)
    c = dwt(dwt(x, wavelet, dim=0), wavelet, dim=1)
    m = model.delta.B1 @ model.delta.A1
    bands = [[m @ band for band in half.chunk(2, 1)] for half in c.chunk(2, 0)]
    update = idwt(idwt(block(bands), wavelet, dim=1), wavelet, dim=0)
    torch.testing.assert_close(model(x.T) - model.layer(x.T), update.T)


def test_haar_with_a_shared_pair_is_a_kronecker_product_and_warns_and_a_longer_filter_is_not() -> None:
    with pytest.warns(UserWarning, match="take a longer filter"):
        haar = adapted("linear", wavelet="haar")[0].delta
    want = torch.kron(haar.B1 @ haar.A1, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(haar.delta_weight(), want)
    db2 = adapted("linear")[0].delta
    far = db2.delta_weight() - torch.kron(db2.B1 @ db2.A1, torch.eye(2, dtype=torch.float64))
    assert far.norm() > 0.1 * db2.delta_weight().norm()


def test_the_coarse_band_alone_is_constant_over_pairs_of_neighbours_with_haar() -> None:
    d = adapted("linear", variant="weight", bands=(2, 0, 0, 0), wavelet="haar")[0].delta.delta_weight()
    torch.testing.assert_close(d[::2], d[1::2])
    torch.testing.assert_close(d[:, ::2], d[:, 1::2])
    assert float(d.norm()) > 0.01


def test_a_convolution_is_transformed_over_channels_and_over_its_patch_where_they_are_odd() -> None:
    delta = adapted("conv")[0].delta  # (8, 4, 3, 3)
    m = delta.B1 @ delta.A1
    want = matrix(8, "db2").T @ torch.block_diag(m, m) @ matrix(4, "db2", taps=9)
    torch.testing.assert_close(delta.delta_weight(), want)
    delta = adapted(nn.Conv2d(3, 8, 3))[0].delta
    m = delta.B1 @ delta.A1
    want = matrix(8, "db2").T @ torch.block_diag(m, m) @ matrix(27, "db2")
    torch.testing.assert_close(delta.delta_weight(), want)


@pytest.mark.parametrize("form", ["full", "diag"])
def test_tiny_trains_r_alone_between_the_leading_vectors_of_the_low_band(form: str) -> None:
    model, _ = adapted(nn.Linear(20, 12), tiny=form)
    delta, w = model.delta, model.layer.weight
    low = (matrix(12, "db2") @ w @ matrix(20, "db2").T)[:6, :10]
    u, s, vt = torch.linalg.svd(low)
    eye = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(delta.U.T @ delta.U, eye)
    torch.testing.assert_close(delta.V @ delta.V.T, eye)
    torch.testing.assert_close(delta.U @ torch.diag(s[:2]) @ delta.V, (u[:, :2] * s[:2]) @ vt[:2])
    assert [name for name, _ in delta.named_parameters()] == ["R"]
    g = torch.randn(12, 20, dtype=torch.float64)
    delta.delta_weight().backward(g)
    c = matrix(12, "db2") @ g @ matrix(20, "db2").T
    want = delta.U.T @ (c[:6, :10] + c[6:, 10:]) @ delta.V.T
    torch.testing.assert_close(delta.R.grad, want if form == "full" else want.diagonal())


def test_the_random_control_is_orthonormal_and_one_for_all_layers_of_a_size() -> None:
    common = nn.Module()
    first, second = (
        OneLayer(nn.Linear(20, 12), "wara", rank=2, wavelet="random_orthogonal", common=common, name=name).delta
        for name in ("a", "b")
    )
    h = first.shared("orthogonal_12")
    torch.testing.assert_close(h @ h.T, torch.eye(12), atol=1e-5, rtol=0)
    assert second.shared("orthogonal_12") is h
    assert {name for name, _ in common.named_buffers()} == {"orthogonal_12", "orthogonal_20"}
    assert common.state_dict() == {}


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(12, 20), (7, 9)])
def test_trained_numbers_are_the_formula(options: dict, shape: tuple[int, int]) -> None:
    delta = OneLayer(nn.Linear(shape[1], shape[0]), "wara", **options).delta
    trained = sum(p.numel() for p in delta.parameters())
    assert trained == WaRA.parameter_count(shape, WaRA.Options(**options))
    if options == {"rank": 2} and shape == (12, 20):
        assert trained == 2 * (12 + 20) // 2
    if "bands" in options and shape == (12, 20):
        assert trained == 5 * (12 + 20) // 2


def test_feature_has_half_of_loras_numbers_at_twice_its_rank() -> None:
    delta = adapted(nn.Linear(64, 64), rank=4)[0].delta
    assert sum(p.numel() for p in delta.parameters()) == 4 * 128 // 2
    assert int(torch.linalg.matrix_rank(delta.delta_weight())) == 8


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_training_goes_on_from_a_state_dict_bit_for_bit(options: dict) -> None:
    model, x = adapted("linear", torch.float32, **options)
    again = OneLayer(copy.deepcopy(model.layer), "wara", fresh=False, **options)
    again.delta.load_state_dict(model.delta.state_dict())
    for one in (model, again):
        optimizer = torch.optim.AdamW(one.delta.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            (one(x) - 1).square().mean().backward()
            optimizer.step()
    assert torch.equal(model(x), again(x))


def test_scale_counts_the_change() -> None:
    model, x = adapted("conv")
    base, once = model.layer(x), model(x)
    model.scale = -0.5
    torch.testing.assert_close(model(x), base - 0.5 * (once - base))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_bf16_layers_keep_float32_factors_and_give_bf16(kind: str) -> None:
    model, x = adapted(kind, torch.bfloat16)
    want = copy.deepcopy(model).double().by_merged(x.double())
    got = model(x)
    assert got.dtype == torch.bfloat16
    assert model.delta.A1.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=0.06, rtol=0.03)
    got.float().sum().backward()
    assert float(model.delta.A1.grad.abs().max()) > 0


def test_the_backward_keeps_the_input_the_channels_of_the_ranks_and_thin_factors() -> None:
    torch.manual_seed(0)
    model = OneLayer(nn.Linear(64, 96), "wara", rank=2)
    x, kept = torch.randn(50, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model(x)
    sizes = sorted(n for n in kept if n > 4)  # the others are taps
    assert max(n for n in sizes if n != x.numel()) <= 4 * 96
    assert 50 * 4 in sizes


def test_the_compiled_layer_is_the_layer() -> None:
    model, x = adapted("linear", torch.float32, variant="weight", levels=2, rank=1)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "spatial"}, "variant='spatial' must be one of 'feature', 'weight'"),
        ({"wavelet": "db3"}, "wavelet='db3' must be one of"),
        ({"levels": 4}, "levels=4"),
        ({"levels": 2, "wavelet": "random_orthogonal"}, "levels=2 has no meaning"),
        ({"rank": 0}, "rank=0"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"bands": (1, 1, 1, 1)}, "needs variant='weight'"),
        ({"bands": (1, 1), "variant": "weight"}, "needs variant='weight' and the ranks of LL, LH, HL, HH"),
        ({"bands": 4, "variant": "weight"}, "bands=4 needs variant='weight' and the ranks of LL, LH, HL, HH"),
        ({"bands": (1, 1, 1, -1), "variant": "weight"}, "bands=-1"),
        ({"bands": (0, 0, 0, 0), "variant": "weight"}, "without any rank"),
        ({"tiny": "half"}, "tiny='half'"),
        ({"tiny": "full", "levels": 2}, "tiny='full' is one level"),
    ],
)
def test_impossible_options_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        WaRA.Options(**options)


def test_a_rank_above_half_of_the_layer_and_an_embedding_are_refused() -> None:
    with pytest.raises(ConfigError, match="rank=7 is above what half of 'layer'"):
        OneLayer(nn.Linear(20, 12), "wara", rank=7)
    with pytest.raises(ModelError, match="a layer of the kind 'embedding'"):
        OneLayer(nn.Embedding(8, 12), "wara", rank=2)
    assert padded(7) == 8
