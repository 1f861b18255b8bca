"""What each start costs before the first step: seconds and bytes for one layer, one thread.

python benchmarks/starts_setup.py

Rank 16 in a layer of 768 x 3,072 and one of 4,096 x 4,096, random weights and gradients. Seconds: the median of three,
of the start alone, its statistics being there. Bytes: the peak of what is alive during it, as multiples of the weight.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fallow
from fallow.core.delta import Site
from fallow.core.starting import STARTS, Start
from fallow.core.statistics import LayerStatistics, Statistics
from fallow.core.views import view_of
from fallow.starts.pissa import PiSSA

RANK, REPEATS = 16, 3
SHAPES = ((768, 3072), (4096, 4096))
RESULTS = Path(__file__).parent / "results"


def starts(out: int, inner: int) -> dict[str, Start]:
    gradient = torch.randn(out, inner)
    found = Statistics({"layer": LayerStatistics((out, inner), gradient=gradient, fisher=gradient.square())}, 1)
    plain = {name: STARTS[name]() for name in ("gaussian", "orthogonal", "olora", "pissa", "milora")}
    return {
        **plain,
        "pissa, exact": PiSSA(exact=True),
        "lora-ga": fallow.LoRAGA(found),
        "lora-sb": fallow.LoRASB(found, 1e-3),
        "fila": fallow.FILA(found, found),
    }


def peak(action: Callable[[], object]) -> int:
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def main() -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for out, inner in SHAPES:
        torch.manual_seed(0)
        layer = nn.Linear(inner, out, bias=False)
        site = Site("layer", view_of(layer), lambda layer=layer: layer.weight, nn.Module())
        for name, start in starts(out, inner).items():
            if name == "pissa, exact" and out > 1024:
                continue  # minutes
            seconds = []
            for _ in range(REPEATS):
                before = time.perf_counter()
                start.pair(site, RANK, 1.0)
                seconds.append(time.perf_counter() - before)
            held = peak(lambda start=start, site=site: start.pair(site, RANK, 1.0)) / (4 * out * inner)
            rows.append({"start": name, "shape": [out, inner], "seconds": statistics.median(seconds), "weights": held})
            print(f"{out:5} x {inner:<5} {name:14} {rows[-1]['seconds']:8.3f} s {held:6.2f} weights", flush=True)
    RESULTS.mkdir(exist_ok=True)
    told = {"rank": RANK, "torch": torch.__version__, "threads": 1, "rows": rows}
    (RESULTS / "starts-setup.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
