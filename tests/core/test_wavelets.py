"""The wavelet transforms against PyWavelets and their own matrix."""

from __future__ import annotations

import pytest
import pywt
import torch

from fallow.core.wavelets import TAPS, dwt, idwt, padded

NAMES = sorted(TAPS)


def eye(n):
    return torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [2, 4, 6, 16, 30])
def test_the_matrix_is_orthonormal_even_where_the_filter_is_longer_than_the_signal(name, n):
    h = dwt(eye(n), name, dim=0)
    torch.testing.assert_close(h @ h.T, eye(n), atol=1e-11, rtol=0)
    torch.testing.assert_close(idwt(eye(n), name, dim=0), h.T, atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_filters_are_pywavelets(name):
    theirs = torch.tensor(pywt.Wavelet(name).rec_lo, dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(TAPS[name], dtype=torch.float64), theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [16, 64])
def test_coefficients_are_pywavelets_whose_filters_reach_half_back_and_whose_high_ones_have_the_other_sign(name, n):
    x = torch.randn(n, dtype=torch.float64)
    low, high = dwt(x.roll(len(TAPS[name]) // 2 - 1), name).chunk(2)
    their_low, their_high = map(torch.from_numpy, pywt.dwt(x.numpy(), name, mode="periodization"))
    torch.testing.assert_close(low, their_low, atol=1e-10, rtol=0)
    sign = torch.sign(high @ their_high)
    torch.testing.assert_close(sign * high, their_high, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "levels"), [(1, 1), (7, 1), (77, 1), (77, 3), (8, 3)])
def test_the_inverse_gives_the_signal_back_for_odd_sizes_and_several_levels(name, n, levels):
    x = torch.randn(3, n, 2, dtype=torch.float64)
    coefficients = dwt(x, name, levels, dim=1)
    assert coefficients.shape == (3, padded(n, levels), 2)
    torch.testing.assert_close(idwt(coefficients, name, levels, dim=1, size=n), x, atol=1e-11, rtol=0)
    h = dwt(eye(n), name, levels, dim=0)
    torch.testing.assert_close(h.T @ h, eye(n), atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_two_levels_are_one_level_twice(name):
    x = torch.randn(16, dtype=torch.float64)
    low, high = dwt(x, name).chunk(2)
    torch.testing.assert_close(dwt(x, name, 2), torch.cat([dwt(low, name), high]))


def test_haar_is_sums_and_differences_of_neighbours():
    x = torch.randn(8, dtype=torch.float64)
    low, high = (x[::2] + x[1::2]) / 2**0.5, (x[::2] - x[1::2]) / 2**0.5
    torch.testing.assert_close(dwt(x, "haar"), torch.cat([low, high]))


@pytest.mark.parametrize("name", ["haar", "db4"])
def test_a_constant_has_no_high_coefficients(name):
    c = dwt(torch.ones(16, dtype=torch.float64), name)
    torch.testing.assert_close(c, torch.tensor([2**0.5] * 8 + [0.0] * 8, dtype=torch.float64), atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", ["haar", "db2", "sym4"])
def test_gradients_are_right_and_keep_nothing_of_the_signals_size(name):
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: dwt(t, name, 2), x)
    assert torch.autograd.gradcheck(lambda t: idwt(dwt(t, name, 2), name, 2, size=7) ** 2, x)
    kept = []
    wide = torch.randn(64, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        idwt(dwt(wide, name), name)
    assert max(kept) <= 4


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_narrow_dtypes_come_back_as_they_were(dtype, bound):
    x = torch.randn(3, 32).to(dtype)
    assert dwt(x, "db2").dtype == dtype
    torch.testing.assert_close(idwt(dwt(x, "db2"), "db2"), x, atol=bound, rtol=bound)
