"""Several methods on the same pictures, judged alike, each at the learning rate that suits it.

    compare(CompareConfig(methods=["sara", "lora", "full"], data="blueprint", seeds=[0, 1, 2]))

For each method: train at every rate of its sweep on the first seed, judge, choose the best by a stated criterion, then
train the chosen rate on the other seeds. A finished run is never repeated: it is found again by the settings that it
was made with, so a comparison that was stopped, or that is given more seeds, goes on where it stands. A run that fails
is reported and left out; the others go on.

A variant is a method under another name and with other options, such as an ablation of it:

    compare(CompareConfig(methods=["sara"], variants={"plain": "sara"}, options={"plain": {"rank_weight": 0.0}}))

With `ray` the runs are spread over a Ray cluster (`fallow.recipes.ray_cluster`), with the same result.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.console import Console

from fallow.analysis.images import vlhi
from fallow.core.errors import ConfigError, FallowError
from fallow.core.files import atomic_write
from fallow.recipes.equal_parameters import options_for
from fallow.recipes.evaluate import Evaluation, opened
from fallow.recipes.methods import METHODS, check_method
from fallow.recipes.settings import make_config
from fallow.recipes.text_to_image import train
from fallow.recipes.train_config import TrainConfig
from fallow.report.comparison import COLUMNS, write_comparison_page
from fallow.report.run import write_run_report

FIGURES = ("frechet", "kernel", "alignment", "recognised", "prior_frechet", "prior_alignment", "prior_recognised")
COSTS = ("trained_parameters", "total_parameters", "seconds", "seconds_per_step", "peak_memory_bytes", "adapter_bytes")


class CompareConfig(BaseModel):
    """What is compared with what, and how it is judged."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    methods: list[str] = Field(["sara", "lora", "full"], min_length=1, description="Methods to compare.")
    variants: dict[str, str] = Field(
        default_factory=dict, description="Further contestants: NAME=METHOD, with options and rates under that name."
    )
    model: str = Field("mini-sd", description="Base model: mini-sd, a folder, or a hub id.")
    data: str = Field("blueprint", description="Shipped style set, or a folder with train/ and test/ pictures.")
    prompt: str | None = Field(None, description="Caption of the pictures that have none of their own.")
    output: Path | None = Field(None, description="Folder of the comparison; runs/compare-<data> when not given.")
    seeds: list[int] = Field([0, 1], min_length=1, description="Seeds of the training; the first chooses the rates.")
    search_seeds: int = Field(1, ge=1, description="How many of the seeds choose the learning rate.")
    lrs: dict[str, list[float]] = Field(
        default_factory=dict, description="Learning rates to try, by method; others try three around their own."
    )
    select_by: Literal["anchored", "vlhi", "frechet"] = Field(
        "anchored", description="What makes a learning rate the best; the page of the comparison says it in words."
    )
    budget: int | None = Field(None, ge=1, description="Train about this many parameters with each method (not full).")
    options: dict[str, dict[str, Any]] = Field(default_factory=dict, description="Arguments of the methods, by method.")
    steps: int = Field(500, ge=1, description="Training steps of each run.")
    batch_size: int = Field(8, ge=1, description="Pictures in a training batch.")
    train: dict[str, Any] = Field(default_factory=dict, description="Further settings of fallow train, for all runs.")
    images: int = Field(200, ge=2, description="Pictures generated to judge a run.")
    prior_images: int = Field(96, ge=0, description="Pictures on the base model's own prompts; 0 leaves them out.")
    repeats: int = Field(1, ge=1, description="Sampling seeds for each run.")
    sample_steps: int = Field(25, ge=1, description="Denoising steps of each generated picture.")
    guidance: float = Field(3.0, description="Guidance of each generated picture.")
    vision: str | None = Field(None, description="Weights of a vision model for the Frechet distance.")
    clip: str | None = Field(None, description="A CLIP folder for the text alignment.")
    device: str | None = Field(None, description="cpu, cuda, ...; the best there is when not given.")
    ray: str | None = Field(
        None, description="Spread the runs over Ray: local (the cores of this machine), auto, or a cluster's address."
    )
    ray_cpus: float = Field(1.0, gt=0, description="Cores that Ray reserves for each run.")

    @model_validator(mode="after")
    def check_together(self) -> CompareConfig:
        """Every contestant exists, once; rates and options belong to one. Variants join `methods`."""
        for name, method in self.variants.items():
            if name in METHODS:
                raise ConfigError(f"variants names one '{name}', which is a method; give it another name")
            check_method(method, f"variants: the method '{method}' of {name}")
        self.methods = [*self.methods, *(name for name in self.variants if name not in self.methods)]
        for what, values in (("methods", self.methods), ("seeds", self.seeds)):
            if len({*values}) < len(values):
                raise ConfigError(f"{what}={values} names one of them twice; name each once")
        # A flag `--lrs lt-sft=1e-3` arrives as lt_sft, as all keys of flags do.
        self.lrs, self.options = self._keyed(self.lrs), self._keyed(self.options)
        if strange := sorted({*self.lrs, *self.options} - {*self.methods}):
            raise ConfigError(f"lrs or options are given for {', '.join(strange)}, not among methods={self.methods}")
        return self

    def _keyed(self, values: dict[str, Any]) -> dict[str, Any]:
        spelled = {name.replace("-", "_"): name for name in self.methods}
        return {spelled.get(name, name): value for name, value in values.items()}

    def method_of(self, name: str) -> str:
        """The method behind a contestant. ConfigError where there is none."""
        method = self.variants.get(name, name)
        check_method(method, f"methods={self.methods}: '{method}'")
        return method

    def judging(self) -> dict[str, Any]:
        """The arguments of the Evaluation that judges the runs."""
        return {
            "model": self.model, "data": self.data, "prompt": self.prompt, "images": self.images,
            "prior_images": self.prior_images, "repeats": self.repeats, "steps": self.sample_steps,
            "guidance": self.guidance, "vision": self.vision, "clip": self.clip, "device": self.device,
        }  # fmt: skip


