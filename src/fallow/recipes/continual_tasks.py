"""One task after another on one model: each learned by a fresh adapter, merged at its end, kept apart on the side.

    tasks = fallow.TaskSequence(model, "codyra", rank=16, folder="tasks")
    for name, batches in sequence:
        tasks.start_task(name, steps=len(batches))
        optimizer = torch.optim.AdamW(tasks.parameter_groups(lr=5e-4), weight_decay=0.0)
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()
            fallow.step(model)                  # CoDyRA's thresholds
            optimizer.zero_grad()
        print(tasks.end_task().ranks)           # the model is a plain one again: W_t = W_(t-1) + D_t
    tasks.remove_task("animals")                # W_N - D_t

The life cycle of CoDyRA (arXiv 2412.01004), for every method whose change is a product B A of low rank. What is kept of
a task is `D_t = B A` with the components that are zero cut off, exactly: `rank (out + in)` numbers for each weight. A
task that is removed leaves what later ones learned on top of it as they learned it.

Weights of 16 bits would lose small changes that are added again and again: of these the values of the start are kept on
the CPU, and each time `W_0 + sum D_t` is summed up in float32 and rounded once. Float32 weights are changed in place.
The official code merges when the next task starts, so that the last one is never merged; here a task ends at its end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft  # noqa: F401  # before our host of it, which is told of by PEFT's being imported
import torch
from torch import Tensor, nn

from fallow.core import schedule
from fallow.core.delta import Delta, method_of
from fallow.core.distributed import rank
from fallow.core.errors import AdapterError, ConfigError, ModelError, TrainingError, nearest
from fallow.core.files import (
    fingerprint,
    matches,
    parse_json,
    read_json,
    read_tensors,
    refuse_not_finite,
    write_json,
    write_tensors,
)
from fallow.core.fused import Fused
from fallow.core.held_deltas import held_adapter
from fallow.core.host import detach
from fallow.core.host.holder import root_of
from fallow.core.host.targets import Spot, Targets, spots
from fallow.deltas import attach
from fallow.deltas.sora import SoRA

ADAPTER, FILE, FORMAT = "task", "sequence.json", "fallow-tasks"
BLOCK = re.compile(r"(?P<key>.*)\[(?P<start>\d+):(?P<stop>\d+)\]")


@dataclass(frozen=True)
class Task:
    """What a task has changed. `factors`: weight -> (B (out, r), A (r, in)), float32 on the CPU; a block of rows of a
    fused weight is `weight[start:stop]`. `whole`: parameter -> its change, of those trained in full.

    `chance`: the correlation between the sizes of the gates' random starts and their survival, for methods with gates.
    """

    name: str
    method: str
    factors: dict[str, tuple[Tensor, Tensor]]
    whole: dict[str, Tensor] = field(default_factory=dict)
    chance: float | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each weight's change, as stored: components that are exactly zero are not among it."""
        return {name: b.shape[1] for name, (b, _) in self.factors.items()}

    @property
    def numbers(self) -> int:
        """How many numbers are kept."""
        return sum(b.numel() + a.numel() for b, a in self.factors.values()) + sum(
            t.numel() for t in self.whole.values()
        )


