"""Domain generalisation: learn from some domains, and be judged on those that were never seen.

    generalise(GeneraliseConfig(data="styles", methods=["pego", "lora:4", "full", "linear"]), console)

DomainBed's protocol, as PEGO uses it: each domain in turn is left out (or `sources` says what is learned from); in each
step one batch from every source; Adam at a constant rate without decay; a fresh classifier on the network's features;
the step of the best accuracy on held-out pictures of the sources counts, and by it the rate is chosen too. Pictures of
the domain that is left out decide nothing.

    config.toml  run.json  metrics.jsonl  results.json  report.html
    runs/         what each run found; those that are there are not made again
    adapters/     <method>/<left out>-seed-<n>/: the adapter, and the classifier
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.console import Console
from torch import Tensor, nn

from fallow.core import schedule
from fallow.core.accompany import penalty
from fallow.core.errors import ConfigError, TrainingError, nearest
from fallow.core.files import write_tensors
from fallow.core.host import merge, save
from fallow.core.host.targets import spots
from fallow.deltas import attach
from fallow.deltas.pego import PEGO
from fallow.recipes.classifiers import SMALL, Classifier, fitting_ranks, make_classifier, own_side, teach, to_training
from fallow.recipes.contest import Contest
from fallow.recipes.contestants import Contestant, contestants, once, spread
from fallow.recipes.generalise_average import Averaged, Stretch, Valley, put
from fallow.recipes.generalise_domains import BUILT_IN, DomainBatches, DomainSet, augmented, domain_set
from fallow.recipes.labelled import joined
from fallow.report.generalise import write_generalise_page

PROJECTIONS = ("q_proj", "v_proj", "query", "value")  # what PEGO adapts


class GeneraliseConfig(BaseModel):
    """What is learned from and judged by, by which methods; each field is a flag of `fallow generalise`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    data: str = Field("turned-digits", description="turned-digits, styles, or a folder of domains.")
    model: str | None = Field(
        None,
        description="mlp, vit, garment-net, or a folder or hub id of an image classifier of transformers; garment-net "
        "for styles and mlp for digits, if not given.",
    )
    methods: list[str] = Field(
        ["pego", "lora:4", "full", "linear"], min_length=1, description="Methods, each NAME or NAME:RANK."
    )
    options: dict[str, dict[str, Any]] = Field(default_factory=dict, description="Arguments of single methods.")
    targets: list[str] = Field(
        default_factory=list, description="Layers to adapt; query and value projections, or else all, if not given."
    )
    domains: list[str] = Field(default_factory=list, description="The domains that are wanted; all when not given.")
    sources: list[str] = Field(
        default_factory=list, description="Learn from these and judge by all others; each in turn is left out if none."
    )
    lrs: list[float] = Field(
        [3e-4, 1e-3, 3e-3, 1e-2], min_length=1, description="Learning rates that each method tries."
    )
    steps: int = Field(400, ge=1, description="Training steps.")
    batch_size: int = Field(32, ge=1, description="Pictures from each source in a batch.")
    check_every: int = Field(50, ge=1, description="Steps between two looks at the held-out pictures of the sources.")
    average: Literal["none", "ema", "swad"] = Field(
        "none", description="Of the merged weights: none keeps the best step, ema a moving average, swad the valley's."
    )
    ema_decay: float = Field(0.999, ge=0, lt=1, description="How slowly that average moves.")
    augment: bool | None = Field(None, description="Crop, mirror and recolour; on for folders when not given.")
    base_steps: int = Field(2500, ge=1, description="Steps in which mlp and vit are taught what they know before.")
    resolution: int | None = Field(
        None, ge=8, description="Side of the pictures of a folder, in pixels; the network's own if not given, or 32."
    )
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="Seeds of all chance; the first chooses the rates.")
    output: Path | None = Field(None, description="Folder of the job; runs/generalise-<data>-<n> when not given.")
    device: str | None = Field(None, description="cpu, cuda, ...; the best there is when not given.")

    @model_validator(mode="after")
    def check_together(self) -> GeneraliseConfig:
        """Methods that exist, rates that are rates, and nothing twice."""
        contestants(self.methods, self.options)
        if not all(lr > 0 for lr in self.lrs):
            raise ConfigError(f"lrs={self.lrs} must all be above 0")
        lists: dict[str, list[Any]] = {
            "seeds": self.seeds, "lrs": self.lrs, "domains": self.domains, "sources": self.sources
        }  # fmt: skip
        for name, values in lists.items():
            if len(set(values)) < len(values):
                raise ConfigError(f"{name}={values} holds one of them twice; give each once")
        return self

    @property
    def network(self) -> str:
        return self.model or ("garment-net" if self.data == "styles" else "mlp")

    @property
    def augments(self) -> bool:
        return self.data not in BUILT_IN if self.augment is None else self.augment