class Attempt:
    """One run of the comparison: its settings, its folder, and what came of it."""

    def __init__(self, method: str, lr: float, seed: int, config: TrainConfig, folder: Path) -> None:
        self.method, self.lr, self.seed, self.config, self.folder = method, lr, seed, config, folder
        self.figures: dict[str, Any] | None = None
        self.info: dict[str, Any] = {}
        self.error: str | None = None

    @property
    def status(self) -> str:
        return "failed" if self.error else "finished" if self.figures else "not run yet"

    def recorded(self) -> dict[str, Any]:
        """As in comparison.json."""
        return {
            "lr": self.lr,
            "seed": self.seed,
            "status": self.status,
            "error": self.error,
            "folder": f"runs/{self.folder.name}",
            **{name: (self.figures or {}).get(name) for name in FIGURES},
            "seconds": self.info.get("seconds"),
        }


class Comparison:
    """The runs of a comparison and what is known of them so far; `write` puts that on disk and on the page."""

    def __init__(self, config: CompareConfig, folder: Path, evaluation: Evaluation, console: Console) -> None:
        self.config, self.folder, self.evaluation, self.console = config, folder, evaluation, console
        self.search = config.seeds[: config.search_seeds]
        self.amounts = {method: equal_parameters(method, config) for method in config.methods}
        self.rates = {method: sorted(config.lrs.get(method) or own_rates(method, config)) for method in config.methods}
        self.attempts = {  # all settings are checked here, before the first run
            (method, lr, seed): self._attempt(method, lr, seed)
            for method in config.methods
            for lr in self.rates[method]
            for seed in config.seeds
        }
        self.planned = len(self.search) * sum(map(len, self.rates.values()))
        self.planned += len(config.methods) * (len(config.seeds) - len(self.search))
        self.best: dict[str, float] = {}
        self.base: dict[str, Any] = {}
        self.status = "unfinished"

    def _attempt(self, method: str, lr: float, seed: int) -> Attempt:
        config = self.config
        options = {**config.options.get(method, {}), **self.amounts[method]}
        resolved = make_config(
            TrainConfig,
            {
                "model": config.model, "data": config.data, "prompt": config.prompt, "options": options,
                "method": config.method_of(method), "lr": lr, "seed": seed, "steps": config.steps,
                "batch_size": config.batch_size, "device": config.device,
                "sample_every": 0, "save_every": 0, **config.train,
            },
        )  # fmt: skip
        asked = resolved.model_dump(mode="json", exclude={"output"})
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
        folder = self.folder / "runs" / f"{method}-lr{lr:g}-seed{seed}-{key}"
        return Attempt(method, lr, seed, resolved.model_copy(update={"output": folder}), folder)

    def carry_out(self, attempts: Iterable[Attempt]) -> None:
        """Train and judge those that are not done already; an error is kept as the attempt's result."""
        asked, open_ones = self.config.judging(), []
        for attempt in attempts:
            if attempt.status == "not run yet":
                if answered(attempt.folder, asked):
                    self.collect(attempt, None)
                else:
                    open_ones.append(attempt)
        if self.config.ray is not None:
            from fallow.recipes.ray_cluster import spread

            jobs = [(attempt.config, asked) for attempt in open_ones]
            for at, error in spread(self.config.ray, jobs, self.config.ray_cpus):
                self.tell(open_ones[at], "finished" if error is None else "ended")
                self.collect(open_ones[at], error)
            return
        for attempt in open_ones:
            self.tell(attempt, "begins")
            self.collect(attempt, attempted(attempt.config, self.evaluation, asked, self.console))

    def tell(self, attempt: Attempt, what: str) -> None:
        number = 1 + sum(other.status != "not run yet" for other in self.attempts.values())
        named = f"{attempt.method}, lr {attempt.lr:g}, seed {attempt.seed}"
        verb = "" if what == "begins" else f" {what}"
        self.console.rule(f"run {number} of {self.planned}{verb}: {named}", align="left")

    def collect(self, attempt: Attempt, error: str | None) -> None:
        """Read what came of an attempt, and put it on disk and on the page."""
        attempt.info, attempt.error = _read(attempt.folder / "run.json"), error
        if error is None:
            attempt.figures = _read(attempt.folder / "evaluation" / "evaluation.json")
        else:
            self.console.print(f"failed: {error}", style="red", markup=False)
        self.write()

    def choose_rates(self) -> None:
        """The best learning rate of each method, of those whose runs of the search all finished."""
        scores = self.scores()
        for method, rates in self.rates.items():
            by_rate = {
                lr: statistics.fmean(scores[method, lr, seed] for seed in self.search)
                for lr in rates
                if all((method, lr, seed) in scores for seed in self.search)
            }
            if by_rate:
                self.best[method] = max(by_rate, key=lambda lr: by_rate[lr])

    def scores(self) -> dict[tuple[str, float, int], float]:
        """What each finished run of the search is worth by the criterion `select_by`; higher is better."""
        done = {key: a.figures for key, a in self.attempts.items() if a.figures and a.seed in self.search}
        if self.config.select_by == "vlhi" and done and all(f["alignment"] is not None for f in done.values()):
            scores = vlhi([f["frechet"] for f in done.values()], [f["alignment"] for f in done.values()])
            return dict(zip(done, scores, strict=True))
        if self.config.select_by == "anchored":
            floor, real = self.evaluation.floor or 0.0, self.evaluation.real_aligned.value
            return {key: anchored_score(f, self.base["frechet"], floor, real) for key, f in done.items()}
        return {key: -f["frechet"] for key, f in done.items()}

    def result(self) -> dict[str, Any]:
        """Everything that the page shows, as it stands now."""
        scores, evaluation = self.scores(), self.evaluation
        methods = []
        for series, (method, rates) in enumerate(self.rates.items()):
            best = self.best.get(method)
            sweep = [
                {**self.attempts[key].recorded(), "score": scores.get(key), "chosen": lr == best}
                for lr in rates
                for seed in self.search
                if (key := (method, lr, seed))
            ]
            runs = [self.attempts[method, best, seed] for seed in self.config.seeds] if best is not None else []
            failed = sum(a.error is not None for key, a in self.attempts.items() if key[0] == method)
            methods.append(
                {
                    "method": method, "label": method, "series": series, "lr": best, "sweep": sweep, "failed": failed,
                    **means_over_seeds(runs),
                }
            )  # fmt: skip
        add_vlhi(methods)
        return {
            "status": self.status,
            "finished": sum(a.status == "finished" for a in self.attempts.values()),
            "planned": self.planned,
            "config": self.config.model_dump(mode="json"),
            "judge": evaluation.judge.name,
            "images": evaluation.images,
            "reference_images": len(evaluation.real),
            "reference_unseen": evaluation.unseen,
            "memory_measured": next(
                (told for a in self.attempts.values() if (told := a.info.get("memory_measured"))), None
            ),
            "floor_images": evaluation.floor_images,
            "frechet_floor": evaluation.floor,
            "alignment_real": evaluation.real_aligned.value,
            "recognised_real": evaluation.real_aligned.recognised,
            "prior_reference": self.base.get("prior_reference"),
            "prompts": evaluation.prompts[:COLUMNS],
            "base": self.base,
            "notes": self.base.get("notes", []),
            "methods": methods,
        }

    def write(self) -> None:
        """`comparison.json` and the page, as things stand."""
        with atomic_write(self.folder / "comparison.json") as partial:
            Path(partial).write_text(json.dumps(self.result(), indent=2) + "\n", encoding="utf-8")
        write_comparison_page(self.folder)


