"""Tensor rings against their definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from fallow.core.tensor_ring import balanced, ring_apply, ring_matrix, ring_rows


def ring(sizes, rank):
    return [torch.randn(m, n, rank, rank, dtype=torch.float64) for m, n in sizes]


def by_definition(cores):
    rows, columns = ([core.shape[side] for core in cores] for side in (0, 1))
    entries = []
    for i in itertools.product(*map(range, rows)):
        for j in itertools.product(*map(range, columns)):
            product = torch.eye(cores[0].shape[2], dtype=torch.float64)
            for core, a, b in zip(cores, i, j, strict=True):
                product = product @ core[a, b]
            entries.append(product.trace())
    return torch.stack(entries).view(torch.Size(rows).numel(), -1)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("sizes", [[(2, 2), (3, 3), (4, 4)], [(2, 3), (4, 1)], [(5, 4)]])
def test_the_matrix_is_the_trace_formula_and_rows_go_through_it_without_it(sizes, rank):
    cores = ring(sizes, rank)
    t = by_definition(cores)
    torch.testing.assert_close(ring_matrix(cores), t)
    x = torch.randn(3, 2, t.shape[0], dtype=torch.float64)
    torch.testing.assert_close(ring_apply(x, cores), x @ t)
    turned = [core.transpose(0, 1) for core in cores]
    y = torch.randn(5, t.shape[1], dtype=torch.float64)
    torch.testing.assert_close(ring_apply(y, turned), y @ t.T)


def test_rank_one_is_the_kronecker_product():
    cores = ring([(2, 3), (3, 3), (4, 2)], 1)
    a, b, c = (core[:, :, 0, 0] for core in cores)
    torch.testing.assert_close(ring_matrix(cores), torch.kron(torch.kron(a, b), c))


@pytest.mark.parametrize("rank", [1, 2])
def test_gradients_are_right(rank):
    cores = [core.requires_grad_() for core in ring([(2, 2), (3, 2)], rank)]
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *cores: ring_apply(x, cores), (x, *cores))


def test_rows_are_products_of_the_cores_in_order():
    cores = [torch.randn(n, 2, 2, dtype=torch.float64) for n in (3, 1, 4)]
    rows = ring_rows(cores)
    assert rows.shape == (12, 2, 2)
    torch.testing.assert_close(rows[2 * 4 + 3], cores[0][2] @ cores[1][0] @ cores[2][3])


@pytest.mark.parametrize(
    ("n", "factors"),
    [
        (320, (4, 8, 10)),
        (640, (8, 8, 10)),
        (768, (8, 8, 12)),
        (1280, (8, 10, 16)),
        (2048, (8, 16, 16)),
        (77, (7, 11)),
        (97, (97,)),
        (1, (1,)),
        (14336, (16, 28, 32)),
    ],
)
def test_factors_are_balanced_and_those_of_the_paper(n, factors):
    assert balanced(n, 3) == factors


def test_fewer_factors_are_larger():
    assert balanced(768, 2) == (24, 32)
    assert balanced(768, 1) == (768,)