def generalise(config: GeneraliseConfig, console: Console | None = None, command: str = "") -> Path:
    """Carry it out; returns the folder. ConfigError, DataError, ModelError before anything is written."""
    return _Job(config, console).carried_out(command)


class _Job(Contest[GeneraliseConfig, DomainSet]):
    name = "generalise"

    def _prepare(self, seed: int) -> tuple[Classifier, DomainSet]:
        """The network as it is before it is adapted, and the domains."""
        config = self.config
        side = config.resolution or own_side(config.network)
        found = domain_set(config.data, seed, side, config.domains)
        for name in config.sources:
            if name not in found.names:
                raise ConfigError(f"sources names '{name}', which is no domain{nearest(name, found.names)}")
        if len(config.sources) == len(found.domains):
            raise ConfigError(f"sources={config.sources} are all domains; leave one out, to judge by it")
        torch.manual_seed(seed)
        if config.network in SMALL:
            if found.known is None:
                raise ConfigError(
                    f"model={config.network} has to be taught something first, and {config.data} has nothing for that; "
                    "give a pretrained model"
                )
            known = [str(number) for number in range(found.known_classes)]
            classifier = make_classifier(config.network, known, found.side, found.channels).to(self.device)
            teach(classifier, found.known, config.base_steps, seed=seed, change=found.change)
        else:
            classifier = make_classifier(config.network, found.classes, found.side, found.channels).to(self.device)
        classifier.network.eval()
        return classifier, found

    def check(self) -> None:
        """ConfigError, ModelError for what the first run would be refused for."""
        for contestant in self.contestants():
            classifier, found = self._fresh(self.config.seeds[0])
            self._adapt(contestant, classifier, found, self.config.seeds[0])
            if self.config.average != "none":
                Averaged(classifier.network)

    def described(self, classifier: Classifier, data: DomainSet) -> dict[str, Any]:
        return {"domains": data.names, "classes": data.classes, "left_out": self._unseen(data)}

    def _unseen(self, found: DomainSet) -> list[str]:
        """The domains that are judged by."""
        return [name for name in found.names if name not in self.config.sources]

    # -- a method -----------------------------------------------------------------------------------------------------

    def judge(self, contestant: Contestant) -> None:
        """Choose its rate by the sources' held-out pictures, make its runs, and put what came of it on disk."""
        config, first = self.config, self.config.seeds[0]
        _, found = self.prepared(first)
        unseen = self._unseen(found)
        splits = [unseen] if config.sources else [[name] for name in unseen]  # domains that are left out together

        def value(lr: float) -> float | None:
            tried = [self._once(contestant, lr, first, split) for split in splits]
            failed = any(run["failed"] for run in tried)
            return None if failed else statistics.fmean(run["held_out"] for run in tried)

        lr, told = self.chosen_rate(value)
        runs = [self._once(contestant, lr, seed, split) for seed in config.seeds for split in splits]
        by_seed = [[run for run in runs if run["seed"] == seed and not run["failed"]] for seed in config.seeds]
        whole = [some for some in by_seed if len(some) == len(splits)]
        figures: dict[str, list[float | None]] = {
            "unseen": [_mean([value for run in some for value in run["unseen"].values()]) for some in whole],
            "worst": [min(value for run in some for value in run["unseen"].values()) for some in whole],
            **{name: [_mean([run[name] for run in some]) for some in whole] for name in FIGURES},
        }
        domains = {name: [_of(some, name) for some in whole] for name in unseen}
        done = next((run for run in runs if not run["failed"]), None)
        told |= {
            "figures": {name: spread(values) for name, values in figures.items()},
            "domains": {name: spread(values) for name, values in domains.items()},
            "trained_numbers": None if done is None else done["trained_numbers"],
            "seconds": sum(run["seconds"] for run in runs),
            "runs": runs,
        }
        self.judged(contestant, told, ("unseen", "worst", "seen"))

    def _once(self, contestant: Contestant, lr: float, seed: int, split: list[str]) -> dict[str, Any]:
        left_out = {"methods", "options", "lrs", "seeds", "output"}
        settings = self.config.model_dump(mode="json", exclude=left_out)
        settings |= {"method": contestant.method, "contestant": contestant.options, "lr": lr, "seed": seed}
        settings |= {"split": split}
        name = f"{contestant.label}-lr{lr:g}-seed{seed}-without-{_short(split)}"
        return once(self.folder / "runs", name, settings, partial(self._run, contestant, lr, seed, split))

    def _run(self, contestant: Contestant, lr: float, seed: int, split: list[str]) -> dict[str, Any]:
        """One training, judged."""
        began = time.process_time()
        classifier, found = self._fresh(seed)
        before = {spot.key: spot.parameter().detach() for spot in spots(self.prepared(seed)[0].network)}
        self._adapt(contestant, classifier, found, seed)
        sources = [found[name].group for name in found.names if name not in split]
        told: dict[str, Any] = {"failed": "", "lr": lr, "seed": seed, "split": split}
        told["trained_numbers"] = sum(p.numel() for p in classifier.network.parameters() if p.requires_grad)
        training = _Training(self.config, classifier, sources, lr, seed, self._log(contestant.label, split))
        try:
            with training.best():
                unseen = {name: classifier.accuracy(found[name].unseen) for name in split}
                seen = classifier.accuracy(joined([source.test for source in sources]))
                held_out = classifier.accuracy(training.held_out)
                told |= {"unseen": unseen, "seen": seen, "held_out": held_out, "cosine": _cosine(classifier.network)}
                if not contestant.plain:
                    self._keep(classifier, contestant, split, seed, training.averaged)
                if not contestant.plain and training.averaged is None:
                    merge(classifier.network)
                told["overlap"] = _overlap(classifier, before)
        except TrainingError as error:
            told["failed"] = str(error)
        return {**told, "best_step": training.best_step, "seconds": time.process_time() - began}

    def _adapt(self, contestant: Contestant, classifier: Classifier, found: DomainSet, seed: int) -> None:
        """A fresh classifier, and whatever the method trains beside it."""
        network = classifier.network
        torch.manual_seed(seed + 1)
        if contestant.method != "full":
            network.requires_grad_(False)
        if not contestant.plain:
            targets, rank = self._targets(network), contestant.rank
            exclude = [classifier.head] if self._holds(network, targets, classifier.head) else None
            made: Any = contestant.options.get("group", 4) if contestant.method == "pego" else 1
            small = fitting_ranks(network, contestant.method, targets, exclude, rank, made) if rank else None
            attach(
                network, contestant.method, targets, exclude=exclude, patterns=small, seed=seed, **contestant.options
            )
        classifier.renew_head(len(found.classes))

    def _targets(self, network: nn.Module) -> Any:
        given = self.config.targets
        if given:
            return given[0] if given[0] in ("all-linear", "all-layers") else given
        names = {name.rpartition(".")[2] for name, _ in network.named_modules()}
        return [name for name in PROJECTIONS if name in names] or "all-layers"

    @staticmethod
    def _holds(network: nn.Module, targets: Any, head: str) -> bool:
        """Whether the classifier would be adapted, which is trained itself."""
        return isinstance(targets, str) or any(head == name or head.endswith(f".{name}") for name in targets)

    def _keep(
        self, classifier: Classifier, contestant: Contestant, split: list[str], seed: int, averaged: Averaged | None
    ) -> None:
        """What is judged, as files: the adapter, or the averaged weights, which are no adapter any more."""
        place = self.folder / "adapters" / contestant.label.replace(":", "-") / f"{_short(split)}-seed-{seed}"
        shutil.rmtree(place, ignore_errors=True)  # of a run that was stopped
        if averaged is None:
            save(classifier.network, place)
        else:
            changed = {id(param) for param, _, _ in averaged.adapted}
            weights = {name: p for name, p in classifier.network.named_parameters() if id(p) in changed}
            place.mkdir(parents=True)
            write_tensors(place / "weights.safetensors", weights)
        head = {name: p for name, p in classifier.network.named_parameters() if name in classifier.head_parameters}
        write_tensors(place / "classifier.safetensors", head)

    def _log(self, label: str, split: list[str]) -> Callable[[dict[str, Any]], None]:
        def write(line: dict[str, Any]) -> None:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"method": label, "left_out": split, **line}) + "\n")

        return write

    def page(self) -> None:
        write_generalise_page(self.folder)


