from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fallow.core.bases import all_triples, ldu, leading, lower_gram, smallest

SHAPES = [(20, 32), (32, 20), (24, 24)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_rank(rank: int, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, rank) @ torch.randn(rank, columns)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_triples_are_the_singular_triples(shape):
    w = torch.randn(shape)
    u, s, vt = all_triples(w)
    exact = torch.linalg.svdvals(w.double())
    torch.testing.assert_close(s.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((u * s) @ vt, w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(u.T @ u, torch.eye(20 if 20 in shape else 24), rtol=0, atol=1e-6)
    torch.testing.assert_close(vt @ vt.T, torch.eye(20 if 20 in shape else 24), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 3])
def test_all_triples_of_a_matrix_of_lower_rank_are_orthonormal_too(shape, rank):
    w = of_rank(rank, *shape) if rank else torch.zeros(shape)
    u, s, vt = all_triples(w)
    assert float(s[rank:].abs().max()) < 1e-5
    torch.testing.assert_close(u.T @ u, torch.eye(min(shape)), rtol=0, atol=1e-6)
    torch.testing.assert_close(vt @ vt.T, torch.eye(min(shape)), rtol=0, atol=1e-6)
    torch.testing.assert_close((u * s) @ vt, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_signs_of_the_triples_do_not_depend_on_how_they_were_computed(shape):
    w = torch.randn(shape, dtype=torch.float64)
    u, _, vt = all_triples(w)
    scrambled = torch.linalg.svd(w.flip(0).contiguous(), full_matrices=False)
    again_u, again_vt = scrambled[0].flip(0), scrambled[2]
    sign = torch.where((torch.randn(shape[0], generator=seeded(), dtype=w.dtype) @ again_u) < 0, -1.0, 1.0)
    torch.testing.assert_close(u, again_u * sign)
    torch.testing.assert_close(vt, again_vt * sign.unsqueeze(1).to(w))


def test_close_singular_values_are_told_apart_as_float64_does_though_the_matrix_is_float32():
    q = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0]
    w = (q * torch.linspace(1, 1 + 1e-4, 40, dtype=torch.float64) @ q.T.flip(0)).float()
    u, _, _ = all_triples(w)
    exact = torch.linalg.svd(w.double())[0]
    assert float(((u.double().T @ exact).abs().max(0).values - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("shape", [(300, 300), (257, 310), (401, 600), (24, 40)])
def test_the_gram_matrix_has_the_lower_triangle_that_eigenvectors_are_made_of(shape):
    w = torch.randn(shape, dtype=torch.float64)
    made, whole = lower_gram(w), w @ w.T
    torch.testing.assert_close(made.tril(), whole.tril(), rtol=1e-12, atol=1e-11)
    values, vectors = torch.linalg.eigh(made)
    torch.testing.assert_close((vectors * values) @ vectors.T, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(20, 32), (32, 20), (90, 70), (70, 90), (300, 280)])
def test_the_smallest_part_is_what_the_exact_truncation_drops(shape):
    w, rank = torch.randn(shape), 4
    p, q = smallest(w, rank)
    assert (p.shape, q.shape) == ((shape[0], rank), (rank, shape[1]))
    u, s, vt = torch.linalg.svd(w.double(), full_matrices=False)
    dropped = (u[:, -rank:] * s[-rank:]) @ vt[-rank:]
    assert float((p.double() @ q.double() - dropped).norm() / dropped.norm()) < 1e-6
    assert torch.linalg.matrix_rank((w - p @ q).double(), atol=1e-4) == min(shape) - rank


@pytest.mark.parametrize("shape", [(70, 90), (90, 70), (20, 32)])
@pytest.mark.parametrize("rank", [0, 5])
def test_the_smallest_part_of_a_matrix_of_lower_rank_is_nothing(shape, rank):
    p, q = smallest(of_rank(rank, *shape) if rank else torch.zeros(shape), 8)
    assert float((p @ q).abs().max()) < 1e-5


def test_the_smallest_part_of_an_orthogonal_matrix_is_as_large_as_any():
    w = torch.linalg.qr(torch.randn(80, 80))[0]
    p, q = smallest(w, 6)
    assert float((p @ q).norm()) == pytest.approx(6**0.5, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_ldu_gives_the_matrix_back_with_unit_triangles(shape):
    w = torch.randn(shape)
    left, d, upper, pivots = ldu(w)
    torch.testing.assert_close((left * d) @ upper, w, rtol=1e-5, atol=1e-5)
    lower = left[pivots.long()]
    assert torch.equal(lower.triu(), torch.eye(min(shape)))
    assert torch.equal(upper.tril(), torch.eye(*upper.shape))
    assert float(left.abs().max()) <= 1.0 + 1e-6  # partial pivoting


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", ["rank 3", "singular block", "zero row", "zero column", "zero"])
def test_ldu_of_a_singular_matrix_is_finite_and_gives_it_back(shape, case):
    w = of_rank(3, *shape) if case == "rank 3" else torch.zeros(shape) if case == "zero" else torch.randn(shape)
    if case == "zero row":
        w[2] = 0
    if case == "singular block":
        w[:, :6] = of_rank(2, shape[0], 6)
    if case == "zero column":
        w[:, 0] = 0
    left, d, upper, _ = ldu(w)
    assert bool(torch.isfinite(upper).all())
    torch.testing.assert_close((left * d) @ upper, w, rtol=1e-5, atol=1e-5)


def test_leading_is_exact_where_the_matrix_is_small_or_the_rank_is_large():
    w = torch.randn(40, 30)
    u, s, vt = leading(w, 5, seeded())
    exact = torch.linalg.svd(w.double())
    torch.testing.assert_close(s.double(), exact[1][:5], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ((u * s) @ vt).double(), exact[0][:, :5] * exact[1][:5] @ exact[2][:5], rtol=1e-4, atol=1e-5
    )
