"""A job in which methods are set against each other: its folder, the choice of each one's learning rate, its results.

config.toml  run.json  metrics.jsonl  results.json  report.html
runs/         what each run found; those that are there are not made again
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from rich.console import Console

from fallow.core.files import write_json
from fallow.recipes import run_directory
from fallow.recipes.classifiers import Classifier
from fallow.recipes.contestants import PLAIN, Contestant, contestants, take_folder
from fallow.recipes.pipelines import chosen_device

Config = TypeVar("Config", bound=Any)
Data = TypeVar("Data")


class Contest(Generic[Config, Data]):
    """Write `_prepare`, `check`, `described`, `judge`, `page`. `name`: of new folders; `allowed`: plain methods."""

    name: ClassVar[str]
    allowed: ClassVar[Sequence[str]] = PLAIN

    def __init__(self, config: Config, console: Console | None) -> None:
        self.config, self.console = config, console or Console(quiet=True)
        self.device = chosen_device(config.device)
        self.folder = Path()
        self.info: dict[str, Any] = {}
        self.results: list[dict[str, Any]] = []
        self.prepared: Callable[[int], tuple[Classifier, Data]] = cache(self._prepare)

    def _prepare(self, seed: int) -> tuple[Classifier, Data]:
        """The network as everyone begins with it, and the data."""
        raise TypeError(f"{type(self).__name__} does not write _prepare(seed)")

    def check(self) -> None:
        """ConfigError, ModelError for what the first run would be refused for."""
        raise TypeError(f"{type(self).__name__} does not write check()")

    def described(self, classifier: Classifier, data: Data) -> Mapping[str, Any]:
        """What the results tell of the data."""
        raise TypeError(f"{type(self).__name__} does not write described(classifier, data)")

    def judge(self, contestant: Contestant) -> None:
        """Choose its rate, make its runs, and put what came of it on disk."""
        raise TypeError(f"{type(self).__name__} does not write judge(contestant)")

    def page(self) -> None:
        """Write the report of the folder."""
        raise TypeError(f"{type(self).__name__} does not write page()")

    def _fresh(self, seed: int) -> tuple[Classifier, Data]:
        classifier, data = self.prepared(seed)
        return copy.deepcopy(classifier), data

    def contestants(self) -> list[Contestant]:
        return contestants(self.config.methods, self.config.options, self.allowed)

    def carried_out(self, command: str) -> Path:
        """The folder, when all is done. ConfigError, DataError, ModelError before anything is written."""
        self.prepared(self.config.seeds[0])  # data and model are there, before a folder is made
        self.check()
        folder = self.config.output or run_directory.new_folder(self.name, self.config.data)
        run_directory.make(folder)
        with run_directory.alone(folder):
            take_folder(folder, self.config)
            self._begin(folder, command)
            for contestant in self.contestants():
                self.judge(contestant)
            run_directory.write_info(self.folder, self.info, status="finished")
            self._write("finished")
            self.page()
        return folder

    def _begin(self, folder: Path, command: str) -> None:
        self.folder = folder
        classifier, data = self.prepared(self.config.seeds[0])
        run_directory.write_info(
            folder, self.info, status="running", command=command, begun=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            data=self.config.data, model=self.config.network, **self.described(classifier, data),
            total_parameters=sum(param.numel() for param in classifier.network.parameters()),
            trained_where=run_directory.hardware(self.device), versions=run_directory.versions(),
        )  # fmt: skip

    def chosen_rate(self, value: Callable[[float], float | None]) -> tuple[float, dict[str, Any]]:
        """The rate of the largest `value(rate)`, None where a run failed, and what the results tell of the choice."""
        rates = self.config.lrs
        sweep = {rate: value(rate) for rate in rates} if len(rates) > 1 else {}
        found = {rate: -1.0 if score is None else score for rate, score in sweep.items()}
        best = max(rates, key=lambda rate: found.get(rate, 0.0))
        at_edge = len(rates) > 1 and best in (min(rates), max(rates))
        told = [{"lr": rate, "value": score} for rate, score in sweep.items()]
        return best, {"lr": best, "at_edge": at_edge, "sweep": told}

    def judged(self, contestant: Contestant, told: Mapping[str, Any], shown: Sequence[str]) -> None:
        """Keep what came of a method, and say some of its figures."""
        own = {"label": contestant.label, "method": contestant.method, "options": contestant.options}
        self.results.append({**own, **told})
        self._write("running")
        figures = ", ".join(f"{name} {percent(told['figures'][name]['mean'])}" for name in shown)
        self.console.print(f"{contestant.label} at lr {told['lr']:g}: {figures}", highlight=False, markup=False)

    def _write(self, status: str) -> None:
        config = self.config.model_dump(mode="json", exclude={"output"})
        write_json(
            self.folder / "results.json", {**self.info, "status": status, "config": config, "methods": self.results}
        )


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