FIGURES = ("seen", "held_out", "overlap", "cosine")


class _Training:
    """One run on the sources. Within `best()` the network is the one that is judged."""

    def __init__(
        self, config: GeneraliseConfig, classifier: Classifier, sources: Sequence[Any], lr: float, seed: int,
        log: Callable[[dict[str, Any]], None],
    ) -> None:  # fmt: skip
        self.config, self.classifier, self.log, self.lr, self.seed = config, classifier, log, lr, seed
        self.held_out = joined([source.held_out for source in sources])
        self.trained = [param for param in classifier.network.parameters() if param.requires_grad]
        change = augmented if config.augments else None
        self.batches = DomainBatches([source.train for source in sources], config.batch_size, seed + 2, change)
        average = config.average
        self.averaged = (
            None if average == "none" else Averaged(classifier.network, config.ema_decay if average == "ema" else None)
        )
        self.valley = Valley() if average == "swad" else None
        self.best_step, self.best_accuracy = 0, -1.0
        self.best_values: list[Tensor] = []

    def best(self) -> Any:
        """Train; the block then sees the best step's network, or the average."""
        self._train()
        if self.averaged is None:
            with torch.no_grad():
                for param, value in zip(self.trained, self.best_values, strict=True):
                    param.copy_(value)
            return torch.no_grad()
        if self.valley is not None:
            put(self.averaged, self.valley.finish())
        return self.averaged.shown()

    def _train(self) -> None:
        config, classifier, network = self.config, self.classifier, self.classifier.network
        optimizer = torch.optim.Adam(self.trained, self.lr)
        schedule.resolve(network, config.steps)
        to_training(network)
        for step in range(1, config.steps + 1):
            pixels, labels = next(self.batches)
            optimizer.zero_grad()
            loss = classifier.loss(pixels, labels)
            loss.backward()
            optimizer.step()  # adds the gradient of the method's own term
            schedule.step(network)
            if self.averaged is not None:
                self.averaged.update()
            if step % config.check_every == 0 or step == config.steps:
                self._look(step, float(loss.detach()))
        network.eval()

    def _look(self, step: int, loss: float) -> None:
        """How it does on the sources' held-out pictures."""
        if not math.isfinite(loss):
            raise TrainingError(f"the loss at lr {self.lr:g} is {loss} in step {step}")
        accuracy = self.classifier.accuracy(self.held_out)
        line = {"lr": self.lr, "seed": self.seed, "step": step, "loss": loss, "held_out": accuracy}
        with torch.no_grad():
            self.log({**line, "penalty": float(penalty(self.classifier.network))})
        if accuracy > self.best_accuracy:
            self.best_step, self.best_accuracy = step, accuracy
            if self.averaged is None:
                self.best_values = [param.detach().clone() for param in self.trained]
        if self.valley is not None and self.averaged is not None:
            with self.averaged.shown():
                held_loss = self._held_out_loss()
            self.valley.add(Stretch(self.averaged.take(), held_loss))

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        total = 0.0
        for index in torch.arange(len(self.held_out)).split(500):
            pixels, labels = self.held_out.batch(index)
            total += float(self.classifier.loss(pixels, labels)) * len(index)
        return total / len(self.held_out)