def compare(config: CompareConfig, *, console: Console | None = None) -> Path:
    """Carry out the comparison; returns its folder, with `comparison.json`, `comparison.html` and `runs/`.

    Raises ConfigError, DataError or ModelError before the first run for what cannot be compared at all, and FallowError
    at the end if not one run succeeded (the page says why).
    """
    console = console or Console(stderr=True, quiet=True)
    folder = config.output or Path("runs") / f"compare-{Path(config.data).name}"
    evaluation = Evaluation(**config.judging())
    comparison = Comparison(config, folder, evaluation, console)
    (folder / "real").mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(opened(evaluation.real[:COLUMNS])):
        picture.save(folder / "real" / f"picture-{index:03d}.png")
    console.rule("the base model", align="left")
    comparison.base = judged(evaluation, config.judging(), folder / "base", [])
    comparison.carry_out(attempt for key, attempt in comparison.attempts.items() if key[2] in comparison.search)
    comparison.choose_rates()
    comparison.carry_out(
        comparison.attempts[method, lr, seed] for seed in config.seeds for method, lr in comparison.best.items()
    )
    comparison.status = "finished"
    comparison.write()
    errors = [attempt.error for attempt in comparison.attempts.values() if attempt.error]
    if errors and not comparison.best:
        raise FallowError(f"no run succeeded; the first said: {errors[0]} (all: {folder / 'comparison.html'})")
    return folder


