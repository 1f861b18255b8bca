"""The cosine basis, DCT-AdamW and Trion: the checks of their specification."""

from __future__ import annotations

import pytest
import torch
from steps import drawn, elements, kept, take
from torch import nn

from fallow.core.linalg import polar
from fallow.core.transforms import dct_matrix
from fallow.optim.bases.chosen import matched
from fallow.optim.dct_adamw import DCTAdamW
from fallow.optim.lowrank import LowRank
from fallow.optim.trion import Trion


def test_the_matrix_of_a_large_size_is_orthonormal():
    matrix = dct_matrix(2048).double()
    assert (matrix @ matrix.mT - torch.eye(2048)).abs().max() < 1e-6


@pytest.mark.parametrize("transform", ["fft", "matmul"])
@pytest.mark.parametrize("shape", [(10, 25), (25, 10), (9, 9)], ids=str)
def test_the_rows_with_the_largest_norm_are_chosen_and_hold_their_share(shape, transform):
    (grad,) = drawn(shape, 1, dtype=torch.float64)
    param = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    own = LowRank([param], 1.0, 4, basis={"name": "dct", "transform": transform}, inner={"name": "sgdm", "momentum": 0})
    moved = take(own, param, [grad])
    g = grad if shape[0] < shape[1] else grad.mT
    spectrum = dct_matrix(g.shape[0], torch.float64) @ g
    index = spectrum.norm(dim=1).topk(4)[1].sort()[0]
    assert own.state[param]["index"].tolist() == index.tolist()
    q = dct_matrix(g.shape[0], torch.float64)[index]
    projected = -(moved if shape[0] < shape[1] else moved.mT)
    torch.testing.assert_close(projected, q.mT @ (q @ g), rtol=0, atol=1e-12)
    rest = (g - projected).square().sum()
    torch.testing.assert_close(rest, g.square().sum() - spectrum[index].square().sum())
    assert rest <= (1 - 4 / g.shape[0]) * g.square().sum()


def test_norm_two_holds_no_less_than_norm_one_or_chance():
    grads = drawn((24, 40), 10)
    for grad in grads:
        grad[:, 0] *= 8  # a few large entries mislead the sum of magnitudes
    held: dict[object, list[float]] = {}
    for basis in ({"name": "dct", "norm": 2}, {"name": "dct", "norm": 1}, {"name": "coordinates"}):
        param = nn.Parameter(torch.zeros(24, 40))
        own = LowRank([param], 1.0, 5, basis=basis, inner={"name": "sgdm", "momentum": 0}, refresh_every=1)
        held[basis.get("norm")] = [float(take(own, param, [grad]).norm()) for grad in grads]
    assert all(two >= one - 1e-4 for two, one in zip(held[2], held[1], strict=True))
    assert sum(held[2]) > 1.1 * sum(held[None])


def test_moments_follow_their_numbers_as_a_dense_turn_would_have_it():
    c = dct_matrix(12, torch.float64)
    old, new = torch.tensor([1, 3, 4, 9]), torch.tensor([0, 3, 9, 10])
    moment = torch.randn(4, 5, dtype=torch.float64)
    param = nn.Parameter(torch.zeros(12, 20))
    basis = LowRank([param], 1e-2, 4, basis="dct").param_groups[0]["basis"]
    turn = matched(old, new)
    dense = c[new] @ c[old].mT @ moment
    torch.testing.assert_close(basis.turn(turn, moment, 1), dense, rtol=0, atol=1e-12)
    assert float(basis.overlap(turn)) == 0.5
    assert torch.equal(basis.turn(matched(old, old), moment, 1), moment)


def test_a_choice_that_stays_leaves_the_moments_bit_for_bit():
    (grad,) = drawn((8, 20), 1)
    anew, once = nn.Parameter(torch.zeros(8, 20)), nn.Parameter(torch.zeros(8, 20))
    own, other = DCTAdamW([anew], 1e-2, 3), DCTAdamW([once], 1e-2, 3, refresh_every=1000)
    take(own, anew, [grad] * 5)
    take(other, once, [grad] * 5)
    torch.testing.assert_close(anew, once, rtol=0, atol=1e-7)
    assert own.state[anew]["index"].tolist() == sorted(own.state[anew]["index"].tolist())


