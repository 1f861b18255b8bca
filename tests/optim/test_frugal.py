"""FRUGAL: the checks of its specification that the tests of combinations do not make already."""

from __future__ import annotations

import copy

import pytest
import torch
from steps import drawn, elements, kept, take
from torch import nn

from fallow.core.errors import ConfigError
from fallow.optim.frugal import FRUGAL


def columns(param: nn.Parameter, rank=0.25, **options) -> FRUGAL:
    return FRUGAL([param], 1e-2, rank, **{"basis": "coordinates", "side": "right", **options})


def test_a_share_of_one_is_adamw_and_a_share_of_zero_is_the_free_rule():
    grads = drawn((6, 9), 5)
    every, adamw, none = (nn.Parameter(torch.ones(6, 9)) for _ in range(3))
    take(FRUGAL([every], 1e-2, 1.0, weight_decay=0.1), every, grads)
    take(torch.optim.AdamW([adamw], 1e-2, weight_decay=0.1), adamw, grads)
    torch.testing.assert_close(every, adamw, rtol=0, atol=1e-6)
    own = FRUGAL([none], 1e-2, 0.0, share=0.5)
    moved = take(own, none, grads)
    torch.testing.assert_close(moved, -1e-2 * 0.5 * grads[-1].sign(), rtol=0, atol=1e-7)
    assert not kept(own, none)
    with pytest.raises(ConfigError, match=r"rank=0\.0 leaves nothing to residual='drop'"):
        FRUGAL([none], 1e-2, 0.0, free=None)


@pytest.mark.parametrize("share", [1.0, 0.1])
@pytest.mark.parametrize("shape", [(6, 12), (12, 6)], ids=str)
def test_in_the_first_step_chosen_columns_move_by_the_rate_and_others_by_their_share_of_it(share, shape):
    param = nn.Parameter(torch.zeros(shape))
    own = columns(param, share=share, eps=0.0)
    moved = take(own, param, drawn(shape, 1)).abs()
    index = own.state[param]["index"].long()
    assert index.numel() == shape[1] // 4
    wanted = torch.full(shape, 1e-2 * share).index_fill(1, index, 1e-2)
    torch.testing.assert_close(moved, wanted, rtol=0, atol=1e-6)


def test_rows_are_chosen_on_the_left_and_entries_anywhere():
    param = nn.Parameter(torch.zeros(8, 12))
    own = FRUGAL([param], 1e-2, 0.25, basis="coordinates", side="left", share=0.1, eps=0.0)
    moved = take(own, param, drawn((8, 12), 1)).abs()
    assert int((moved > 5e-3).all(1).sum()) == 2
    assert int((moved > 5e-3).sum()) == 24
    param = nn.Parameter(torch.zeros(8, 12))
    own = FRUGAL([param], 1e-2, 0.3, basis="entries", share=0.1, eps=0.0)
    moved = take(own, param, drawn((8, 12), 1)).abs()
    assert int((moved > 5e-3).sum()) == 28
    assert own.state[param]["m"].shape == (28,)


def test_the_counter_starts_again_with_each_choice_and_so_do_the_states():
    param = nn.Parameter(torch.zeros(6, 12))
    own = columns(param, refresh_every=5)
    ages, chosen = [], []
    for grad in drawn((6, 12), 12):
        take(own, param, [grad])
        ages.append(own.state[param]["age"])
        chosen.append(own.state[param]["index"].tolist())
        if ages[-1] == 1:
            index = own.state[param]["index"].long()
            torch.testing.assert_close(own.state[param]["m"], 0.1 * grad.index_select(1, index).mT)
    assert ages == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]
    assert len({tuple(one) for one in chosen}) == 3


def test_a_window_of_blocks_moves_down_the_list():
    params = [nn.Parameter(torch.randn(4, 6)) for _ in range(8)]
    own = FRUGAL(params, 1e-2, 0.25, refresh_every=3)
    windows = []
    for step in range(15):
        for param in params:
            param.grad = torch.randn(4, 6)
        own.step()
        held = [at for at, param in enumerate(params) if kept(own, param)]
        assert len(held) == 2
        if step % 3 == 0:
            windows.append(held)
    assert windows == [[6, 7], [4, 5], [2, 3], [0, 1], [6, 7]]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"order": "ascending"}, [[0, 1], [2, 3], [4, 5]]),
        ({"order": "mirror"}, [[0, 7], [1, 6], [2, 5]]),
        ({"order": "ascending", "together": 4}, [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]),
    ],
    ids=str,
)
def test_blocks_follow_their_order(options, wanted):
    params = [nn.Parameter(torch.randn(4, 6)) for _ in range(8)]
    own = FRUGAL(params, 1e-2, 0.25, basis={"name": "block", **options}, refresh_every=1)
    found = []
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(4, 6)
        own.step()
        found.append([at for at, param in enumerate(params) if kept(own, param)])
    assert found == wanted


