"""Continual learning: one network, one task after another, without the data of those before.

    continual(ContinualConfig(data="turned-digits", methods=["codyra", "lora:16"]), console)

For each method: try each learning rate with the first seed, choose by held-out pictures, then judge by the test
pictures with all seeds. After each task the adapter is merged (`fallow.TaskSequence`) and the network judged on every
task, those to come as well, and on what it knew before.

    config.toml  run.json  metrics.jsonl  results.json  report.html
    runs/         what each run found; those that are there are not made again
    tasks/        <method>/seed-<n>/<task>.safetensors: what each task has changed

As in CoDyRA's runner: AdamW without weight decay, betas (0.9, 0.9999), a cosine to zero in each task.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.console import Console
from torch import Tensor, nn

from fallow.core import schedule
from fallow.core.accompany import condition
from fallow.core.errors import ConfigError, TrainingError
from fallow.recipes.classifiers import (
    SMALL,
    Classifier,
    endless,
    fitting_ranks,
    make_classifier,
    own_side,
    teach,
    to_training,
)
from fallow.recipes.contest import Contest
from fallow.recipes.contestants import Contestant, contestants, once, spread
from fallow.recipes.continual_clip import TEMPLATE, TextClassifier
from fallow.recipes.continual_data import TaskList, task_list
from fallow.recipes.continual_metrics import FIGURES, figures
from fallow.recipes.continual_tasks import TaskSequence
from fallow.recipes.labelled import Group
from fallow.report.continual import write_continual_page

BETAS = (0.9, 0.9999)
GATED = ("codyra", "sora")
Part = Literal["held_out", "test"]


class ContinualConfig(BaseModel):
    """What is learned in which order, by which methods; each field is a flag of `fallow continual`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    data: str = Field("turned-digits", description="turned-digits, garments-digits, styles, or a folder of tasks.")
    model: str | None = Field(
        None,
        description="mlp, vit, garment-net, or a folder or hub id of transformers: an image classifier or a CLIP; "
        "garment-net for styles and mlp otherwise, if not given.",
    )
    methods: list[str] = Field(
        ["codyra", "lora:1", "lora:16"], min_length=1, description="Methods, each NAME or NAME:RANK; full is one too."
    )
    options: dict[str, dict[str, Any]] = Field(default_factory=dict, description="Arguments of single methods.")
    targets: list[str] = Field(
        default_factory=list,
        description="Layers to adapt: all-linear, all-layers, or names. If not given: attention and MLP of a CLIP, all "
        "layers of garment-net, else all-linear.",
    )
    lrs: list[float] = Field([3e-3, 1e-2, 3e-2], min_length=1, description="Learning rates that each method tries.")
    gate_factors: dict[str, float] = Field(
        default_factory=dict,
        description="Times the learning rate for the gates, by method: codyra=10. 10 to 100 lets the data decide.",
    )
    select_by: Literal["average", "last", "new"] = Field("average", description="The figure that chooses the rate.")
    steps: int = Field(300, ge=1, description="Training steps of each task.")
    batch_size: int = Field(64, ge=1, description="Pictures in a batch.")
    shots: int | None = Field(None, ge=1, description="Pictures of each class to learn from; all when not given.")
    order: list[str] = Field(default_factory=list, description="The tasks that are wanted, in this order.")
    source: str | None = Field(None, description="Of a folder: the one that mlp or vit is taught before the tasks.")
    base_steps: int = Field(1000, ge=1, description="Steps in which mlp and vit are taught what they know before.")
    template: str = Field(TEMPLATE, description="Of a CLIP: the text of a class.")
    text: bool = Field(True, description="Of a CLIP: adapt the text encoder too.")
    resolution: int | None = Field(
        None, ge=8, description="Side of the pictures of a folder, in pixels; the network's own if not given, or 32."
    )
    garments: Path = Field(
        Path("/usr/share/datasets/fashion-mnist"), description="Folder of Fashion-MNIST, for garments-digits."
    )
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="Seeds of all chance; the first chooses the rates.")
    output: Path | None = Field(None, description="Folder of the run; runs/continual-<data>-<n> when not given.")
    device: str | None = Field(None, description="cpu, cuda, ...; the best there is when not given.")

    @model_validator(mode="after")
    def check_together(self) -> ContinualConfig:
        """Methods that exist, rates that are rates, and no seed twice."""
        contestants(self.methods, self.options, ("full",))
        if not all(lr > 0 for lr in self.lrs):
            raise ConfigError(f"lrs={self.lrs} must all be above 0")
        labels = {one.label.replace("-", "_"): one for one in contestants(self.methods, self.options, ("full",))}
        self.gate_factors = {name.replace("-", "_"): factor for name, factor in self.gate_factors.items()}
        for name, factor in self.gate_factors.items():
            if name not in labels or labels[name].method not in GATED or not factor > 0:
                raise ConfigError(
                    f"gate_factors: {name}={factor} must be above 0 and for one of methods={self.methods} with gates"
                )
        for name, values in (("seeds", self.seeds), ("lrs", self.lrs), ("order", self.order)):
            if len(set(values)) < len(values):
                raise ConfigError(f"{name}={values} holds one of them twice; give each once")
        if self.source in self.order:
            raise ConfigError(f"source={self.source} is among order={self.order}; it is learned before the tasks")
        return self

    @property
    def network(self) -> str:
        return self.model or ("garment-net" if self.data == "styles" else "mlp")