@torch.no_grad()
def _overlap(classifier: Classifier, before: dict[str, Tensor]) -> float | None:
    """The mean over the changed layers of ||W dWᵀ||_F / (||W|| ||dW||); of a classifier none, for it is another."""
    found = []
    for spot in spots(classifier.network):
        if spot.key == classifier.head or spot.sort not in ("linear", "conv"):
            continue
        w, now = (spot.view().read(t).float() for t in (before[spot.key], spot.parameter()))
        change = now - w
        if float(change.norm()) > 0:
            found.append(float((w @ change.T).norm() / w.norm() / change.norm()))
    return _mean(found)


@torch.no_grad()
def _cosine(network: nn.Module) -> float | None:
    """The mean size of the cosine between two modules of a group, through their factors."""
    found = []
    for delta in (module for module in network.modules() if isinstance(module, PEGO)):
        b, a = delta.factors()
        r = delta.o.rank
        parts = [(b[:, at : at + r], a[at : at + r]) for at in range(0, len(a), r)]
        norms = [float(_inner(part, part)) ** 0.5 for part in parts]
        found += [
            abs(float(_inner(parts[i], parts[j]))) / max(norms[i] * norms[j], 1e-30)
            for i, j in combinations(range(len(parts)), 2)
        ]
    return _mean(found)


def _inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """<B1 A1, B2 A2>"""
    return ((one[0].T @ other[0]) * (one[1] @ other[1].T)).sum()


def _of(runs: Sequence[dict[str, Any]], domain: str) -> float | None:
    return next((run["unseen"][domain] for run in runs if domain in run["unseen"]), None)


def _mean(values: Sequence[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return sum(told) / len(told) if told else None


def _short(split: Sequence[str]) -> str:
    return split[0] if len(split) == 1 else f"{split[0]}-and-{len(split) - 1}"
