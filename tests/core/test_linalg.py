from __future__ import annotations

import pytest
import torch

from fallow.core.linalg import polar


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
