"""The runs of a comparison over a Ray cluster: each is one task, which trains and judges in its own folder.

The folder of the comparison must be one that all nodes see under the same path, and Fallow must be installed on them. A
task is the very function that a comparison on one machine calls, so that the result does not depend on where it ran,
and what is finished is found again in its folder however the comparison was stopped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from fallow.core.errors import ConfigError
from fallow.recipes.train_config import TrainConfig

Job = tuple[TrainConfig, dict[str, Any]]


def task(settings: str, asked: str) -> str | None:
    """Train and judge one run in a worker, with as many threads as it has cores; the error where there was one."""
    import torch

    from fallow.recipes.compare import attempted, evaluation_of

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    config = TrainConfig.model_validate_json(settings)
    return attempted(config, evaluation_of(asked), json.loads(asked), Console(quiet=True))


def spread(address: str, jobs: Sequence[Job], cpus: float) -> Iterator[tuple[int, str | None]]:
    """(number of the job, its error or None) as they end, in any order.

    `address`: "local" starts Ray on this machine and ends it afterwards, "auto" joins the one that runs here, anything
    else is a cluster's address. Jobs on CUDA reserve a GPU each. Raises ConfigError where Ray is not installed or
    cannot be reached.
    """
    if not jobs:
        return
    with _ray(address) as ray:
        remote = ray.remote(task)
        waiting = {}
        for at, (config, asked) in enumerate(jobs):
            settings = config.model_copy(update={"output": config.output.absolute() if config.output else None})
            needs = {"num_cpus": cpus, "num_gpus": 1 if _on_cuda(config) else 0, "max_retries": 0}
            reference = remote.options(**needs).remote(settings.model_dump_json(), json.dumps(asked, sort_keys=True))
            waiting[reference] = at
        while waiting:
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            try:
                error = ray.get(done)
            except ray.exceptions.RayError as died:  # the worker was killed, or its machine went away
                error = f"{type(died).__name__}: {str(died).strip().splitlines()[0]}"
            yield waiting.pop(done), error


@contextlib.contextmanager
def _ray(address: str) -> Iterator[Any]:
    try:
        import ray
    except ImportError:
        raise ConfigError(f"ray={address} needs the package ray; install fallow[ray], or leave it out") from None
    if ray.is_initialized():  # by the program that called us: then it is theirs
        yield ray
        return
    told: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        told |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    elif address != "auto":
        _answers(address)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone
    os.environ.setdefault("RAY_worker_niceness", "0")  # the runs are what the machine is for; Ray would say 15
    try:
        ray.init(address=address, **told)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _unreachable(address, str(error).strip().splitlines()[0]) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _answers(address: str) -> None:
    """ConfigError where nobody listens at a cluster's address; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise _unreachable(address, str(error)) from None


def _unreachable(address: str, why: str) -> ConfigError:
    return ConfigError(f"ray={address} cannot be reached ({why}); give local, or HOST:PORT of a running cluster")


def _on_cuda(config: TrainConfig) -> bool:
    from fallow.recipes.pipelines import best_device

    return (config.device or best_device()).startswith("cuda")
