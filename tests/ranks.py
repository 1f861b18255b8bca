"""Runs a function in several processes that train together over gloo, one thread each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(function: Callable[..., Any], *args: Any, ranks: int = 2) -> list[Any]:
    """What `function(*args)` returns (tensors, numbers, texts, nested) on each rank; what it raises is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (Path(folder), ranks, function, args), nprocs=ranks)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _rank(rank: int, folder: Path, ranks: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    try:
        torch.save(function(*args), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
