"""The cosine transforms against SciPy and the explicit matrix."""

from __future__ import annotations

import pytest
import scipy.fft
import torch

from fallow.core.transforms import dct, dct2, dct_matrix, dct_rows, idct, idct2

SIZES = [1, 2, 3, 4, 7, 8, 77, 320]


@pytest.mark.parametrize("n", SIZES)
def test_both_transforms_are_scipys_to_float64_accuracy(n):
    x = torch.randn(3, n, dtype=torch.float64)
    torch.testing.assert_close(dct(x), torch.from_numpy(scipy.fft.dct(x.numpy(), norm="ortho")), atol=1e-13, rtol=0)
    torch.testing.assert_close(idct(x), torch.from_numpy(scipy.fft.idct(x.numpy(), norm="ortho")), atol=1e-13, rtol=0)
    torch.testing.assert_close(idct(dct(x)), x, atol=1e-13, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 7, 768])
def test_the_matrix_is_orthonormal_and_is_what_the_transform_does(n):
    c = dct_matrix(n, torch.float64)
    torch.testing.assert_close(c @ c.T, torch.eye(n, dtype=torch.float64), atol=1e-13, rtol=0)
    torch.testing.assert_close(dct(torch.eye(n, dtype=torch.float64), 0), c, atol=1e-13, rtol=0)


def test_rows_of_a_wide_matrix_keep_their_digits_in_float32():
    index = torch.tensor([0, 1, 14335, 9000])
    want = dct_matrix(14336 // 64, torch.float64)[:2]
    torch.testing.assert_close(dct_rows(index[:2], 14336 // 64).double(), want, atol=1e-8, rtol=0)
    rows = dct_rows(index, 14336)
    torch.testing.assert_close(rows, dct_rows(index, 14336, torch.float64).float(), atol=0, rtol=0)
    unit = torch.zeros(4, 14336, dtype=torch.float64)
    unit[range(4), index] = 1
    torch.testing.assert_close(rows.double(), idct(unit), atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (2, 7, 7), (1, 1)])
def test_two_dimensions_are_scipys_for_batches_and_odd_sizes(shape):
    x = torch.randn(*shape, dtype=torch.float64)
    want = scipy.fft.dctn(x.numpy(), norm="ortho", axes=(-2, -1))
    torch.testing.assert_close(dct2(x), torch.from_numpy(want), atol=1e-13, rtol=0)
    torch.testing.assert_close(idct2(dct2(x)), x, atol=1e-13, rtol=0)


@pytest.mark.parametrize("dim", [0, 1, -2])
def test_any_dimension_can_be_transformed(dim):
    x = torch.randn(4, 7, 3, dtype=torch.float64)
    want = scipy.fft.dct(x.numpy(), norm="ortho", axis=dim)
    torch.testing.assert_close(dct(x, dim), torch.from_numpy(want), atol=1e-13, rtol=0)
    torch.testing.assert_close(idct(dct(x, dim), dim), x, atol=1e-13, rtol=0)


@pytest.mark.parametrize("n", [1, 6, 7])
def test_gradients_are_right_twice(n):
    x = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dct, x)
    assert torch.autograd.gradcheck(idct, x)
    assert torch.autograd.gradgradcheck(lambda t: dct(t) ** 2, x)
    weights = torch.randn(2, n, dtype=torch.float64)
    (grad,) = torch.autograd.grad((dct(x) * weights).sum(), x)
    torch.testing.assert_close(grad, idct(weights))  # orthonormal: the transpose is the inverse


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_narrow_dtypes_come_back_as_they_were(dtype, bound):
    x = torch.randn(3, 321).to(dtype)
    got = dct(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), dct(x.double()), atol=bound * 2, rtol=bound)
    assert idct(x).dtype == dtype


def test_nothing_is_kept_for_the_backward():
    kept = []
    x = torch.randn(64, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        idct2(dct2(x)).sum()
    assert kept == []


def test_a_compiled_transform_is_the_same_with_its_gradient():
    x = torch.randn(3, 10, requires_grad=True)
    weights = torch.randn(3, 10)
    got = torch.compile(dct2, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, dct2(x))
    (grad,) = torch.autograd.grad(got, x, weights)
    torch.testing.assert_close(grad, idct2(weights))
