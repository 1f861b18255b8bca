"""The figures of a matrix of accuracies, against sums written out by hand."""

from __future__ import annotations

import pytest

from fallow.core.errors import DataError
from fallow.recipes.continual_metrics import figures

MATRIX = [
    [0.1, 0.2, 0.3],  # before any task
    [0.9, 0.3, 0.2],
    [0.7, 0.8, 0.4],
    [0.6, 0.7, 0.95],
]


def test_each_figure_is_that_of_its_formula():
    found = figures(MATRIX)
    assert found["last"] == pytest.approx((0.6 + 0.7 + 0.95) / 3)
    assert found["average"] == pytest.approx((0.9 + 0.3 + 0.2 + 0.7 + 0.8 + 0.4 + 0.6 + 0.7 + 0.95) / 9)
    assert found["transfer"] == pytest.approx((0.3 + (0.2 + 0.4) / 2) / 2)
    assert found["new"] == pytest.approx((0.9 + 0.8 + 0.95) / 3)
    assert found["forgetting"] == pytest.approx(((0.9 - 0.6) + (0.8 - 0.7)) / 2)
    assert found["backward"] == pytest.approx(((0.6 - 0.9) + (0.7 - 0.8)) / 2)
    assert found["forward"] == pytest.approx(((0.3 - 0.2) + (0.4 - 0.3)) / 2)


def test_forgetting_counts_from_the_best_that_was_known_after_the_task_was_learned():
    grown = [[0.99, 0.0, 0.0], [0.5, 0.0, 0.0], [0.8, 0.9, 0.0], [0.6, 0.9, 0.9]]
    assert figures(grown)["forgetting"] == pytest.approx((0.8 - 0.6 + 0.0) / 2)
    assert figures(grown)["backward"] == pytest.approx((0.1 + 0.0) / 2)


def test_a_single_task_has_no_figures_of_several():
    found = figures([[0.1], [0.8]])
    assert (found["last"], found["average"], found["new"]) == (0.8, 0.8, 0.8)
    assert all(found[name] is None for name in ("transfer", "forgetting", "backward", "forward"))


def test_a_matrix_of_another_shape_is_refused():
    with pytest.raises(DataError, match=r"2 rows need 1 columns"):
        figures([[0.1, 0.2], [0.3, 0.4]])
