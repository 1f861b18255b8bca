"""What a run tells while it goes: metrics.jsonl, TensorBoard, and a line or a bar for whoever watches.

Losses stay on the device until `flush`, so that telling them costs no waiting in each step.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fallow.core.files import atomic_write

QUIET = 15.0  # seconds between two lines where there is no terminal
SMOOTHING = 0.98


class Journal:
    """The metrics of a run. `steps`: of the whole run; `step`: those made before, whose lines are kept."""

    def __init__(self, folder: Path, steps: int, step: int, device: torch.device, console: Console) -> None:
        self.file, self.device, self.steps = folder / "metrics.jsonl", device, steps
        keep_lines(self.file, step)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        self.watch = Watch(console, steps, step)
        self.waiting: list[tuple[int, Tensor, Tensor, float]] = []
        self.smooth: float | None = None

    def step(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Note a step; nothing is read from the device."""
        self.waiting.append((step, loss, grad_norm, lr))
        self.watch.advance(step, self.smooth)

    def flush(self) -> list[tuple[int, float, float]]:
        """Write the steps noted since the last time; returns (step, loss, grad_norm) of each."""
        if not self.waiting:
            return []
        read = torch.stack([torch.stack([loss.float(), norm.float()]) for _, loss, norm, _ in self.waiting]).tolist()
        memory = memory_now(self.device)
        lines, told = [], []
        for (step, _, _, lr), (loss, norm) in zip(self.waiting, read, strict=True):
            told.append((step, loss, norm))
            lines.append({"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "memory_bytes": memory})
            for name, value in (("loss", loss), ("lr", lr), ("grad_norm", norm)):
                self.board.add_scalar(name, value, step)
            if loss - loss == 0:
                self.smooth = loss if self.smooth is None else SMOOTHING * self.smooth + (1 - SMOOTHING) * loss
        self.board.add_scalar("memory_bytes", memory, told[-1][0])
        self._write(lines)
        self.waiting.clear()
        self.watch.memory = memory
        return told

    def event(self, event: str, step: int, **more: Any) -> None:
        """Note something that happened after a step."""
        self._write([{"event": event, "step": step, **more}])

    def validation(self, step: int, loss: float) -> None:
        """Note the loss on pictures held out."""
        self.board.add_scalar("validation_loss", loss, step)
        self._write([{"event": "validation", "step": step, "validation_loss": loss}])

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(_finite(line)) + "\n" for line in lines))

    def close(self) -> None:
        self.board.close()
        self.watch.close()


def _finite(line: dict[str, Any]) -> dict[str, Any]:
    """Not-a-number and infinity as null: strict readers refuse them."""
    return {name: None if isinstance(v, float) and v - v != 0 else v for name, v in line.items()}


def keep_lines(file: Path, step: int) -> None:
    """Leave in metrics.jsonl only what was before or at a step: what a stopped run did after its last checkpoint is
    done again.
    """
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if int(json.loads(line)["step"]) <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # half a line of a run that was killed
    with atomic_write(file) as partial:
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


class Watch:
    """A bar on a terminal; elsewhere a plain line now and then. Memory and loss are those of the last flush."""

    def __init__(self, console: Console, steps: int, step: int) -> None:
        self.console, self.steps, self.first = console, steps, step
        self.began = self.told = time.monotonic()
        self.paused = 0.0
        self.memory = 0
        self.bar: Progress | None = None
        if console.is_terminal and not console.quiet:
            self.bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(), console=console,
            )  # fmt: skip
            self.task = self.bar.add_task("training", total=steps, completed=step, figures="")
            self.bar.start()

    def advance(self, step: int, loss: float | None) -> None:
        now = time.monotonic()
        rate = (step - self.first) / max(now - self.began, 1e-9)
        figures = f"{rate:.2f} steps/s" + (f", {self.memory / 1e6:.0f} MB" if self.memory else "")
        if loss is not None:
            figures = f"loss {loss:.4f}, {figures}"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, figures=figures)
        elif now - self.told >= QUIET or step == self.steps:
            self.told = now
            self.say(f"step {step} of {self.steps}: {figures}, {(self.steps - step) / max(rate, 1e-9):.0f} s left")

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


# -- memory -----------------------------------------------------------------------------------------------------------


def memory_now(device: torch.device) -> int:
    """Bytes in use: allocated on a CUDA device, else what the process holds in main memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") or 0


def forget_peak(device: torch.device) -> None:
    """Begin anew to watch the peak, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc: what is free goes back, so that it does not count
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # elsewhere the peak is that of the process since it began
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak of the resident memory


def peak_memory(device: torch.device) -> tuple[int | None, str]:
    """Bytes at the peak since `forget_peak`, and what was measured."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "allocated on the device, at the peak of training"
    peak = _status("VmHWM")
    if peak is not None:
        return peak, "main memory of the whole process, at the peak of training"
    if sys.platform == "win32":
        return None, "not measured on this system"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "main memory of the whole process, at its peak"


def _status(name: str) -> int | None:
    """A size from Linux's /proc/self/status, in bytes."""
    try:
        with Path("/proc/self/status").open() as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:")), None)
    except OSError:
        return None
