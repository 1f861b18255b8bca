"""What a sequence of tasks is judged by: the matrix of accuracies, and the figures that are read from it.

`matrix[i][j]`: the test accuracy on task j after i tasks, so that row 0 is the model as it was. With N tasks, counted
from 1 in the formulas:

    last        mean_j R[N, j]                            after the last task (X-TAIL, MTIL)
    average     mean_(i >= 1, j) R[i, j]                  over all steps
    transfer    mean_(j >= 2) mean_(1 <= i < j) R[i, j]   on tasks not yet learned: what is kept of zero-shot ability
    new         mean_j R[j, j]                            on each task right after it
    forgetting  mean_(j < N) max_(j <= i < N) R[i, j] - R[N, j]        (arXiv 1801.10112)
    backward    mean_(j < N) R[N, j] - R[j, j]            negative where it forgets (arXiv 1706.08840)
    forward     mean_(j >= 2) R[j - 1, j] - R[0, j]       what earlier tasks did for the next one (likewise)
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from fallow.core.errors import DataError

FIGURES = ("last", "average", "transfer", "new", "forgetting", "backward", "forward")


def figures(matrix: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """All of them; None for those that a single task does not have. DataError unless it has a row more than columns."""
    tasks = len(matrix) - 1
    if tasks < 1 or any(len(row) != tasks for row in matrix):
        raise DataError(f"{len(matrix)} rows need {tasks} columns: a row is the start, one is for each task")
    later, earlier = range(1, tasks), range(tasks - 1)  # places of all tasks but the first, but the last
    end = matrix[tasks]
    found: dict[str, float | None] = {
        "last": fmean(end),
        "average": fmean(value for row in matrix[1:] for value in row),
        "new": fmean(matrix[j + 1][j] for j in range(tasks)),
    }
    several: dict[str, float | None] = dict.fromkeys(("transfer", "forgetting", "backward", "forward"))
    if tasks > 1:
        several = {
            "transfer": fmean(fmean(matrix[i][j] for i in range(1, j + 1)) for j in later),
            "forgetting": fmean(max(matrix[i][j] for i in range(j + 1, tasks)) - end[j] for j in earlier),
            "backward": fmean(end[j] - matrix[j + 1][j] for j in earlier),
            "forward": fmean(matrix[j][j] - matrix[0][j] for j in later),
        }
    return {name: {**found, **several}[name] for name in FIGURES}
