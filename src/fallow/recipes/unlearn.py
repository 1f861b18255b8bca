"""Making a language model forget some texts and keep the rest: LoKU, beside gradient ascent and gradient difference.

    done = unlearn(UnlearnConfig(model="my-model", forget="forget.txt", retain="retain.txt", merged=True))

What it knows of the texts is measured before and after (`fallow.recipes.unlearn_metrics`). The run directory holds
config.toml, run.json, metrics.jsonl, adapter/, where asked for merged/, and report.html.

The adapter alone removes nothing: whoever takes it off has the model that remembers. What is handed out must be the
merged model, and the old one must be gone.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fallow.core.errors import ConfigError, StorageError
from fallow.core.files import atomic_directory, atomic_write
from fallow.core.host import detach, merge, save
from fallow.recipes import run_directory
from fallow.recipes.pipelines import quietly
from fallow.recipes.progress import Watch, forget_peak, peak_memory
from fallow.recipes.unlearn_config import UnlearnConfig
from fallow.recipes.unlearn_data import Example, examples_of, read_texts, refuse_shared
from fallow.recipes.unlearn_metrics import extraction_likelihood, recall
from fallow.recipes.unlearn_model import Sets, Unlearning, load, longest
from fallow.report.unlearning import json_lines, write_unlearning_report

WARNING = (
    "The adapter can be taken off again, and the model then remembers. To remove something for good, hand out a merged "
    "model (merged = true) and delete the old one."
)


@dataclass(frozen=True)
class Unlearned:
    """Where a run has put everything; `merged`: None where it was not asked for; `info`: its run.json."""

    folder: Path
    adapter: Path
    merged: Path | None
    report: Path
    info: dict[str, Any]


def unlearn(config: UnlearnConfig, console: Console | None = None, *, command: str | None = None) -> Unlearned:
    """Do it as `config` says. DataError, ModelError, ConfigError, by name, before anything is written; TrainingError
    where a loss is no number any more.
    """
    console = console or Console(stderr=True, quiet=True)
    texts = {name: read_texts(path, name) for name, path in _files(config)}
    if config.output is not None and config.output.is_dir():
        _claim(config.output)
    for name in ("retain", "reference"):
        refuse_shared(texts["forget"], texts.get(name, []), name)
    model, tokenizer = load(config)
    most = longest(config, model)
    found = {name: examples_of(part, tokenizer, most, name) for name, part in texts.items()}
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    work = Unlearning(config, model, Sets(found["forget"], found["retain"], found.get("reference", []), pad))
    if config.extraction_texts and not any(len(e.ids) - e.first >= config.ngram for e in work.sets.forget):
        raise ConfigError(f"ngram={config.ngram} is above the length of every text to forget; give a smaller one")
    work.adapt(config.method)  # what the model refuses is told before a directory is there
    work.release()
    folder = config.output or run_directory.new_folder(config.method, str(config.forget.with_suffix("")))
    run_directory.make(folder)
    with run_directory.alone(folder):
        _claim(folder)
        run_directory.write_settings(folder, config)
        info: dict[str, Any] = {}
        try:
            return _Run(work, tokenizer, folder, console, info).all(command)
        except BaseException as error:  # whatever it was, run.json says so; it is raised again
            state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            with contextlib.suppress(OSError, StorageError):
                if info:
                    run_directory.write_info(folder, info, status=state, error=f"{type(error).__name__}: {error}")
            raise


def _files(config: UnlearnConfig) -> list[tuple[str, Path]]:
    named = (("forget", config.forget), ("retain", config.retain), ("reference", config.reference))
    return [(name, path) for name, path in named if path is not None]


def _claim(folder: Path) -> None:
    if {place.name for place in folder.iterdir()} - {run_directory.LOCK}:
        raise ConfigError(f"output {folder} is not empty; give another one")


def evenly(examples: Sequence[Example], count: int) -> list[Example]:
    """At most so many of them, evenly picked."""
    places = torch.linspace(0, len(examples) - 1, min(count, len(examples)), dtype=torch.float64)
    return [examples[i] for i in places.round().long().tolist()]


class _Run:
    def __init__(self, work: Unlearning, tokenizer: Any, folder: Path, console: Console, info: dict[str, Any]) -> None:
        self.work, self.tokenizer, self.folder, self.console, self.info = work, tokenizer, folder, console, info
        self.config, self.model = work.config, work.model

    def all(self, command: str | None) -> Unlearned:
        config, sets = self.config, self.work.sets
        made = command or shlex.join(["fallow", "unlearn", "--config", str(self.folder / "config.toml")])
        run_directory.write_info(
            self.folder, self.info, status="running", command=made, begun=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            model=config.model, forget=str(config.forget), retain=str(config.retain), method=config.method,
            texts={"forget": len(sets.forget), "retain": len(sets.retain), "reference": len(sets.reference)},
            total_parameters=sum(param.numel() for param in self.model.parameters()), warning=WARNING,
            hardware=run_directory.hardware(self.work.device), versions=run_directory.versions(),
        )  # fmt: skip
        self.say("measuring what it knows")
        reference = self.knows(sets.reference) if sets.reference else None
        run_directory.write_info(self.folder, self.info, before=self.figures(), reference=reference, methods=[])
        merged = None
        for method in (*config.against, config.method):  # the one that is kept last: merging it changes the weights
            self.one(method)
            if method != config.method:
                self.work.release()
        adapter = save(self.model, self.folder / "adapter")
        if config.merged:
            merged = self.folder / "merged"
            with atomic_directory(merged) as place, quietly():
                merge(self.model)
                detach(self.model)
                self.model.save_pretrained(str(place))  # type: ignore[operator]
                self.tokenizer.save_pretrained(str(place))
        run_directory.write_info(self.folder, self.info, status="finished")
        if merged is None:
            self.say(WARNING)
        return Unlearned(self.folder, adapter, merged, write_unlearning_report(self.folder), self.info)

    def one(self, method: str) -> None:
        """Train a method, measure it, and note both."""
        config = self.config
        self.say(f"{method}, from {config.start_of(method)}")
        began = time.monotonic()
        self.work.adapt(method)
        setup = time.monotonic() - began
        watch: Watch | None = None

        def tell(step: int, total: int, loss: float) -> None:
            nonlocal watch
            watch = watch or Watch(self.console, total, 0)
            watch.advance(step, loss)

        forget_peak(self.work.device)
        began = time.monotonic()
        try:
            done = self.work.train(method, self.forgotten, tell)
        finally:
            if watch is not None:
                watch.close()
        seconds = time.monotonic() - began
        memory, measured = peak_memory(self.work.device)
        self._append(done.lines)
        self.info["methods"].append({
            "method": method, "start": config.start_of(method), "updates": done.updates, "stopped": done.stopped,
            "trained_parameters": done.trained, "setup_seconds": setup, "seconds": seconds,
            "peak_memory_bytes": memory, "memory_measured": measured, "after": self.figures(),
        })  # fmt: skip
        run_directory.write_info(self.folder, self.info)

    def figures(self) -> dict[str, dict[str, float | None]]:
        """What the model knows now of what is to be forgotten, and of what is kept."""
        sets = self.work.sets
        kept = evenly(sets.retain, self.config.retain_texts or len(sets.retain))
        return {"forget": self.knows(sets.forget), "retain": self.knows(kept, False)}

    def knows(self, examples: Sequence[Example], extract: bool = True) -> dict[str, float | None]:
        """Memorisation accuracy and perplexity, and where asked for the extraction likelihood."""
        config = self.config
        size = max(1, 4 * config.batch_size)
        found: dict[str, float | None] = dict(recall(self.model, examples, size, self.work.sets.pad))
        if extract and config.extraction_texts:
            some = evenly(examples, config.extraction_texts)
            found["extraction"] = extraction_likelihood(self.model, some, config.ngram, config.extraction_every)
        return found

    def forgotten(self) -> bool:
        """Whether the run may end, by `stop`."""
        examples, reference = self.work.sets.forget, self.info["reference"]
        found = recall(self.model, examples, max(1, 4 * self.config.batch_size), self.work.sets.pad)
        if self.config.stop == "swapped":
            return found["most_accurate"] == 0
        if found["accuracy"] > reference["accuracy"]:
            return False
        extracted = self.knows(examples)["extraction"]
        return extracted is None or reference["extraction"] is None or extracted <= reference["extraction"]

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def _append(self, lines: Sequence[dict[str, Any]]) -> None:
        file = self.folder / "metrics.jsonl"
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        with atomic_write(file) as partial:
            partial.write_text(before + json_lines(lines), encoding="utf-8")