class TaskSequence:
    """The tasks that a model has learned, in their order, in `tasks`; see the top of this file.

    `method`, `targets`, `exclude`, `patterns`, `fused`, `options`: as of `fallow.attach`, its `start`, `budget` and
    `objective` too; `fused={"in_proj_weight": 3}` gives query, key and value of a packed attention a rank each.
    `whole`: names of parameters that are trained in full beside, such as a classifier's. `folder`: where each task is
    kept as a file; it must be empty, or not there.
    ConfigError, ModelError for what cannot be, before anything is written.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "codyra",
        targets: Targets = "all-linear",
        *,
        exclude: Targets | None = None,
        patterns: Mapping[str, Mapping[str, Any]] | None = None,
        fused: Mapping[str, int | list[int]] | None = None,
        whole: Sequence[str] = (),
        folder: str | Path | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if not method_of(method).exact:
            raise ConfigError(
                f"method='{method}' changes a weight in a way that is no product of low rank, so that a task could not "
                "be kept and taken back; give codyra, sora, lora, kasa, pego or another with factors"
            )
        self.model, self.method, self.seed = model, method, seed
        self.how: dict[str, Any] = {
            "targets": targets if isinstance(targets, str) else list(targets),
            "exclude": exclude if exclude is None or isinstance(exclude, str) else list(exclude),
            "patterns": patterns, "fused": fused, **options,
        }  # fmt: skip
        self.tasks: dict[str, Task] = {}
        self.folder = None if folder is None else Path(folder)
        self.open: str | None = None
        self._start: dict[str, Tensor] = {}  # 16-bit weights before the first task
        self._known: dict[str, str] = {}  # fingerprints of the weights before the first task
        self._before: dict[str, Tensor] = {}  # what is trained in full, before the open task
        self._gates: list[Tensor] = []
        params = dict(model.named_parameters())
        for name in whole:
            if name not in params:
                raise ConfigError(f"whole: the model has no parameter '{name}'{nearest(name, params)}")
        self.whole = list(whole)
        place = self.folder
        if place is not None and place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise ConfigError(
                f"folder {place} is in use; give another, or go on with it: TaskSequence.load(model, folder)"
            )

    # -- the life of a task -------------------------------------------------------------------------------------------

    def start_task(self, name: str, steps: int | None = None) -> nn.Module:
        """Attach a fresh adapter, which changes nothing yet; only it, and what is trained in full, has gradients.

        `steps`: how many the task has, for methods that need to know. ConfigError while a task is open, for a name that
        is taken or no word, and for what `fallow.attach` refuses; the model is then as it was.
        """
        if self.open is not None:
            raise ConfigError(f"start_task('{name}'): '{self.open}' is not at its end; call end_task() first")
        if not isinstance(name, str) or not re.fullmatch(r"[\w+-][\w+. -]*", name):
            raise ConfigError(f"name={name!r} must be of letters, digits, spaces and + - _ . alone; it names a file")
        if name in self.tasks:
            raise ConfigError(f"there is a task '{name}' already; give another name")
        if root_of(self.model) is not None:
            raise ConfigError(
                f"start_task('{name}'): the model has adapters already; merge them and fallow.detach(model) first"
            )
        attach(self.model, self.method, name=ADAPTER, seed=self.seed, **self.how)
        held = held_adapter(self.model, ADAPTER).deltas
        found = {spot.key: spot for spot in spots(self.model)}
        both = {id(found[one.key].parameter()) for one in held}
        params = dict(self.model.named_parameters())
        try:
            for one in held:
                self._remember(found[one.key])
            for key in self.whole:
                if id(params[key]) in both:
                    raise ConfigError(f"whole: '{key}' has an adapter too; exclude its layer from the targets")
        except (ConfigError, ModelError):
            detach(self.model, ADAPTER)
            raise
        for key in self.whole:
            self._before[key] = params[key].detach().clone()
            params[key].requires_grad_(True)
        if steps is not None:
            schedule.resolve(self.model, steps)
        self._gates = [part.gate.detach().abs().cpu() for part in self._gated()]
        self.open = name
        return self.model

    def _remember(self, spot: Spot) -> None:
        """What of a weight is needed before it is changed for the first time."""
        weight = spot.parameter()
        if type(weight.data) is not Tensor or not weight.is_floating_point():
            raise ModelError(f"'{spot.key}' is quantised, so no task can be merged into it; load it in float32 or bf16")
        if weight.dtype.itemsize < 4 and spot.key not in self._start:
            self._start[spot.key] = weight.detach().cpu().clone()
        if self.folder is not None and spot.key not in self._known:
            self._known[spot.key] = fingerprint(weight)

    def parameter_groups(self, lr: float, gate_lr: float | None = None) -> list[dict[str, Any]]:
        """What the open task trains, for an optimizer: the gates at a rate of their own where one is given.

        With CoDyRA's settings chance decides which gates fall; 10 to 100 times `lr` for them lets the data decide.
        """
        self._needs_open("parameter_groups")
        trained = [param for param in self.model.parameters() if param.requires_grad]
        gates = {id(part.gate) for part in self._gated()}
        if gate_lr is not None and not gates:
            raise ConfigError(f"gate_lr={gate_lr}: '{self.method}' has no gates; leave it out")
        rest = {"params": [param for param in trained if id(param) not in gates], "lr": lr}
        if not gates:
            return [rest]
        own = lr if gate_lr is None else gate_lr
        return [rest, {"params": [param for param in trained if id(param) in gates], "lr": own}]

    @torch.no_grad()
    def end_task(self) -> Task:
        """Merge the open task, take its adapter off, keep its change; returns it.

        TrainingError where its values are no numbers: the model then still has the adapter. AdapterError,
        StorageError where the file cannot be written: the task is then still open.
        """
        self._needs_open("end_task")
        assert self.open is not None
        held = held_adapter(self.model, ADAPTER)
        factors = {name: pair for one in held.deltas for name, pair in _factors(one.key, one.delta)}
        params = dict(self.model.named_parameters())
        whole = {key: (params[key].detach() - self._before[key]).float().cpu() for key in self.whole}
        trained = [param for param in self.model.parameters() if param.requires_grad]
        if not all(bool(torch.isfinite(param).all()) for param in trained):
            raise TrainingError(f"task '{self.open}' has values that are no numbers; train it anew at a lower rate")
        task = Task(self.open, held.method, factors, whole, self._chance())
        self._store(task)
        detach(self.model, ADAPTER)
        self.tasks[task.name] = task
        self._change(task, 1.0, skip_whole=True)
        self.open, self._before, self._gates = None, {}, []
        return task

    def abandon_task(self) -> None:
        """Take the open task's adapter off without merging it; what is trained in full has its values again."""
        self._needs_open("abandon_task")
        detach(self.model, ADAPTER)
        params = dict(self.model.named_parameters())
        with torch.no_grad():
            for key, before in self._before.items():
                params[key].copy_(before)
        self.open, self._before, self._gates = None, {}, []

    def remove_task(self, name: str) -> Task:
        """Take what a task has changed out of the weights again, and its file away; returns it, for `add_task`."""
        self._needs_none("remove_task")
        if name not in self.tasks:
            raise ConfigError(f"there is no task '{name}'{nearest(name, self.tasks)}")
        task, file = self.tasks.pop(name), self._file(name)
        self._change(task, -1.0)
        if self.folder is not None and not rank():
            self._write_list()
            file.unlink(missing_ok=True)
        return task

    def add_task(self, task: Task) -> None:
        """Put a task that was removed, or learned elsewhere on the same base, into the weights, as the last one.

        ConfigError where one of its name is there, or a weight that it changes is not.
        """
        self._needs_none("add_task")
        if task.name in self.tasks:
            raise ConfigError(f"there is a task '{task.name}' already; remove it first")
        found = {spot.key: spot for spot in spots(self.model)}
        for name, (b, a) in task.factors.items():
            key, rows = _place(name)
            if key not in found:
                raise ConfigError(f"task '{task.name}' changes '{key}', which the model does not have")
            out, inner = found[key].view().shape
            if (b.shape[0], a.shape[1]) != (out if rows is None else rows.stop - rows.start, inner):
                raise ConfigError(
                    f"task '{task.name}' changes '{name}' by {b.shape[0]} x {a.shape[1]}, but it is {out} x {inner}"
                )
        for name in task.factors:
            self._remember(found[_place(name)[0]])
        self._store(task)
        self.tasks[task.name] = task
        self._change(task, 1.0)

    # -- in the weights -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _change(self, task: Task, sign: float, skip_whole: bool = False) -> None:
        found = {spot.key: spot for spot in spots(self.model)}
        for key in dict.fromkeys(_place(name)[0] for name in task.factors):
            weight, view = found[key].parameter(), found[key].view()
            if key in self._start:
                matrix = view.read(self._start[key].to(weight.device)).float()
                for other in self.tasks.values():
                    _add(matrix, other, key, 1.0)
            else:
                matrix = view.read(weight.detach())
                _add(matrix, task, key, sign)
            if matrix.data_ptr() != weight.data_ptr():
                weight.copy_(view.write(matrix, weight))
        params = dict(self.model.named_parameters())
        for key, change in {} if skip_whole else task.whole.items():
            params[key].add_(sign * change.to(params[key]))

    # -- on disk ------------------------------------------------------------------------------------------------------

    def _file(self, name: str) -> Path:
        return (self.folder or Path()) / f"{name}.safetensors"

    def _store(self, task: Task) -> None:
        if self.folder is None or rank():  # of several processes the first one writes
            return
        tensors = {f"{name}.b": b for name, (b, _) in task.factors.items()}
        tensors |= {f"{name}.a": a for name, (_, a) in task.factors.items()}
        tensors |= {f"{name}.whole": change for name, change in task.whole.items()}
        told = {"name": task.name, "method": task.method, "chance": task.chance}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self._file(task.name), tensors, {"format": FORMAT, "version": "1", "fallow": json.dumps(told)})
        self._write_list([*self.tasks, task.name])

    def _write_list(self, names: Sequence[str] | None = None) -> None:
        """sequence.json: the tasks in their order, and the weights that they began from."""
        listed = list(self.tasks if names is None else names)
        how = {name: value for name, value in self.how.items() if _is_plain(value)}  # no start that holds statistics
        how |= {"method": self.method, "whole": self.whole, "seed": self.seed}
        told = {"format": FORMAT, "version": 1, "how": how, "tasks": listed, "base": self._known}
        write_json((self.folder or Path()) / FILE, told)

    @classmethod
    def load(cls, model: nn.Module, folder: str | Path, **more: Any) -> TaskSequence:
        """Put the tasks of a folder into the model that they began from, and go on from there.

        `more`: what is to be otherwise than it was when the folder was made, as of the class.

        AdapterError where the folder holds none, a file is broken, or the model is another one.
        """
        folder = Path(folder)
        try:
            told = read_json(folder / FILE)
            names, known = list(told["tasks"]), dict(told["base"])
            made = cls(model, **{**told["how"], **more})
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise AdapterError(f"{folder} holds no {FILE} that can be read ({error}); give a folder of tasks") from None
        found = {spot.key: spot for spot in spots(model)}
        for key, mark in known.items():
            if key not in found or not matches(mark, found[key].parameter()):
                raise AdapterError(
                    f"{folder} began from another model: '{key}' is not the weight it was; load that one"
                )
        for name in names:
            made.add_task(_read(folder / f"{name}.safetensors"))
        made.folder, made._known = folder, known
        return made

    # -- what is asked ------------------------------------------------------------------------------------------------

    def _gated(self) -> list[SoRA]:
        held = [one.delta for one in held_adapter(self.model, ADAPTER).deltas]
        parts = [part for delta in held for part in (delta.deltas if isinstance(delta, Fused) else [delta])]
        return [part for part in parts if isinstance(part, SoRA)]

    @property
    def follows_rate(self) -> bool:
        """Whether thresholds move with the learning rate, whose share `fallow.condition(lr_share=...)` then tells."""
        return any(getattr(part.o, "threshold_mode", "") == "lr" for part in self._gated())

    def _chance(self) -> float | None:
        if not self._gates:
            return None
        first = torch.cat(self._gates)
        stays = torch.cat([(part.gate.detach() != 0).float().cpu() for part in self._gated()])
        if stays.std() == 0 or first.std() == 0:
            return None
        return float(torch.corrcoef(torch.stack([first, stays]))[0, 1])

    def _needs_open(self, what: str) -> None:
        if self.open is None:
            raise ConfigError(f"{what}: no task is open; call start_task(name) first")

    def _needs_none(self, what: str) -> None:
        if self.open is not None:
            raise ConfigError(f"{what}: task '{self.open}' is open; call end_task() or abandon_task() first")


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _factors(key: str, delta: Delta) -> list[tuple[str, tuple[Tensor, Tensor]]]:
    """The factors of a Delta, or of each of its blocks, without components that are exactly zero."""
    named = [(key, delta)]
    if isinstance(delta, Fused):
        ends = [sum(delta.sizes[: at + 1]) for at in range(len(delta.sizes))]
        named = [
            (f"{key}[{stop - size}:{stop}]", part)
            for part, size, stop in zip(delta.deltas, delta.sizes, ends, strict=True)
        ]
    return [(name, _cut(*part.factors())) for name, part in named]