def attempted(config: TrainConfig, evaluation: Evaluation, asked: dict[str, Any], console: Console) -> str | None:
    """Train and judge one run in its folder, unless what is there answers already; the error where there was one."""
    folder = config.output
    assert folder is not None
    try:
        if _read(folder / "run.json").get("status") != "finished":
            if folder.exists():  # left by a run that was stopped or failed
                shutil.rmtree(folder)
            train(config, console=console)
        judged(evaluation, asked, folder / "evaluation", [(folder / "adapter", 1.0)])
        write_run_report(folder)
    except Exception as error:  # whatever goes wrong with one method, the others are still worth comparing
        return f"{type(error).__name__}: {error}".strip()
    return None


def judged(
    evaluation: Evaluation, asked: dict[str, Any], folder: Path, adapters: Sequence[tuple[Path, float]]
) -> dict[str, Any]:
    """The figures in `folder` where they answer the same question, else new ones."""
    found = _read(folder / "evaluation.json")
    if found.get("asked") == _question(asked):
        return found
    measured = evaluation.measure(adapters)
    measured.figures["asked"] = _question(asked)
    measured.save(folder, pictures=COLUMNS)
    return measured.figures


def answered(folder: Path, asked: dict[str, Any]) -> bool:
    """Whether a run is finished, and judged by what is asked now."""
    judgement = _read(folder / "evaluation" / "evaluation.json")
    return _read(folder / "run.json").get("status") == "finished" and judgement.get("asked") == _question(asked)