def continual(config: ContinualConfig, console: Console | None = None, command: str = "") -> Path:
    """Carry it out; returns the run's folder. ConfigError, DataError, ModelError before anything is written."""
    return _Job(config, console).carried_out(command)


class _Job(Contest[ContinualConfig, TaskList]):
    name = "continual"
    allowed = ("full",)

    def _prepare(self, seed: int) -> tuple[Classifier, TaskList]:
        """The network as it is before the first task, and the tasks."""
        config = self.config
        side = config.resolution or own_side(config.network)
        listed = task_list(config.data, seed, config.garments, side, config.order, config.source)
        torch.manual_seed(seed)
        if _is_clip(config.network):
            classifier: Classifier = TextClassifier(config.network, listed.classes, config.template, config.text)
        else:
            classifier = make_classifier(config.network, listed.classes, listed.side, listed.channels)
        classifier.to(self.device)
        if config.network in SMALL:
            if listed.known is None:
                raise ConfigError(
                    f"model={config.network} has to be taught something first, and {config.data} has nothing for that; "
                    "give source=FOLDER, one beside the tasks, or another model"
                )
            teach(classifier, listed.known.train, config.base_steps, seed=seed)
        classifier.network.eval()
        return classifier, listed

    def check(self) -> None:
        """ConfigError, ModelError for what the first task would be refused for."""
        for contestant in self.contestants():
            classifier, listed = self._fresh(self.config.seeds[0])
            if not contestant.plain:
                self._sequence(contestant, classifier, None).start_task(listed.tasks[0].name)

    def described(self, classifier: Classifier, data: TaskList) -> dict[str, Any]:
        return {"tasks": [task.name for task in data.tasks], "classes": data.classes}

    # -- a method -----------------------------------------------------------------------------------------------------

    def judge(self, contestant: Contestant) -> None:
        """Choose its rate, make its runs, and put what came of it on disk."""
        config = self.config

        def value(lr: float) -> float | None:
            found = self._once(contestant, lr, config.seeds[0], "held_out")
            return None if found["failed"] else found[config.select_by]

        lr, told = self.chosen_rate(value)
        runs = [self._once(contestant, lr, seed, "test") for seed in config.seeds]
        done = [run for run in runs if not run["failed"]]
        names = [*FIGURES, "known_before", "known", "mean_rank", "chance", "kept_numbers"]
        told |= {
            "figures": {name: spread([run[name] for run in done]) for name in names},
            "trained_numbers": done[0]["trained_numbers"] if done else None,
            "seconds": sum(run["seconds"] for run in done),
            "runs": runs,
        }
        self.judged(contestant, told, ("last", "average", "transfer", "known"))

    def _once(self, contestant: Contestant, lr: float, seed: int, part: Part) -> dict[str, Any]:
        left_out = {"methods", "options", "lrs", "seeds", "output", "select_by", "gate_factors"}
        settings = self.config.model_dump(mode="json", exclude=left_out)
        settings |= {
            "method": contestant.method,
            "contestant": contestant.options,
            "lr": lr,
            "seed": seed,
            "part": part,
        }
        settings |= {"gate_factor": self._gate_factor(contestant)}
        name = f"{contestant.label}-lr{lr:g}-seed{seed}-{part.replace('_', '-')}"
        make = partial(self._run, contestant, lr, seed, part)
        return once(self.folder / "runs", name, settings, make)

    def _gate_factor(self, contestant: Contestant) -> float | None:
        return self.config.gate_factors.get(contestant.label.replace("-", "_"))

    def _run(self, contestant: Contestant, lr: float, seed: int, part: Part) -> dict[str, Any]:
        """One pass over all tasks."""
        began = time.process_time()
        torch.manual_seed(seed)
        classifier, listed = self._fresh(seed)
        place = None
        if part == "test" and not contestant.plain:
            place = self.folder / "tasks" / contestant.label.replace(":", "-") / f"seed-{seed}"
            shutil.rmtree(place, ignore_errors=True)  # of a run that was stopped
        tasks = None if contestant.plain else self._sequence(contestant, classifier, place)
        matrix = [self._row(classifier, listed, part)]
        known = [None if listed.known is None else classifier.accuracy(getattr(listed.known, part))]
        ranks: list[dict[str, int]] = []
        found: dict[str, Any] = {"failed": "", "trained_numbers": 0, "kept_numbers": None, "chance": None}
        chances: list[float] = []
        seen: list[int] = []
        try:
            for number, task in enumerate(listed.tasks):
                self._learn(classifier, tasks, task, seen, contestant, lr, seed * 1000 + number, found)
                seen = sorted({*seen, *task.classes})
                if tasks is not None:
                    done = tasks.end_task()
                    ranks.append(done.ranks)
                    found["kept_numbers"] = (found["kept_numbers"] or 0) + done.numbers
                    chances += [] if done.chance is None else [done.chance]
                if isinstance(classifier, TextClassifier):
                    classifier.remember_texts()
                matrix.append(self._row(classifier, listed, part))
                known.append(None if listed.known is None else classifier.accuracy(getattr(listed.known, part)))
        except TrainingError as error:
            return {**found, "failed": str(error), "seconds": time.process_time() - began}
        return {
            **found, **figures(matrix), "matrix": matrix, "known_each": known, "known_before": known[0],
            "known": known[-1], "ranks": ranks, "mean_rank": _mean([rank for one in ranks for rank in one.values()]),
            "chance": _mean(chances), "lr": lr, "seed": seed, "seconds": time.process_time() - began,
        }  # fmt: skip

    def _sequence(self, contestant: Contestant, classifier: Classifier, folder: Path | None) -> TaskSequence:
        given = self.config.targets or ["all-layers" if self.config.network == "garment-net" else "all-linear"]
        targets: Any = given[0] if given[0] in ("all-linear", "all-layers") else given
        if not self.config.targets and isinstance(classifier, TextClassifier):
            targets = classifier.targets
        fresh = classifier.fresh_head
        rank = contestant.rank
        times = int(contestant.options.get("group", 4)) if contestant.method == "pego" else 1
        exclude = [classifier.head] if fresh else None
        small = (
            {} if rank is None else fitting_ranks(classifier.network, contestant.method, targets, exclude, rank, times)
        )
        return TaskSequence(
            classifier.network, contestant.method, targets, exclude=exclude, patterns=small,
            whole=classifier.head_parameters if fresh else (), folder=folder, **contestant.options,
        )  # fmt: skip

    def _row(self, classifier: Classifier, listed: TaskList, part: Part) -> list[float]:
        return [classifier.accuracy(getattr(task, part)) for task in listed.tasks]

    def _learn(
        self, classifier: Classifier, tasks: TaskSequence | None, task: Group, seen: list[int], contestant: Contestant,
        lr: float, seed: int, found: dict[str, Any],
    ) -> None:  # fmt: skip
        """The steps of one task. TrainingError where the loss is no number any more."""
        config, network = self.config, classifier.network
        if tasks is None:
            groups: list[dict[str, Any]] = [{"params": list(network.parameters()), "lr": lr}]
        else:
            tasks.start_task(task.name, config.steps)
            factor = self._gate_factor(contestant)
            groups = tasks.parameter_groups(lr, None if factor is None else lr * factor)
        found["trained_numbers"] = sum(p.numel() for group in groups for p in group["params"] if p.requires_grad)
        optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
        data = task.train if config.shots is None else task.train.few(config.shots, seed)
        follows_rate = tasks is not None and tasks.follows_rate
        batches = endless(data, config.batch_size, seed)
        to_training(network)
        for step in range(config.steps):
            pixels, labels = data.batch(next(batches))
            optimizer.zero_grad()
            loss = _loss(classifier, pixels, labels, task.classes, seen)
            loss.backward()
            optimizer.step()
            if tasks is not None:
                _tell(network, 0.5 * (1 + math.cos(math.pi * step / config.steps)) if follows_rate else None)
            cosine.step()
            if step % 50 == 0 or step + 1 == config.steps:
                self._log(contestant.label, lr, seed, task.name, step + 1, loss)
        network.eval()

    def _log(self, label: str, lr: float, seed: int, task: str, step: int, loss: Tensor) -> None:
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(f"the loss of {label} at lr {lr:g} is {value} in step {step} of '{task}'")
        line = {"method": label, "lr": lr, "seed": seed // 1000, "task": task, "step": step, "loss": value}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def page(self) -> None:
        write_continual_page(self.folder)


def _loss(classifier: Classifier, pixels: Tensor, labels: Tensor, classes: list[int], seen: list[int]) -> Tensor:
    if isinstance(classifier, TextClassifier):
        return classifier.loss(pixels, labels, classes, seen)
    return classifier.loss(pixels, labels, classes)


def _tell(network: nn.Module, lr_share: float | None) -> None:
    """One step was made: thresholds move, with the share of the highest learning rate where they follow it."""
    if lr_share is None:
        schedule.step(network)
        return
    with condition(network, lr_share=lr_share):
        schedule.step(network)


def _is_clip(model: str) -> bool:
    """Whether a model of transformers has texts for its classes."""
    if model in (*SMALL, "garment-net"):
        return False
    from transformers import AutoConfig

    try:
        return bool(AutoConfig.from_pretrained(model).model_type == "clip")
    except (OSError, ValueError):
        return False  # said by whoever loads it


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
