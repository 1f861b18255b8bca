"""Several processes that make one run together: which of them does what, and how they are started on one machine.

    fallow train --processes 2 ...                  starts them here, one to a device
    accelerate launch -m fallow train ...           or torchrun: started elsewhere, on one machine or several

Every process loads the model and knows every batch of the run. Of each it takes its own share of the pictures, and the
gradients are averaged before they are clipped, so the run is the one that a single process would make. The first
process alone writes files, draws and speaks.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fallow.core.distributed import average_gradients, rank, ranks
from fallow.core.errors import ConfigError
from fallow.selection.selective import Selective

REPORTS = "FALLOW_REPORTS"  # names the folder in which started processes leave what went wrong
PATIENCE = 20.0  # seconds that the others have to end after one has failed
Result = TypeVar("Result")


class Processes:
    """The processes of a run as one of them sees it; a run of a single process is the same with `count` 1."""

    def __init__(self) -> None:
        self.count, self.rank = ranks(), rank()
        # What only processes tell each other travels over gloo, so that no device has to be waited for.
        other = self.count > 1 and dist.get_backend() != "gloo"
        self.control = dist.new_group(backend="gloo") if other else None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def decide(self, action: Callable[[], Result]) -> Result:
        """What `action()` gives in the first process, in every process; so too an exception that it raises."""
        if self.count == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome = [action(), None]
            except Exception as error:  # whatever it is, the others must not wait for ever; all raise it below
                outcome = [None, error]
        dist.broadcast_object_list(outcome, 0, group=self.control)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def any(self, here: bool) -> bool:
        """Whether it is so in one of the processes."""
        if self.count == 1:
            return here
        flag = torch.tensor([int(here)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.control)
        return bool(flag)

    def share(self, pictures: int) -> tuple[int, int]:
        """Begin and end of this process's part of so many; parts differ by one at most, some may be empty."""
        return self.rank * pictures // self.count, (self.rank + 1) * pictures // self.count

    def apart(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Within the block gradients stay in the process; processes may make different numbers of backward passes."""
        return optimizer.no_sync() if self.count > 1 and isinstance(optimizer, Selective) else nullcontext()

    def average(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Give the parameters of the optimizer the mean gradient, in every process; returns the mean of the losses."""
        if self.count == 1:
            return loss
        if isinstance(optimizer, Selective):
            optimizer.synchronize()
        else:
            average_gradients(params)
        loss = loss / self.count
        dist.all_reduce(loss)
        return loss

    def scratch(self) -> Path:
        """A folder that goes with this process."""
        self._scratch = self._scratch or tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        return Path(self._scratch.name)


def join(device: str | None) -> Processes:
    """Meet the other processes of the run, where a launcher has started several; `device` as in TrainConfig.

    Raises ConfigError where `device` names a single device for all of them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and ranks() == 1:
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind not in ("cpu", "cuda"):
            raise ConfigError(
                f"device={device} is one device for {os.environ['WORLD_SIZE']} processes; give cuda (each process "
                "takes a GPU of its own) or cpu, or leave it out"
            )
        from accelerate import PartialState

        state = PartialState(cpu=kind == "cpu")
        atexit.register(state.destroy_process_group)
    return Processes()


# -- starting them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How started processes have ended: an exit code and, unless it is 0, what to say."""

    code: int
    title: str = "Error"
    message: str = ""


def started() -> bool:
    """Whether this process was started as one of several."""
    return "WORLD_SIZE" in os.environ


def check_count(processes: int, device: str | None) -> None:
    """ConfigError where so many processes cannot be started."""
    if processes < 1:
        raise ConfigError(f"processes={processes} makes no run; give 1 or more")
    there = torch.cuda.device_count()
    if device != "cpu" and there and processes > there:
        raise ConfigError(
            f"processes={processes} need a GPU each, and there {'is 1' if there == 1 else f'are {there}'}; give at "
            f"most {there}, or --device cpu"
        )


def launch(processes: int, arguments: Sequence[str], *, debug: bool = False) -> Ended:
    """Run `python -m fallow <arguments>` in so many processes on this machine and wait for them.

    An interrupt is handed on to all; they end together, after a whole step. When one fails the others are ended. The
    first process has this one's output; of the others only what ended them is told.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    common = {
        **os.environ, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    common.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    with tempfile.TemporaryDirectory() as reports:
        running = []
        try:
            for number in range(processes):
                quiet = None if number == 0 or debug else subprocess.DEVNULL
                running.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "fallow", *arguments],
                        env={**common, "RANK": str(number), "LOCAL_RANK": str(number), REPORTS: reports},
                        stdin=subprocess.DEVNULL, stdout=None if number == 0 else subprocess.DEVNULL, stderr=quiet,
                        start_new_session=True,  # a Ctrl-C comes once, through this process
                    )
                )  # fmt: skip
            with handed_on(running):
                dead = wait_for(running)
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return cause(running, dead, Path(reports))


def wait_for(running: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all have ended; returns the first that failed, or None. The others then have PATIENCE seconds."""
    failed: int | None = None
    since = 0.0
    while any(process.poll() is None for process in running):
        if failed is None:
            failed = next((number for number, process in enumerate(running) if process.poll()), None)
            since = time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            for process in running:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.05)
    return failed if failed is not None else next((n for n, process in enumerate(running) if process.returncode), None)


@contextmanager
def handed_on(running: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Within the block an interrupt of this process is one of all `running`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def hand_on(number: int, frame: Any) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    for number in former:
        signal.signal(number, hand_on)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def leave_report(title: str, message: str, code: int) -> bool:
    """Leave what went wrong for the process that started this one; False where none wants to know."""
    folder = os.environ.get(REPORTS)
    if folder is None or not Path(folder).is_dir():
        return False
    told = {"time": time.time(), "title": title, "message": message, "code": code}
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(told), encoding="utf-8")
    return True


def cause(running: Sequence[subprocess.Popen[bytes]], failed: int | None, reports: Path) -> Ended:
    """What ended the run: a process that was killed, else whichever told first; the others failed because it did."""
    if failed is None:
        return Ended(0)
    if not (reports / f"{failed}.json").exists():
        code = running[failed].returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        killed = " (the system does so where memory runs out)" if code == -signal.SIGKILL else ""
        return Ended(
            1 if code < 0 else code,
            message=f"process {failed} of {len(running)} {how}{killed}; what was saved before is kept",
        )
    every = [json.loads(file.read_text(encoding="utf-8")) for file in reports.glob("*.json")]
    first = min(every, key=lambda report: report["time"])
    return Ended(first["code"], first["title"], first["message"])