def _question(asked: dict[str, Any]) -> dict[str, Any]:
    """As the files name it: `device` decides nothing, and steps are called sample_steps beside those of training."""
    return {("sample_steps" if name == "steps" else name): value for name, value in asked.items() if name != "device"}


@lru_cache(maxsize=1)
def evaluation_of(asked: str) -> Evaluation:
    """The Evaluation of these arguments (JSON), made once in a process."""
    return Evaluation(**json.loads(asked))


def anchored_score(figures: Mapping[str, Any], base: float, floor: float, real: float | None) -> float:
    """Share of the way from the base model's Frechet distance to the floor, plus alignment as a share of that of real
    pictures (left out where it cannot be told): about 2 is as good as real pictures, about 1 as the base model."""
    way = base - floor
    nearer = (base - figures["frechet"]) / way if way > 0 else -figures["frechet"]
    return float(nearer + (figures["alignment"] / real if figures["alignment"] is not None and real else 0.0))


def means_over_seeds(runs: Sequence[Attempt]) -> dict[str, Any]:
    """Means and standard deviations over the finished seeds of a method; None where there is none."""
    done = [(attempt.figures, attempt.info) for attempt in runs if attempt.figures]
    out: dict[str, Any] = {"runs": [attempt.recorded() for attempt in runs]}
    for name in FIGURES:
        values = [figures.get(name) for figures, _ in done]
        told = [value for value in values if value is not None] if None not in values else []
        out[name] = statistics.fmean(told) if told else None
        out[f"{name}_spread"] = statistics.stdev(told) if len(told) > 1 else None
    for name in COSTS:
        told = [info[name] for _, info in done if info.get(name) is not None]
        out[name] = statistics.fmean(told) if told else None
    trained, total = out["trained_parameters"], out["total_parameters"]
    out["trained_share"] = trained / total if total and trained is not None else None
    return out


def add_vlhi(methods: list[dict[str, Any]]) -> None:
    """VLHI of every chosen run over the group of all of them, so that methods and seeds are on one scale; in place.

    None where there are fewer than two runs, or where alignment could not be told.
    """
    for method in methods:
        method |= {"vlhi": None, "vlhi_spread": None, "vlhi_by_seed": []}
        for run in method["runs"]:
            run["vlhi"] = None
    group = [run for method in methods for run in method["runs"] if run["status"] == "finished"]
    if len(group) < 2 or any(run["alignment"] is None for run in group):
        return
    for run, score in zip(group, vlhi([r["frechet"] for r in group], [r["alignment"] for r in group]), strict=True):
        run["vlhi"] = score
    for method in methods:
        told = [run["vlhi"] for run in method["runs"] if run["vlhi"] is not None]
        if told:
            method["vlhi"], method["vlhi_by_seed"] = statistics.fmean(told), told
            method["vlhi_spread"] = statistics.stdev(told) if len(told) > 1 else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # not there, or cut off in the middle: then it is made again
    return found if isinstance(found, dict) else {}


def own_rates(method: str, config: CompareConfig) -> list[float]:
    """The learning rates to try where none are given: three, a factor of about three apart, around the method's own."""
    row = METHODS[config.method_of(method)]
    if config.model == "mini-sd":
        return [float(f"{row.small * factor:.2g}") for factor in (1 / 3, 1, 3)]
    return list(row.rates)


def equal_parameters(name: str, config: CompareConfig) -> dict[str, Any]:
    """The options with which a contestant trains about `config.budget` numbers; none where no budget is given."""
    return options_for(config.method_of(name), config.options.get(name, {}), config.budget, config.model, name)