def test_a_block_without_gradients_does_not_shift_the_others():
    params = [nn.Parameter(torch.randn(4, 6)) for _ in range(4)]
    own = FRUGAL(params, 1e-2, 0.25, basis={"name": "block", "order": "ascending"}, refresh_every=2)
    for step in range(6):
        for at, param in enumerate(params):
            param.grad = None if at == 0 and step < 3 else torch.randn(4, 6)
        own.step()
    assert [bool(own.state[param].get("active")) for param in params] == [False, False, True, False]


def test_the_states_are_as_large_as_the_formula():
    shape, rank = (10, 17), 0.3
    for basis, wanted in (("coordinates", 2 * 10 * 5 + 5), ("entries", 2 * 51 + 51)):
        param = nn.Parameter(torch.zeros(shape))
        own = FRUGAL([param], 1e-2, rank, basis=basis, side="right")
        take(own, param, drawn(shape, 1))
        assert elements(own, param) == wanted


@pytest.mark.parametrize("basis", ["svd", "dct", "coordinates", "entries"])
def test_with_sgd_on_both_sides_the_split_is_no_split(basis):
    grads = drawn((6, 9), 3, dtype=torch.float64)
    param = nn.Parameter(torch.zeros(6, 9, dtype=torch.float64))
    own = FRUGAL([param], 1e-2, 0.4, basis=basis, free="sgd", inner={"name": "sgdm", "momentum": 0.0})
    take(own, param, grads)
    torch.testing.assert_close(param.detach(), -1e-2 * sum(grads), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_has_no_sign(dtype):
    """A gradient that the basis holds whole leaves nothing, where the official code moves nearly all entries by lr."""
    left, right = drawn((6, 2), 1)[0], drawn((2, 9), 1, seed=1)[0]
    grad = (left @ right).to(dtype)
    both = []
    for free in ("sign", None):
        param = nn.Parameter(torch.zeros(6, 9, dtype=dtype))
        take(FRUGAL([param], 1e-2, 2, basis="svd", free=free), param, [grad])
        both.append(param.detach().float())
    assert (both[0] - both[1]).abs().max() < 1e-4


@pytest.mark.parametrize("basis", ["block", "coordinates", "random"])
def test_a_resumed_run_makes_the_next_choice_that_the_other_makes(basis):
    def fresh():
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(5, 8)) for _ in range(4)]
        return params, FRUGAL(params, 1e-2, 0.5, basis=basis, refresh_every=4, seed=3)

    def go(params, optimizer, steps):
        for step in steps:
            for at, param in enumerate(params):
                param.grad = drawn((5, 8), 1, seed=10 * step + at)[0]
            optimizer.step()

    params, own = fresh()
    go(params, own, range(6))
    saved, values = copy.deepcopy(own.state_dict()), [param.detach().clone() for param in params]
    go(params, own, range(6, 14))
    others, resumed = fresh()
    with torch.no_grad():
        for param, value in zip(others, values, strict=True):
            param.copy_(value)
    resumed.load_state_dict(saved)
    go(others, resumed, range(6, 14))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_what_cannot_be_is_refused():
    param = nn.Parameter(torch.zeros(4, 6))
    for options, said in (
        ({"rank": 3}, "must be the share of matrices"),
        ({"free": "adam"}, "free='adam' must be sign, sgd or None"),
        ({"stagger": True}, "a block changes for the whole group"),
        ({"basis": {"name": "block", "order": "up"}}, "block: order='up'"),
        ({"basis": {"name": "block", "together": 0}}, "block: together=0"),
        ({"share": -1}, "sign: share=-1.0"),
    ):
        with pytest.raises(ConfigError, match=said):
            FRUGAL([param], 1e-2, **options)
