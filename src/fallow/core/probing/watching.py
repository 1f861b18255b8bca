"""A bar for whoever watches the passes."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Watching:
    """Says how many bytes are kept, then shows the batches of each pass; `total` of them, where that is known."""

    def __init__(self, told: str, total: int | None, passes: int, console: Console | None = None) -> None:
        self.told, self.total, self.passes = told, total, passes
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        )
        self.task: Any = None
        self.turn = -1

    def __enter__(self) -> Watching:
        self.bar.console.print(f"probe: {self.told}", markup=False, highlight=False)
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def step(self, turn: int, done: int) -> None:
        """A batch of a pass is done."""
        if turn != self.turn:
            self.turn = turn
            name = "probing" if self.passes == 1 else f"probing, pass {turn + 1} of at most {self.passes}"
            self.task = self.bar.add_task(name, total=self.total)
        self.bar.update(self.task, completed=done)