@pytest.mark.parametrize("form", ["fp32", "bf16"])
def test_with_error_feedback_nothing_of_a_gradient_is_lost(form):
    grads = drawn((8, 40), 12)
    param = nn.Parameter(torch.zeros(8, 40))
    own = LowRank(
        [param], 1.0, 3, basis="dct", inner={"name": "sgdm", "momentum": 0}, refresh_every=1,
        residual={"name": "feedback", "form": form},
    )  # fmt: skip
    take(own, param, grads)
    held = own.state[param]["held"]
    assert held.dtype == (torch.bfloat16 if form == "bf16" else torch.float32)
    missing = (-param.detach() + held.float() - sum(grads)).norm() / sum(grads).norm()
    assert missing < (1e-5 if form == "fp32" else 0.02)


def test_matrices_of_all_sizes_a_convolution_and_a_vector_move():
    shapes = [(6, 10), (12, 7), (5, 3, 3, 3), (9,), (1, 9)]
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    own = DCTAdamW(params, 1e-2, 3)
    for param in params:
        param.grad = torch.randn_like(param)
    own.step()
    assert all(param.detach().abs().sum() > 0 for param in params)
    assert [site.shared is not None for site in own.sites()] == [True, True, True, False, False]


def test_matrices_of_one_size_share_the_basis():
    params = [nn.Parameter(torch.zeros(6, 10)), nn.Parameter(torch.zeros(14, 6)), nn.Parameter(torch.zeros(8, 9))]
    own = DCTAdamW(params, 1e-2, 3)
    for param in params:
        param.grad = torch.randn_like(param)
    own.step()
    one, two, three = own.sites()
    assert one.shared is two.shared
    assert three.shared.shape == (8, 8)


def test_a_gradient_of_zero_leaves_the_choice_as_it_is():
    param = nn.Parameter(torch.zeros(8, 20))
    own = DCTAdamW([param], 1e-2, 3)
    take(own, param, drawn((8, 20), 2))
    before = own.state[param]["index"].clone()
    take(own, param, [torch.zeros(8, 20)])
    assert torch.equal(own.state[param]["index"], before)


def test_the_states_are_moments_and_whole_numbers_and_large_sides_take_adamw():
    param, embedding = nn.Parameter(torch.zeros(8, 20)), nn.Parameter(torch.zeros(60, 8))
    own = DCTAdamW([param, embedding], 1e-2, 3, largest_side=50)
    take(own, param, drawn((8, 20), 1))
    take(own, embedding, drawn((60, 8), 1))
    assert elements(own, param) == 2 * 3 * 20 + 3
    assert kept(own, param)["index"].dtype == torch.int32
    assert own.state[embedding]["m"].shape == (60, 8)


def test_trion_orthogonalises_the_chosen_rows_and_keeps_the_rest_in_the_momentum():
    grads = drawn((10, 25), 3)
    param = nn.Parameter(torch.zeros(10, 25))
    own = Trion([param], 0.1, 4)
    take(own, param, grads[:2])
    before = own.state[param]["held"].clone()
    moved = take(own, param, grads[2:])
    b = before + grads[2]
    q = dct_matrix(10)[own.state[param]["index"].long()]
    low = q @ b
    index = (dct_matrix(10) @ b).norm(p=1, dim=1).topk(4)[1].sort()[0]
    assert torch.equal(index, own.state[param]["index"].long())
    torch.testing.assert_close(own.state[param]["held"] + 0.05 * q.mT @ low, b, rtol=0, atol=1e-4)
    values = torch.linalg.svdvals(moved)[:4] / (0.1 * (10 / 25) ** 0.5)
    assert values.min() > 0.6
    assert values.max() < 1.25
    torch.testing.assert_close(moved, -0.1 * (10 / 25) ** 0.5 * q.mT @ polar(low, "svd"), rtol=0, atol=2e-3)
    assert elements(own, param) == 10 * 25 + 4


def test_trion_moves_all_else_by_adamw_at_its_own_rate():
    matrix, bias, small = (nn.Parameter(torch.zeros(shape)) for shape in ((6, 9), (9,), (3, 9)))
    own = Trion([matrix, bias, small], 0.02, 4)
    for param in (matrix, bias, small):
        param.grad = torch.randn_like(param)
    own.step()
    for param in (bias, small):
        torch.testing.assert_close(param.detach().abs(), torch.full_like(param, 3e-4), rtol=1e-4, atol=0)
