"""The experiment behind SaRA: zero the small, put them back; watch who stays small."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fallow.analysis.small_weights import SmallShare, eligible, threshold_of, without_small, zero_small
from fallow.core.errors import SelectionError


def make(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 20), nn.Linear(20, 4)).to(dtype)


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone().view(torch.int16 if p.element_size() == 2 else torch.int32) for p in model.parameters()]


def all_entries(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_entry_below_the_threshold_is_zero_inside_and_all_bits_are_back_afterwards(dtype):
    model = make(dtype)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = -0.0  # a sign that a plain addition would lose
    before, entries = bits(model), all_entries(model)
    with without_small(eligible(model), 0.01) as zeroed:
        inside = all_entries(model)
        assert zeroed == int((entries.abs() < 0.01).sum()) > 20
        assert torch.equal(inside, torch.where(entries.abs() < 0.01, torch.zeros(()), entries))
    assert all(torch.equal(a, b) for a, b in zip(before, bits(model), strict=True))


def test_weights_are_back_also_when_the_judge_raises_and_in_channels_last_memory():
    model = make().to(memory_format=torch.channels_last)
    before = bits(model)

    def judge(judged):
        if (all_entries(judged) == 0).sum() > 100:
            raise RuntimeError("the judge fell ill")
        return {"score": 1.0}

    with pytest.raises(RuntimeError, match="fell ill"):
        zero_small(model, judge, shares=[0.001, 0.5])
    assert all(torch.equal(a, b) for a, b in zip(before, bits(model), strict=True))


def test_shares_become_thresholds_that_zero_exactly_that_share():
    model = make()
    shares = [0.01, 0.1, 0.5, 0.9]
    entries = all_entries(model).abs()
    for share, threshold in zip(shares, threshold_of(eligible(model), shares), strict=True):
        assert int((entries < threshold).sum()) == round(share * entries.numel())
        assert threshold == entries.sort().values[round(share * entries.numel())].item()


def test_rows_hold_the_judged_figures_in_order_of_the_threshold_with_the_model_as_it_is_first():
    model = make()
    rows = zero_small(model, lambda m: {"norm": all_entries(m).norm().item()}, thresholds=[0.05, 0.01], shares=[0.2])
    assert [row["threshold"] for row in rows] == sorted(row["threshold"] for row in rows)
    assert rows[0]["zeroed"] == 0
    assert rows[0]["norm"] == all_entries(model).norm().item()
    norms = [row["norm"] for row in rows]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < norms[0]
    by_hand = all_entries(model)
    by_hand[by_hand.abs() < 0.05] = 0
    assert rows[-1]["norm"] == pytest.approx(by_hand.norm().item())
    assert rows[-1]["share"] == pytest.approx((by_hand == 0).float().mean().item())


def test_a_share_that_is_zero_already_is_refused_rather_than_passed_over():
    model = make()
    with torch.no_grad():
        model[2].weight.zero_()
    with pytest.raises(SelectionError, match=r"share 0\.1 of the entries is exactly zero already"):
        zero_small(model, dict, shares=[0.1])


def test_tied_weights_count_once_and_names_can_be_left_out():
    model = make()
    model.append(nn.Linear(20, 4))
    model[4].weight = model[3].weight
    assert len(eligible(model)) == 7
    assert set(eligible(model, include=r"\.weight$", exclude=r"^0\.")) == {"2.weight", "3.weight"}


def test_watched_entries_are_counted_as_by_hand():
    model = make()
    watch = SmallShare(model, share=0.1)
    start = all_entries(model).abs() < watch.threshold
    total = start.numel()
    assert watch.records[0]["still_small"] == round(0.1 * total) / total
    assert watch.records[0]["became_small"] == 0.0
    assert watch.records[0]["left"] == 0.0
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    record = watch.observe(10)
    now = all_entries(model).abs() < watch.threshold
    assert record["still_small"] == pytest.approx((now & start).sum().item() / total)
    assert record["became_small"] == pytest.approx((now & ~start).sum().item() / total)
    assert record["left"] == pytest.approx(1 - (now & start).sum().item() / start.sum().item())
    assert 0 < record["still_small"] < 0.1
    assert record["became_small"] > 0


def test_small_entries_leave_and_others_arrive_when_everything_is_trained():
    """The paper's section 3 in miniature: what is small at the start is small by chance."""
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    y = (x @ torch.randn(16, 32)).tanh() @ torch.randn(32, 4)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    watch = SmallShare(model, share=0.05)
    for step in range(1, 301):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        if step % 100 == 0:
            watch.observe(step)
    still = [record["still_small"] for record in watch.records]
    assert still[0] == pytest.approx(0.05, abs=1e-3)
    assert still[-1] < 0.01
    assert watch.records[-1]["left"] > 0.8
    assert watch.records[-1]["became_small"] > 2 * still[-1]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: zero_small(m, dict), "nothing to zero"),
        (lambda m: zero_small(m, dict, thresholds=[0.0]), "threshold=0.0 zeroes nothing"),
        (lambda m: zero_small(m, dict, shares=[1.5]), "share 1.5"),
        (lambda m: zero_small(m, dict, shares=[0.1], include="nowhere"), "leave no floating-point parameter"),
        (lambda m: zero_small(m, dict, shares=[0.1], exclude="(("), r"exclude='\(\(' is no regular expression"),
        (lambda m: SmallShare(m), "one of them"),
        (lambda m: SmallShare(m, threshold=1e-30), "marks nothing"),
        (lambda m: SmallShare(m, threshold=1e3), "marks every entry"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_judged(call, says):
    with pytest.raises(SelectionError, match=says):
        call(make())
