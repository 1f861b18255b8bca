from __future__ import annotations

import pytest
import torch

from fallow.core.errors import ConfigError
from fallow.core.linalg import Truncation, energy_rank, low_rank, of_product, polar, truncated


def with_spectrum(spectrum: list[float], rows: int, columns: int) -> torch.Tensor:
    rank = len(spectrum)
    u, v = (torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64))[0] for n in (rows, columns))
    return (u * torch.tensor(spectrum, dtype=torch.float64)) @ v.T


@pytest.mark.parametrize(("rows", "columns"), [(20, 30), (30, 20), (25, 25)])
def test_the_exact_mode_gives_ones_for_non_zero_singular_values_and_zeros_else(rows, columns):
    x = with_spectrum([1e4, 3.0, 1e-3], rows, columns)
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(polar(x, "svd"), u[:, :3] @ vt[:3], atol=1e-9, rtol=0)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(("rows", "columns"), [(20, 30), (30, 20)])
def test_polar_express_brings_every_singular_value_near_one_whatever_the_scale(rows, columns, scale):
    x = (scale * with_spectrum([1.0, 0.3, 0.1, 0.03, 0.01, 3e-3], rows, columns)).float()
    values = torch.linalg.svdvals(polar(x))
    assert float((values[:6] - 1).abs().max()) < 0.02
    assert float(values[6:].abs().max()) < 0.02
    assert torch.cosine_similarity(polar(x).flatten(), polar(x, "svd").flatten(), dim=0) > 0.999


def test_newton_schulz_never_overshoots_and_leaves_only_the_smallest_short():
    values = torch.linalg.svdvals(polar(with_spectrum([1.0, 0.1, 0.03, 1e-3], 20, 30), "newton-schulz"))
    assert float(values.max()) <= 1 + 1e-9
    assert values[:3].tolist() == pytest.approx([1, 1, 1], abs=0.01)
    assert 0 < float(values[3]) < 0.5


@pytest.mark.parametrize("mode", ["newton-schulz", "polar-express", "svd"])
def test_a_batch_is_its_matrices_zero_stays_zero_and_the_dtype_is_kept(mode):
    x = torch.randn(3, 12, 9)
    x[1] = 0
    out = polar(x, mode)
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert not out[1].any()
    torch.testing.assert_close(out[2], polar(x[2], mode), rtol=1e-4, atol=1e-5)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode='qr' must be one of"):
        polar(torch.eye(2), "qr")


# -- leading singular triples -----------------------------------------------------------------------------------------


def decaying(rows: int, columns: int, rank: int = 300, factor: float = 0.97) -> torch.Tensor:
    return with_spectrum([factor**i for i in range(rank)], rows, columns)


def test_the_range_finder_gives_the_leading_triples_of_the_decomposition():
    x = decaying(500, 420).float()
    u, s, vt = low_rank(x, 20, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.svdvals(x)
    torch.testing.assert_close(s, exact[:20], rtol=1e-2, atol=0)
    error, best = float((x - (u * s) @ vt).norm()), float(exact[20:].norm())
    assert best <= error * (1 + 1e-5) < 1.005 * best  # a truncated decomposition is the best there is


def test_a_start_from_the_vectors_of_a_matrix_nearby_saves_the_power_iterations():
    x = decaying(420, 500)
    _, _, near = low_rank(x + 1e-3 * torch.randn_like(x), 36, steps=3, generator=torch.Generator().manual_seed(0))

    def error(**how):
        u, s, vt = low_rank(x, 20, generator=torch.Generator().manual_seed(1), **how)
        return float((x - (u * s) @ vt).norm())

    best = float(torch.linalg.svdvals(x)[20:].norm())
    assert error(steps=0, start=near.mT) / best < 1.01 < 1.1 < error(steps=0) / best


@pytest.mark.parametrize(("rows", "columns"), [(40, 300), (300, 300)])
def test_small_matrices_and_large_ranks_are_decomposed_exactly(rows, columns):
    x = torch.randn(rows, columns, dtype=torch.float64)
    u, s, vt = low_rank(x, 300)
    torch.testing.assert_close((u * s) @ vt, x, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("how", "rank"),
    [
        (Truncation(rank=3), 3),
        (Truncation(energy=0.9), 2),  # 16, 4, 1, 1/4 of 21.25: 16 is 0.753, 20 is 0.941, 21 is 0.988
        (Truncation(energy=0.95), 3),
        (Truncation(energy=0.5), 1),
        (Truncation(ratio=2.1), 2),
        (Truncation(energy=1.0, most=2), 2),
        (Truncation(rank=99), 4),
    ],
)
def test_the_rank_follows_from_number_energy_or_ratio(how, rank):
    assert how.choose(torch.tensor([4.0, 2.0, 1.0, 0.5])) == rank


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_truncation_by_energy_is_that_of_the_whole_spectrum_however_few_values_were_computed(energy):
    x = decaying(600, 500, rank=400, factor=0.985).float()
    exact = torch.linalg.svdvals(x.double())
    u, s, vt = truncated(x, Truncation(energy=energy), torch.Generator().manual_seed(0))
    assert abs(s.numel() - energy_rank(exact, energy)) <= 1
    held = 1 - float(((u * s) @ vt - x).norm() / x.norm()) ** 2
    assert held == pytest.approx(energy, abs=0.01)


def test_truncation_by_ratio_stops_at_the_value_that_is_too_small():
    x = decaying(600, 500, rank=400, factor=0.985)
    assert truncated(x, Truncation(ratio=10), torch.Generator().manual_seed(0))[1].numel() == pytest.approx(153, abs=1)
    assert truncated(x, Truncation(ratio=10, most=70))[1].numel() == 70


@pytest.mark.parametrize(("rows", "columns", "inner"), [(90, 70, 5), (12, 70, 30), (5, 5, 5)])
def test_the_triples_of_a_product_are_those_of_the_matrix_it_is(rows, columns, inner):
    b, a = torch.randn(rows, inner, dtype=torch.float64), torch.randn(inner, columns, dtype=torch.float64)
    u, s, vt = of_product(b, a)
    assert s.numel() == min(rows, columns, inner)
    torch.testing.assert_close((u * s) @ vt, b @ a, atol=1e-10, rtol=0)
    torch.testing.assert_close(s, torch.linalg.svdvals(b @ a)[: s.numel()], atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "nothing is given"),
        ({"rank": 2, "energy": 0.9}, "rank and energy"),
        ({"rank": 0}, "rank=0"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"ratio": 1.0}, "ratio=1.0"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"energy": 0.9, "most": 0}, "most=0"),
    ],
)
def test_impossible_truncations_are_refused_by_name(how, message):
    with pytest.raises(ConfigError, match=message):
        Truncation(**how)