def _cut(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    keep = (b != 0).any(0) & (a != 0).any(1)
    return b.detach()[:, keep].float().cpu().contiguous(), a.detach()[keep].float().cpu().contiguous()


def _place(name: str) -> tuple[str, slice | None]:
    """The weight's key, and which of its rows are meant."""
    match = BLOCK.fullmatch(name)
    return (name, None) if match is None else (match["key"], slice(int(match["start"]), int(match["stop"])))


def _add(matrix: Tensor, task: Task, key: str, sign: float) -> None:
    """Add a task's change of a weight to its matrix (out, in), in place."""
    for name, (b, a) in task.factors.items():
        at, rows = _place(name)
        if at == key and b.shape[1]:
            part = matrix if rows is None else matrix[rows]
            part.addmm_(b.to(matrix), a.to(matrix), alpha=sign)


def _read(file: Path) -> Task:
    tensors, header = read_tensors(file)
    try:
        if header.get("format") != FORMAT:
            raise ValueError("it is of another format")
        told = parse_json(header["fallow"])
        names = [key.removesuffix(".b") for key in tensors if key.endswith(".b")]
        factors = {name: (tensors[f"{name}.b"], tensors[f"{name}.a"]) for name in names}
        whole = {key.removesuffix(".whole"): t for key, t in tensors.items() if key.endswith(".whole")}
        task = Task(str(told["name"]), str(told["method"]), factors, whole, told["chance"])
    except (KeyError, ValueError, TypeError) as error:
        raise AdapterError(f"{file} is no task that can be read ({error}); train it anew") from None
    refuse_not_finite(file, tensors)
    return task
