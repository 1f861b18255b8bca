"""Adapt a text-to-image model to a folder of pictures.

    outcome = train(TrainConfig(data="my-pictures", method="sara", options={"fraction": 0.05}, steps=500))
    outcome.adapter                                     # the adapter's directory; outcome.report is the page

`train` and `Run` read from top to bottom: claim the run directory, load the model, encode the pictures once, put the
network into training by the chosen method, walk the steps, save the adapter, write the page. All chance is drawn from
generators made of (seed, step), so a run that is resumed goes on bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from rich.console import Console
from torch import nn

from fallow import assets
from fallow.core.errors import AdapterError, ConfigError, FallowError, StorageError, TrainingError
from fallow.core.files import atomic_write, mark, sweep
from fallow.recipes import low_memory, run_directory
from fallow.recipes.adapter_files import adapter_size
from fallow.recipes.captions import CaptionRules
from fallow.recipes.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from fallow.recipes.clips import clips_alone, count, frames_of
from fallow.recipes.concepts import read_concepts, seen
from fallow.recipes.families import family_named
from fallow.recipes.families.animatediff import FRAMES
from fallow.recipes.flow_matching import FlowMatching
from fallow.recipes.gallery import sheet
from fallow.recipes.latents import Batch, CalibrationBatches, Examples, seed_of, seeded
from fallow.recipes.methods import make_method, own_rate
from fallow.recipes.moving_average import MovingAverage
from fallow.recipes.noise import zero_terminal
from fallow.recipes.optimizers import averaged_values, averages
from fallow.recipes.parts import Parts, parts_of
from fallow.recipes.pictures import Batches, Picture, Size, fit, open_picture, read_pictures
from fallow.recipes.pipelines import check_frames, chosen_device, generate, kind_of_model, load_pipeline
from fallow.recipes.processes import Processes, join
from fallow.recipes.progress import Journal, forget_peak, peak_memory
from fallow.recipes.provenance import Making, header
from fallow.recipes.resting import Resting
from fallow.recipes.settings import differences, make_config
from fallow.recipes.train_config import FREE, TrainConfig
from fallow.recipes.trained import Order, Trained
from fallow.recipes.validation import Validation, held_out
from fallow.report.run import write_run_report

CALIBRATION = 16  # batches for the methods that look before they choose
COLUMNS = 4  # of the sheets in samples/


@dataclass(frozen=True)
class Outcome:
    """Where a finished run has put everything; `info` is its run.json."""

    folder: Path
    adapter: Path
    report: Path
    info: dict[str, Any]
    main: bool = True  # False in the processes of a run that leave files and words to the first one


def train(
    config: TrainConfig,
    console: Console | None = None,
    *,
    command: str | None = None,
    after_step: Callable[[int], None] | None = None,
) -> Outcome:
    """Train as `config` says, or go on with the run that its `resume` names.

    `console` shows progress; `command` is what the page says made the run; `after_step(step)` is called after each
    update. An interrupt (Ctrl-C, SIGTERM) ends the step, saves a checkpoint and raises KeyboardInterrupt.

    Raises ConfigError, DataError, ModelError or SelectionError (and AdapterError for a checkpoint that does not fit)
    before anything is trained (a new run then leaves no directory), and TrainingError where the loss is no number any
    more; checkpoints are kept.
    """
    processes = join(config.device)
    console = console if console is not None and processes.main else Console(stderr=True, quiet=True)
    resumed = config.resume is not None
    if resumed:
        config, folder = resumed_config(config)
        there = True
    else:
        folder, there = processes.decide(lambda: new_place(config))
    with contextlib.ExitStack() as held:
        processes.decide(lambda: held.enter_context(run_directory.alone(folder)))
        run = begin(config, folder, console, resumed, there, processes)
        return carry_out(run, resumed, command, after_step)


def new_place(config: TrainConfig) -> tuple[Path, bool]:
    """The directory of a new run, and whether it was there before."""
    there = config.output is not None and config.output.is_dir()
    folder = config.output or run_directory.new_folder(config.method, config.data)
    run_directory.make(folder)
    return folder, there


def begin(config: TrainConfig, folder: Path, console: Console, resumed: bool, there: bool, processes: Processes) -> Run:
    """The run up to its first step; a new one that fails leaves nothing, and no directory that was not `there`."""
    if resumed:
        processes.decide(lambda: sweep(folder, deep=True, alone=True))  # what a killed process was writing
        anew = not checkpoints(folder) and run_directory.began(folder)
        return Run(config, folder, None if anew else load_checkpoint(folder), console, processes)
    processes.decide(lambda: run_directory.claim(folder))
    try:
        if processes.main:  # first of all, so that a run that is killed can be resumed
            run_directory.write_settings(folder, config)
        return Run(config, folder, None, console, processes)
    except BaseException:  # whatever it was, no half-made run stays in the way of the next try
        if processes.main:
            run_directory.clear(folder)
            if not there:
                with contextlib.suppress(OSError):  # another run has taken it
                    folder.rmdir()
        raise


def carry_out(run: Run, resumed: bool, command: str | None, after_step: Callable[[int], None] | None) -> Outcome:
    """The steps and the end; whatever stops them stands in run.json and on the page."""
    folder = run.folder
    run.note_command(command or shlex.join(["fallow", "train", "--config", str(folder / "config.toml")]), resumed)
    with interrupts() as interrupted:
        try:
            run.walk(interrupted, after_step)
            return run.finish()
        except KeyboardInterrupt:
            with contextlib.suppress(OSError, StorageError):  # a full disk must not hide why the run stopped
                run.end("stopped", "interrupted from the keyboard")
            raise
        except Exception as error:  # whatever it was, the page should say so; it is raised again
            with contextlib.suppress(OSError, StorageError):
                run.end("failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            with contextlib.suppress(OSError):
                run.journal.close()


def resumed_config(config: TrainConfig) -> tuple[TrainConfig, Path]:
    """The settings of the run to go on with, and its folder; those that `config` sets must agree, but for FREE ones."""
    folder = config.resume
    assert folder is not None
    settings = run_directory.settings_of(folder)
    try:
        saved = make_config(TrainConfig, settings)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.toml'}: {error}") from None
    run_directory.refuse_read_only(folder)
    given = {name: getattr(config, name) for name in config.model_fields_set - {"resume"}}
    if "output" in given and given["output"] != folder:
        raise ConfigError(f"output={given['output']} and resume={folder} are two directories; leave output out")
    if changed := differences(saved.model_dump(), given, FREE):
        raise ConfigError(
            f"the run {folder} cannot go on with other settings: {'; '.join(changed)}; leave them out, or start anew"
        )
    return saved.model_copy(update={**given, "resume": None, "output": folder}), folder


class Run:
    """A run on its way: the network in training, the data, and what is written about it."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        state: dict[str, Any] | None,
        console: Console,
        processes: Processes | None = None,
    ) -> None:
        """Everything up to the first step; with `state`, of a checkpoint, up to the first step after it."""
        self.processes, self.home = processes or Processes(), folder
        if not self.processes.main:  # what this one writes is for nobody, and it draws nothing
            folder, config = self.processes.scratch(), config.model_copy(update={"samples": 0})
        self.config, self.folder, self.console = config, folder, console
        self.step, self.seconds = 0, 0.0  # updates made, and the time they took
        self.warmup = min(100, config.steps // 20) if config.warmup is None else config.warmup
        self.device = chosen_device(config.device)
        self.family = family_named(kind_of_model(config.model))
        self.read()  # before a large model is loaded
        self.say(f"loading {config.model}")
        if expected := low_memory.told(config):
            self.say(expected)
        self.pipeline = load_pipeline(config.model, device=low_memory.loading_device(config))
        self.network = self.family.part(self.pipeline)
        self.whole = self.in_training()
        self.base = weight_marks(self.pipeline)
        low_memory.prepare(self.pipeline, self.network, config, self.device)
        if config.prediction is not None:  # the drawings must believe it too
            scheduler = self.pipeline.scheduler
            self.pipeline.scheduler = type(scheduler).from_config(scheduler.config, prediction_type=config.prediction)
        if config.zero_terminal_snr:
            self.pipeline.scheduler = zero_terminal(self.pipeline.scheduler)
        self.objective = self.family.objective(
            self.pipeline, config.prediction, density=config.timestep_density, weighting=config.timestep_weighting
        )
        weighted = "min_snr" if config.min_snr is not None else "debiased_estimation"
        if (config.min_snr is not None or config.debiased_estimation) and isinstance(self.objective, FlowMatching):
            raise ConfigError(
                f"{weighted} is for models of diffusion; {self.family.title} is trained by flow matching, whose "
                "weights are timestep_weighting=cosmap; leave it out"
            )
        self.average: MovingAverage | None = None
        self.averaging = False  # whether the optimizer averages by itself

        self.encode()
        self.resting = Resting(self.idle(), self.device)
        self.resting.leave()
        if config.samples and state is None:
            self.draw_samples("before")
            self.show_examples()

        self.peak, self.measured = 0, ""  # bytes of memory, the choice of entries included, and what they are of
        forget_peak(self.device)
        self.trained = self.put_into_training()
        self.averaging = averages(self.trained.optimizer)
        self.rates = [group["lr"] for group in self.trained.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        if config.ema:
            self.average = MovingAverage(self.trained, config.ema_decay)
        if state is not None:
            self.go_on_from(state)

        run_directory.write_settings(folder, config)
        today = datetime.now(UTC).date().isoformat()
        self.info = {"begun": today} | run_directory.read_info(folder) | self.described()
        run_directory.write_info(folder, self.info, status="running", error=None)
        self.journal = Journal(folder, config.steps, self.step, self.device, console)
        if state is not None:
            self.journal.event("resume", self.step)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def note_command(self, command: str, resumed: bool) -> None:
        """What made the run; of a run that was resumed, every command, one on each line."""
        former = [str(self.info["command"])] if resumed and self.info.get("command") else []
        self.info["command"] = "\n".join([*former, command])

    # -- before the first step ----------------------------------------------------------------------------------------

    def read(self) -> None:
        """The pictures to train on, those of the class, and those to measure on.

        `worded` are the first with the captions that training sees or draws from, `pictures` with plain ones.
        """
        config, rules = self.config, self.config.caption_rules
        read: Callable[..., list[Picture]] = read_concepts
        if self.family.clips:
            read = clips_alone
        found = read(training_folder(config.data), config.concepts, config.prompt, config.reading)
        self.class_pictures = read(config.class_data, (), config.class_prompt) if config.class_data else []
        measured: list[Picture] = []
        if config.validation is not None:
            measured = read(config.validation, (), config.prompt, config.reading)
        elif config.validation_share:
            found, measured = held_out(found, config.validation_share, config.seed)
        self.pictures = [replace(picture, caption=rules.plain(picture.caption)) for picture in found]
        self.worded = found if rules.random else self.pictures
        self.measured_pictures = [replace(picture, caption=rules.plain(picture.caption)) for picture in measured]

    def encode(self) -> None:
        """Latents and embeddings of the pictures and, for prior preservation, of those of the class."""
        config = self.config
        self.say(f"encoding {len(self.pictures)} pictures")
        self.sizes, self.frames = self.fitted(self.pictures), self.clip_length()
        self.examples = self.encoded(self.worded, self.sizes, config.caption_rules)
        self.places, self.place_sizes = seen(self.pictures, self.sizes)
        self.batches = Batches(self.place_sizes, config.batch_size * config.accumulation, config.seed)
        self.class_examples: Examples | None = None
        if config.class_prompt is not None:
            pictures = self.class_pictures or self.draw_class_pictures(config.class_prompt)
            sizes = self.fitted(pictures)
            self.class_examples = self.encoded(pictures, sizes)
            seed = seed_of("class", config.seed)
            self.class_places, sizes = seen(pictures, sizes)
            self.class_batches = Batches(sizes, config.batch_size * config.accumulation, seed)
        self.validation: Validation | None = None
        if self.measured_pictures:
            sizes = self.fitted(self.measured_pictures)
            examples = self.encoded(self.measured_pictures, sizes, flip=False)
            self.validation = Validation(
                examples, sizes, config.noise_rules, config.validation_draws, config.batch_size, config.seed
            )

    def idle(self) -> list[nn.Module]:
        """Parts that the steps do not need: the autoencoder and, where captions are encoded already, text encoders."""
        later = self.config.train_text_encoder or self.config.caption_rules.random
        return [self.pipeline.vae, *([] if later else self.family.encoders(self.pipeline).values())]

    def encoded(
        self,
        pictures: Sequence[Picture],
        sizes: Sequence[Size],
        rules: CaptionRules | None = None,
        flip: bool | None = None,
    ) -> Examples:
        flip = self.config.flip if flip is None else flip
        return Examples(
            self.pipeline, pictures, sizes, flip=flip, objective=self.objective, rules=rules,
            frames=self.frames, encode_later=self.config.train_text_encoder,
        )  # fmt: skip

    def fitted(self, pictures: Sequence[Picture]) -> list[Size]:
        """The size that each picture is trained at: sides that the network can halve as often as it does."""
        resolution = self.config.resolution or self.family.side(self.pipeline)
        return fit(pictures, resolution, self.family.multiple(self.pipeline), bucket=self.config.bucket)

    def in_training(self) -> nn.Module:
        """What is trained: the network, or with it the text encoders. All other parts are frozen."""
        encoders = self.family.encoders(self.pipeline)
        for part in (self.pipeline.vae, *encoders.values()):
            part.requires_grad_(False)
        if not self.config.train_text_encoder:
            return self.network
        chosen = {name: encoder for name, encoder in encoders.items() if name in self.family.trained_encoders}
        for encoder in chosen.values():
            encoder.requires_grad_(True)
        return Parts({self.family.network: self.network, **chosen})

    def clip_length(self) -> int | None:
        """How many frames of a clip are trained together; None where the model draws pictures."""
        most, asked = self.family.frames(self.pipeline), self.config.frames
        check_frames(self.family, self.pipeline, asked)
        if most is None:
            return None
        shortest = min(self.pictures, key=lambda clip: count(clip.path))
        there = count(shortest.path)
        if asked is not None and there < asked:
            raise ConfigError(
                f"frames={asked} is more than the {there} of {shortest.path}; give {there}, or take it out"
            )
        return asked or min(most, FRAMES, there)

    def draw_class_pictures(self, prompt: str) -> list[Picture]:
        """What the base model draws for the class, kept in the run directory; what is there already is used again."""
        folder = self.home / "class-pictures"
        self.processes.decide(lambda: self.draw_missing(prompt, folder))
        return read_pictures(folder, prompt)

    def draw_missing(self, prompt: str, folder: Path) -> None:
        files = [folder / f"picture-{number:04d}.png" for number in range(self.config.class_images)]
        missing = [number for number, file in enumerate(files) if not file.exists()]
        for begin in range(0, len(missing), COLUMNS * 4):
            some = missing[begin : begin + COLUMNS * 4]
            seeds = [seed_of("class picture", self.config.seed, number) for number in some]
            for number, picture in zip(some, self.drawn([prompt] * len(some), seeds), strict=True):
                with atomic_write(files[number]) as partial:
                    picture.save(partial, format="PNG")

    def put_into_training(self) -> Trained:
        """The network under the chosen method, in training mode."""
        config = self.config
        if config.gradient_checkpointing and not config.block_swap:  # which recomputes each of its blocks itself
            for part in parts_of(self.whole).values():
                recompute(part)
        batches = CalibrationBatches(self.example_batch, self.place_sizes, config.batch_size, config.seed, CALIBRATION)
        rate = config.lr or own_rate(config.method, config.model)
        order = Order(
            network=self.whole, lr=rate, options=low_memory.method_options(config), steps=config.steps,
            seed=config.seed, batches=batches, loss=lambda _, batch: self.loss(batch), rule=config.rule,
            targets=self.family.targets(self.pipeline), include=self.included(),
        )  # fmt: skip
        trained = make_method(config.method, order)
        self.whole.train()
        self.say(f"{config.method}: {trained.trained_parameters:,} of {trained.total_parameters:,} parameters")
        return trained

    def included(self) -> str | None:
        """Which weights are trained where the method's options do not say; None: all."""
        inner = self.family.include
        if inner is None or self.whole is self.network:
            return inner
        return rf"^{self.family.network}\..*{inner}|^text_encoder"

    def described(self) -> dict[str, Any]:
        """What run.json says of the run from its beginning."""
        trained = self.trained
        return {
            "method": self.config.method, "model": self.config.model, "data": self.config.data,
            "lr": self.rates[0], "trained_parameters": trained.trained_parameters,
            "total_parameters": trained.total_parameters, "threshold": trained.threshold,
            "trained_where": {name: list(pair) for name, pair in trained.trained_where.items()},
            "prompts": self.prompts(), "pictures": len(self.pictures), "prediction": self.objective.prediction,
            "hardware": run_directory.hardware(self.device), "versions": run_directory.versions(),
        }  # fmt: skip

    # -- the steps ----------------------------------------------------------------------------------------------------

    def walk(self, interrupted: Callable[[], bool], after_step: Callable[[int], None] | None) -> None:
        """Make the updates that are left."""
        config = self.config
        told = len(self.trained.events)
        if self.step == 0:
            self.measure()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            while self.step < config.steps:
                begun = time.perf_counter()
                loss, norm, rate = self.update()
                self.step += 1
                self.journal.step(self.step, loss, norm, rate)
                last = self.step == config.steps
                due = bool(config.save_every) and (last or self.step % config.save_every == 0)
                if last or due or self.step % config.log_every == 0:
                    self.look()
                self.seconds += time.perf_counter() - begun
                for event in self.trained.events[told:]:
                    self.journal.event(**{**event, "step": self.step})
                told = len(self.trained.events)
                if self.step % config.validation_every == 0 or last:
                    self.measure()
                if due:
                    self.save()
                if after_step is not None:
                    after_step(self.step)
                if self.processes.any(interrupted()):
                    if not due:
                        self.look()
                        self.save()
                    raise KeyboardInterrupt(
                        f"stopped after step {self.step} of {config.steps}, which is saved. Go on with: "
                        f"fallow train --resume {shlex.quote(str(self.home))}"
                    )
                if config.samples and config.sample_every and self.step % config.sample_every == 0 and not last:
                    self.note_peak()
                    self.draw_samples(f"step-{self.step:06d}")
                    forget_peak(self.device)

    def note_peak(self) -> None:
        """Remember the most memory that training took so far; drawing is not part of it."""
        peak, self.measured = peak_memory(self.device)
        self.peak = max(self.peak, peak or 0)

    def update(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """One update; returns its loss and its gradient's norm, still on the device, and the learning rate."""
        config, optimizer = self.config, self.trained.optimizer
        share = rate_at(self.step, config.steps, self.warmup, config.schedule)
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        which = (self.processes.rank,) if self.processes.rank else ()
        torch.manual_seed(seed_of("network", config.seed, self.step, *which))  # what dropout in the network draws
        batch = self.example_batch(next(self.batches), seeded("step", config.seed, self.step))
        with self.processes.apart(optimizer):
            total = self.backward(batch, 1.0)
            if self.class_examples is not None:
                chance = seeded("class step", config.seed, self.step)
                places = [self.class_places[place] for place in next(self.class_batches)]
                prior = self.class_examples.batch(places, chance, noise=config.noise_rules)
                total = total + self.backward(prior, config.prior_weight)
        proxies = [] if low_memory.is_fused(config) else self.trained.trainable()  # fused, the gradients are gone
        total = self.processes.average(optimizer, proxies, total)
        self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(proxies, config.max_grad_norm or math.inf)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()
        if self.average is not None:
            self.average.update()
        return total, norm, self.rates[0] * share

    def example_batch(self, indices: Sequence[int], chance: torch.Generator) -> Batch:
        """Pictures of the data, as they are trained on."""
        config = self.config
        places = [self.places[place] for place in indices]
        return self.examples.batch(places, chance, caption_dropout=config.caption_dropout, noise=config.noise_rules)

    def backward(self, batch: Batch, weight: float) -> torch.Tensor:
        """Gradients of weight * loss, in pieces of `batch_size` pictures; returns that loss.

        Of several processes each sees its share of the batch, weighted so that their mean is that of the whole.
        """
        total = torch.zeros((), device=self.device)
        own = batch.part(*self.processes.share(len(batch)))
        for part in own.parts(self.config.batch_size):
            loss = self.loss(part) * (weight * len(part) * self.processes.count / len(batch))
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def loss(self, batch: Batch) -> torch.Tensor:
        """The objective on a batch, under the chosen precision."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.precision)
        with torch.autocast(self.device.type, half) if half else contextlib.nullcontext():
            return self.family.loss(self.network, batch, self.objective, self.config.loss_rules)

    def measure(self) -> None:
        """Note the loss on the pictures held out; keep the adapter of the lowest, where that is asked for."""
        if self.validation is None or not self.processes.main:
            return
        with self.averaged():
            self.whole.eval()
            loss = self.validation.measure(self.loss)
            self.whole.train()
            self.journal.validation(self.step, loss)
            if self.validation.note(self.step, loss) and self.config.keep_best and self.step:
                self.trained.save_adapter(self.folder / "best", self.adapter_facts(), self.adapter_notes())
        best = dict(zip(("step", "loss"), self.validation.best or (None, None), strict=True))
        self.info["validation"] = {"loss": loss, "best": best}

    def look(self) -> None:
        """Read the losses since the last look. TrainingError where one is no number any more."""
        for step, loss, norm in self.journal.flush():
            # Under fp16 a gradient that overflows is skipped by the scaler, which then lowers its scale.
            if not math.isfinite(loss) or not (self.scaler.is_enabled() or math.isfinite(norm)):
                self.journal.event("nan", step, loss=str(loss), grad_norm=str(norm))
                raise TrainingError(self.diverged(step, loss))

    def diverged(self, step: int, loss: float) -> str:
        saved = checkpoints(self.home)
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "there was no checkpoint yet"
        what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
        half = ", or train with precision bf16 or no" if self.config.precision == "fp16" else ""
        return (
            f"{what} at step {step}, so the run has stopped; {kept}. Lower lr={self.rates[0]:g} or max_grad_norm="
            f"{self.config.max_grad_norm}, or lengthen warmup={self.warmup}{half}"
        )

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step. TrainingError where a trained value is no number: none is then written."""
        if not all(bool(torch.isfinite(value).all()) for value in self.trained.masters().values()):
            raise TrainingError(self.diverged(self.step, math.nan))
        if self.processes.main:
            save_checkpoint(self.folder, self.step, self.state_dict(), self.config.keep)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the steps from here depend on, besides the settings."""
        return {
            "base": self.base,
            "step": self.step,
            "seconds": self.seconds,
            "trained": self.trained.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": self.scaler.state_dict(),
            "batches": self.batches.state_dict(),
            "class_batches": None if self.class_examples is None else self.class_batches.state_dict(),
            "best": None if self.validation is None else self.validation.best,
        }

    def go_on_from(self, state: dict[str, Any]) -> None:
        """`load_state_dict`; AdapterError where the checkpoint is not one of this run."""
        try:
            self.load_state_dict(state)
        except FallowError:
            raise
        # Parts are missing, or of other kinds and shapes than this run's.
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
            raise AdapterError(
                f"the last checkpoint of {self.home} does not fit this run ({type(error).__name__}: {error}); was "
                "the base model replaced, or Fallow updated? Train anew"
            ) from error

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. ConfigError on another base, or where it is beyond the steps asked for."""
        saved = dict(state["base"])
        if changed := [name for name in {**self.base, **saved} if self.base.get(name) != saved.get(name)]:
            raise ConfigError(
                f"the run was begun on another base: '{changed[0]}' of {self.config.model} holds other values now; put "
                "the base back that it was begun on, or start a new run"
            )
        if not isinstance(state["step"], int) or state["step"] < 0 or state["batches"]["step"] != state["step"]:
            raise ValueError(f"it is of step {state['step']} and its batches are at {state['batches']['step']}")
        if state["step"] > self.config.steps:
            raise ConfigError(
                f"steps={self.config.steps} lies behind the {state['step']} steps already made; give more"
            )
        self.batches.load_state_dict(state["batches"])
        if self.class_examples is not None:
            self.class_batches.load_state_dict(state["class_batches"])
        self.trained.load_state_dict(state["trained"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.scaler.load_state_dict(state["scaler"])
        if self.validation is not None:
            self.validation.best = state["best"]
        plain = [w for w in self.network.parameters() if type(w) is nn.Parameter and w.dtype.itemsize > 1]
        if not all(bool(torch.isfinite(weight).all()) for weight in plain):
            raise ValueError("it holds values that are no numbers")
        self.step, self.seconds = state["step"], state["seconds"]

    # -- drawings -----------------------------------------------------------------------------------------------------

    def prompts(self) -> list[str]:
        """What the drawings show: the given prompts, else captions of pictures spread over the data."""
        return self.config.sample_prompts or [picture.caption for picture in self.chosen_pictures()]

    def chosen_pictures(self) -> list[Picture]:
        """Pictures spread over the data, each with another caption as far as there are as many."""
        by_caption = list({picture.caption: picture for picture in self.pictures}.values())
        some = by_caption if len(by_caption) >= self.config.samples else self.pictures
        count = min(self.config.samples, len(some))
        return [some[i * len(some) // count] for i in range(count)]

    def drawn(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        side = None
        if self.config.resolution is not None:  # that of training, as near as it can be drawn
            multiple = math.lcm(self.family.drawing_multiple(self.pipeline), 8)
            side = max(multiple, self.config.resolution // multiple * multiple)
        return generate(
            self.pipeline, prompts, seeds=seeds, steps=self.config.sample_steps, guidance=self.config.guidance,
            width=side, height=side, frames=self.frames,
        )  # fmt: skip

    def draw_samples(self, name: str) -> None:
        """samples/<name>.png: the prompts, each from the same noise every time; with the average where there is one."""
        prompts = self.prompts()
        with self.resting.present(), self.averaged():
            pictures: list[Image.Image] = []
            for begin in range(0, len(prompts), COLUMNS):
                some = prompts[begin : begin + COLUMNS]
                pictures += self.drawn(some, [self.config.seed + begin + i for i in range(len(some))])
        self.write_sheet(name, pictures)

    def show_examples(self) -> None:
        """samples/examples.png: pictures of the data, cut to the square of the drawings."""
        opened = [
            frames_of(picture.path)[0] if self.family.clips else open_picture(picture.path)
            for picture in self.chosen_pictures()
        ]
        side = self.config.resolution or self.family.side(self.pipeline)
        self.write_sheet("examples", [ImageOps.fit(picture, (side, side)) for picture in opened])

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the network has the averaged values, where an average is asked for or is the optimizer's."""
        if self.averaging:
            return averaged_values(self.trained)
        return contextlib.nullcontext() if self.average is None else self.average.shown()

    def write_sheet(self, name: str, pictures: Sequence[Image.Image]) -> None:
        with atomic_write(self.folder / "samples" / f"{name}.png") as partial:
            sheet(pictures, min(COLUMNS, len(pictures))).save(partial, format="PNG")

    # -- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> Outcome:
        """The adapter, the last drawings and the page."""
        config, adapter = self.config, self.home / "adapter"
        if not self.processes.main:
            return Outcome(self.home, adapter, self.home / "report.html", self.info, main=False)
        self.note_peak()
        with self.averaged():
            self.trained.save_adapter(adapter, self.adapter_facts(), self.adapter_notes())
        if config.samples:
            self.draw_samples("after")
        report = self.end(
            "finished", None, peak_memory_bytes=self.peak or None, memory_measured=self.measured,
            adapter_bytes=adapter_size(adapter)[1],
        )  # fmt: skip
        assert report is not None
        return Outcome(self.folder, adapter, report, self.info)

    def adapter_facts(self) -> dict[str, Any]:
        """What an adapter tells Fallow of its training."""
        config = self.config
        facts = {
            "base_model": config.model, "data": config.data, "steps": self.step, "lr": self.rates[0],
            "batch_size": config.batch_size * config.accumulation, "seed": config.seed, "ema": config.ema,
            "prediction": self.objective.prediction,
        }  # fmt: skip
        rare = {
            "optimizer": config.optimizer if config.optimizer != "adamw" else None,
            "trigger_phrase": config.trigger_phrase,
            "zero_terminal_snr": config.zero_terminal_snr or None,
        }
        return facts | {name: value for name, value in rare.items() if value is not None}

    def adapter_notes(self) -> dict[str, str]:
        """What its file tells other tools."""
        width = getattr(self.network.config, "cross_attention_dim", None)
        return header(
            Making(
                pipeline=type(self.pipeline).__name__, text_width=width if isinstance(width, int) else None,
                prediction=self.objective.prediction, settings=self.config.model_dump(mode="json"),
                rate=self.rates[0], steps=self.step, sizes=self.sizes, pictures=self.worded,
                class_pictures=self.class_pictures, validation_pictures=len(self.measured_pictures), base=self.base,
                begun=self.info["begun"],
            )
        )  # fmt: skip

    def end(self, status: str, error: str | None, **more: Any) -> Path | None:
        """run.json and the page, as things stand."""
        if not self.processes.main:
            return None
        each = self.seconds / self.step if self.step else None
        run_directory.write_info(
            self.folder, self.info, status=status, error=error, steps=self.step, seconds=self.seconds,
            seconds_per_step=each, **more,
        )  # fmt: skip
        self.journal.board.flush()
        return write_run_report(self.folder)


def weight_marks(pipeline: Any) -> dict[str, str]:
    """The marks of every weight of every part of a pipeline: by these a resumed run knows its base."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {
        f"{part}.{name}": mark(weight) for part, module in parts.items() for name, weight in module.named_parameters()
    }


def recompute(part: Any) -> None:
    """Recompute activations in the backward pass: gradient checkpointing, as diffusers and transformers name it."""
    if hasattr(part, "enable_gradient_checkpointing"):
        part.enable_gradient_checkpointing()
    else:
        part.gradient_checkpointing_enable()


def training_folder(data: str) -> Path:
    """The folder of the pictures to train on: train/ within a shipped set or a folder that has one."""
    folder = assets.find(data)
    return folder / "train" if (folder / "train").is_dir() else folder


def rate_at(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The share of the learning rate at a step, counted from 0: a linear rise, then the schedule, to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if schedule == "linear" else 1.0


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C or SIGTERM is only noted, so that a step ends whole; yields what tells of it.

    A second one interrupts at once. Only the main thread may listen to signals; elsewhere nothing changes.
    """
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted.is_set
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    for number in former:
        signal.signal(number, note)
    try:
        yield noted.is_set
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
