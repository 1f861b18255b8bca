from __future__ import annotations

import pytest
from torch import nn

from fallow.core import schedule
from fallow.core.errors import ConfigError
from fallow.core.schedule import Schedule


def test_actions_run_right_after_their_steps_once_each():
    ran: list[int] = []
    plan = Schedule([3, 5, 3], ran.append)
    assert [plan.advance() for _ in range(7)] == [False, False, True, False, True, False, False]
    assert ran == [3, 5]


def test_shares_of_the_run_become_steps_when_its_length_is_known():
    ran: list[int] = []
    plan = Schedule([0.5, 0.9, 2], ran.append, total=20)
    assert plan.due == [2, 10, 18]
    late = Schedule(0.25, ran.append)
    late.resolve(8)
    assert late.due == [2]


def test_a_share_without_the_length_of_the_run_is_refused_before_anything_happens():
    plan = Schedule(0.5, lambda step: None, name="reselect_at")
    with pytest.raises(ConfigError, match=r"reselect_at=0.5 is a share of the run; give total_steps="):
        plan.check()
    with pytest.raises(ConfigError):
        plan.advance()
    assert plan.steps == 0


@pytest.mark.parametrize("bad", [0, -1, 1.0, 1.5, 0.0, float("nan"), True, "half"])
def test_moments_that_are_neither_steps_nor_shares_are_refused(bad):
    with pytest.raises(ConfigError, match="must be a step"):
        Schedule([bad], lambda step: None)


@pytest.mark.parametrize("bad", [0, -3, 2.5, True])
def test_the_length_of_a_run_is_a_whole_number(bad):
    with pytest.raises(ConfigError, match="total_steps"):
        Schedule([], lambda step: None, total=bad)


def test_a_bare_loop_advances_what_is_attached_to_a_model():
    import fallow

    model, ran = nn.Linear(2, 2), []
    schedule.attach(model, Schedule([2], ran.append))
    schedule.attach(model, Schedule([0.5], ran.append))
    schedule.resolve(model, 6)
    assert [fallow.step(model) for _ in range(4)] == [0, 1, 1, 0]
    assert ran == [2, 3]
    assert fallow.step(nn.Linear(2, 2)) == 0


def test_a_step_beyond_the_run_is_refused_since_it_would_never_come():
    with pytest.raises(ConfigError, match=r"reselect_at=\[2500\]: step 2500 is beyond the run of 100 steps"):
        Schedule(2500, total=100, name="reselect_at")
    late = Schedule([0.5, 30])
    with pytest.raises(ConfigError, match="step 30 is beyond the run of 20 steps; give a step up to 20"):
        late.resolve(20)
    late.resolve(30)
    assert late.due == [15, 30]
