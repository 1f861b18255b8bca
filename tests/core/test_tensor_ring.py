"""Tensor rings against their definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from fallow.core.tensor_ring import balanced, ring_apply, ring_cost, ring_matrix, ring_rows, taken_apart


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


@pytest.mark.parametrize("sizes", [[(8, 6), (8, 8), (8, 4)], [(6, 5), (4, 3), (5, 6), (4, 5)]])
def test_core_by_core_values_and_gradients_are_those_of_the_matrix_over_many_pieces_of_rows(sizes):
    torch.manual_seed(0)
    cores = [core.requires_grad_() for core in ring(sizes, 2)]
    x = torch.randn(3, 50, torch.Size(core.shape[0] for core in cores).numel(), dtype=torch.float64, requires_grad=True)
    assert taken_apart(sizes, 2)
    got, want = ring_apply(x, cores), x @ ring_matrix(cores)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(got)
    for mine, theirs in zip(*(torch.autograd.grad((y * weights).sum(), [x, *cores]) for y in (got, want)), strict=True):
        torch.testing.assert_close(mine, theirs)
    only = [x.detach(), *cores[:-1], cores[-1].detach()]  # what is frozen gets none
    found = torch.autograd.grad(ring_apply(only[0], only[1:]).sum(), cores[:-1])
    torch.testing.assert_close(found, torch.autograd.grad((x @ ring_matrix(cores)).sum(), cores[:-1]))


def test_bf16_rows_go_through_float32_cores_and_come_back_in_bf16():
    cores = [core.float().requires_grad_() for core in ring([(8, 8)] * 3, 2)]
    x = torch.randn(80, 512).bfloat16().requires_grad_()
    y = ring_apply(x, cores)
    want = x.detach().double() @ ring_matrix([core.double() for core in cores])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, atol=1e-3, rtol=2**-8)
    y.sum().backward()
    assert (x.grad.dtype, cores[0].grad.dtype) == (torch.bfloat16, torch.float32)


def test_rows_core_by_core_can_be_differentiated_twice():
    cores = [core.requires_grad_() for core in ring([(2, 2), (3, 2)], 1)]
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *cores: ring_apply(x, cores), (x, *cores))


def test_costs_are_the_multiplications_of_each_core_and_few_rows_make_none():
    assert ring_cost([(8, 8), (8, 8), (12, 12)], 2) == 768 * (4 * 8 + 8 * 8 + 4 * 12)
    assert taken_apart([(8, 8), (8, 8), (12, 12)], 2)
    assert not taken_apart([(8, 8), (8, 8), (12, 12)], 3)
    assert not taken_apart([(97, 97)], 1)
    assert ring_apply(torch.empty(0, 6), [core.float() for core in ring([(2, 4), (3, 3)], 1)]).shape == (0, 12)


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
