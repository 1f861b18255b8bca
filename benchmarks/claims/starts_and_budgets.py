"""Starts and budgets of ranks on equal terms: digits that turn, a real encoder that sorts WordNet glosses.

    python benchmarks/claims/starts_and_budgets.py --on digits
    python benchmarks/claims/starts_and_budgets.py --on glosses --wordnet /usr/share/wordnet    # see glosses.py
    python benchmarks/claims/starts_and_budgets.py --on glosses --table

Each contender has its own learning rate, the best by held-out data (digits: of five on three seeds; glosses: of three
on one, more while the best lies at an edge), and is run with it on other seeds. Scale s = 1 and the mean rank are the
same for all. `set-up`: processor seconds of the probe and of making the adapter, and the most memory that the two had
at one time beyond the model (allocator's events; seed 0). Runs on glosses are written at once; processes may share the
work by --contenders.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from glosses import BATCH, LENGTH, STEPS, Task
from protocol import RESULTS, Contender, Digits, Setting, compare
from torch import nn

import fallow
from fallow.core import schedule

RANK, PROBED = 4, 8  # batches that a probe sees
PCA = {"components": 2 * RANK, "rank": RANK}
FILE = RESULTS / "claims-starts-and-budgets-glosses.json"
LRS, SWEEP_SEED, EDGES = (1e-3, 3e-3, 1e-2), 1000, (1e-4, 3e-1)
Prepare = Callable[["Seen"], Mapping[str, Any]]


@dataclass
class Seen:
    """What a contender may look at before it starts: the network, some batches, the loss, a short training of all."""

    model: nn.Module
    batches: Sequence[Any]
    targets: Any
    tune: Callable[[nn.Module], None]

    def probe(self, *want: str, **options: Any) -> Any:
        return fallow.probe(self.model, self.batches, want=set(want), targets=self.targets, **options)

    def tuned(self) -> dict[str, Any]:
        model = copy.deepcopy(self.model)
        self.tune(model)
        return model.state_dict()


@dataclass(frozen=True)
class One:
    """A contender: `prepare` gives what `fallow.attach` is told of start and budget. `lrs`: rates to begin with."""

    label: str
    method: str = "lora"
    options: Mapping[str, Any] = field(default_factory=lambda: {"rank": RANK})
    prepare: Prepare = lambda seen: {}
    lrs: tuple[float, ...] = LRS


def eva(seen: Seen, **options: Any) -> dict[str, Any]:
    """Both parts of EVA from one probe, at the largest rank that a layer may get."""
    found = seen.probe("activation", **PCA)
    return {"start": fallow.EVA(found, **options), "budget": fallow.EVARanks(found)}


def contribution(seen: Seen) -> dict[str, Any]:
    return {"budget": fallow.CoLoRARanks(seen.probe("contribution", tuned=seen.tuned(), max_batches=1, points=8))}


XS, WIDE = {"rank": 8}, (3e-3, 1e-2, 3e-2)
EVERY = [
    One("LoRA, its own start"),
    One("LoRA, Gaussian", prepare=lambda seen: {"start": "gaussian"}),
    One("LoRA, orthogonal", prepare=lambda seen: {"start": "orthogonal"}),
    One("LoRA, PiSSA", prepare=lambda seen: {"start": "pissa"}),
    One("LoRA, MiLoRA", prepare=lambda seen: {"start": "milora"}),
    One("LoRA, OLoRA", prepare=lambda seen: {"start": "olora"}),
    One("LoRA, LoRA-GA", prepare=lambda seen: {"start": fallow.LoRAGA(seen.probe("gradient"), gamma=64.0)}),
    One("LoRA, CorDA ipa", prepare=lambda seen: {"start": fallow.CorDA(seen.probe("input_covariance"))}),
    One("LoRA, CorDA kpa", prepare=lambda seen: {"start": fallow.CorDA(seen.probe("input_covariance"), mode="kpa")}),
    One("LoRA, EVA start", prepare=lambda seen: {"start": fallow.EVA(seen.probe("activation", **PCA))}),
    One("DoRA, its own start", "dora"),
    One("DoRA, PiSSA", "dora", prepare=lambda seen: {"start": "pissa"}),
    One("DoRA, LoRA-GA", "dora", prepare=lambda seen: {"start": fallow.LoRAGA(seen.probe("gradient"), gamma=64.0)}),
    One("DoRA, EVA start", "dora", prepare=lambda seen: {"start": fallow.EVA(seen.probe("activation", **PCA))}),
    One("LoRA-XS r=8, its own start", "lora-xs", XS, lrs=WIDE),
    One(
        "LoRA-XS r=8, LoRA-SB",
        "lora-xs",
        XS,
        lambda seen: {"start": fallow.LoRASB(seen.probe("gradient"), lr=1e-3)},
        WIDE,
    ),
    One("LoRA, EVA ranks", prepare=lambda seen: {"budget": fallow.EVARanks(seen.probe("activation", **PCA))}),
    One("LoRA, EVA start and ranks", prepare=eva),
    One("LoRA, LaMDA++ ranks", prepare=lambda seen: {"budget": fallow.LaMDARanks(seen.probe("spectrum"))}),
    One("LoRA, CoLoRA ranks", prepare=contribution),
    One("LoRA, IncreLoRA ranks", prepare=lambda seen: {"budget": "increlora"}),
    One("AdaLoRA's form, its own start", "adalora"),
    One("AdaLoRA's form, AdaLoRA ranks", "adalora", prepare=lambda seen: {"budget": "adalora"}),
    One("DoRA, EVA ranks", "dora", prepare=lambda seen: {"budget": fallow.EVARanks(seen.probe("activation", **PCA))}),
]


# -- digits -----------------------------------------------------------------------------------------------------------


def on_digits(chosen: Sequence[One], seeds: int, name: str, setting: Setting, note: str) -> None:
    def seen_by(one: One) -> Callable[[nn.Module, Digits], Mapping[str, Any]]:
        def look(model: nn.Module, data: Digits) -> Mapping[str, Any]:
            x, y = data.target["train"]
            batches = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 64 * PROBED, 64)]
            kinds = nn.Linear | nn.Conv2d
            layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
            layers = layers if setting.targets == "all" else layers[:-1]

            def tune(copied: nn.Module) -> None:
                optimizer = torch.optim.Adam(copied.parameters(), lr=1e-3)
                for own_x, own_y in batches * 4:
                    nn.functional.cross_entropy(copied(own_x), own_y).backward()
                    optimizer.step()
                    optimizer.zero_grad()

            return one.prepare(Seen(model, batches, layers, tune))

        return look

    contenders = [Contender(one.label, one.method, dict(one.options), seen=seen_by(one)) for one in chosen]
    compare(name, contenders, seeds=seeds, setting=setting, note=f"{note}; starts and budgets see 512 turned digits")


# -- glosses ----------------------------------------------------------------------------------------------------------

LAYERS = r"encoder\.encoder\..*(query|key|value|dense)"


def prepared(one: One, task: Task, seed: int) -> nn.Module:
    model = task.fresh(seed)
    rows = task.parts(seed)["train"]
    batches = list(task.batches(rows, PROBED, seed + 5))

    def tune(copied: nn.Module) -> None:
        optimizer = torch.optim.Adam(copied.parameters(), lr=1e-4)
        for batch in batches:
            copied(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    told = one.prepare(Seen(model, batches, LAYERS, tune))
    torch.manual_seed(seed + 1)
    fallow.attach(model, one.method, LAYERS, seed=seed, **one.options, **told)
    model.head.requires_grad_(True)
    return model


def gloss_run(one: One, task: Task, lr: float, seed: int) -> dict[str, Any]:
    task.fresh(seed)
    begun = time.process_time()
    model = prepared(one, task, seed)
    setup = time.process_time() - begun
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.Adam(params, lr=lr)
    schedule.resolve(model, STEPS)
    begun = time.process_time()
    for step, batch in enumerate(task.batches(task.parts(seed)["train"], STEPS, seed + 2)):
        model.train()
        for group in optimizer.param_groups:  # linear, as in the papers, after a tenth of warm-up
            group["lr"] = lr * min((step + 1) / (STEPS // 10), 1 - step / STEPS)
        model(**batch).loss.backward()
        optimizer.step()
        fallow.step(model)
        optimizer.zero_grad()
    seconds = time.process_time() - begun
    part = "held out" if seed == SWEEP_SEED else "test"
    return {
        "contender": one.label, "lr": lr, "seed": seed, "accuracy": task.accuracy(model, part, seed),
        "trained": sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "head" not in name),
        "setup_seconds": round(setup, 2), "seconds": round(seconds, 1), "load": os.getloadavg()[0],
    }  # fmt: skip


def setup_peak(one: One, task: Task) -> int:
    """The most bytes alive at one time while the contender is made, beyond those of the model."""
    task.fresh(0)
    gc.collect()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        prepared(one, task, 0)
    alive = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    model = sum(tensor.numel() * tensor.element_size() for tensor in task.start(0).parameters())
    return peak - model


def done() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"runs": [], "peaks": {}}


def keep(row: dict[str, Any] | None = None, peaks: Mapping[str, int] | None = None) -> None:
    with FILE.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        held = done()
        said = {
            "hardware": "AMD EPYC VM, CPU, one thread a run", "torch": torch.__version__,
            "setting": {"steps": STEPS, "batch": BATCH, "length": LENGTH, "rank": RANK, "probed batches": PROBED},
            "peaks": {**held["peaks"], **(peaks or {})}, "runs": [*held["runs"], *([row] if row else [])],
        }  # fmt: skip
        temporary = FILE.with_suffix(".tmp")
        temporary.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        temporary.replace(FILE)


def on_glosses(chosen: Sequence[One], task: Task, seeds: int) -> None:
    for one in chosen:
        mine = [row for row in done()["runs"] if row["contender"] == one.label]
        swept = {row["lr"]: row["accuracy"] for row in mine if row["seed"] == SWEEP_SEED}
        due = [lr for lr in one.lrs if lr not in swept]
        while due:
            for lr in due:
                row = gloss_run(one, task, lr, SWEEP_SEED)
                keep(row)
                swept[lr] = row["accuracy"]
            due = _beyond(swept)
        best = max(swept, key=lambda lr: swept[lr])
        for seed in range(seeds):
            if not any(row["seed"] == seed and row["lr"] == best for row in mine):
                keep(gloss_run(one, task, best, seed))
        if one.label not in done()["peaks"]:
            keep(peaks={one.label: setup_peak(one, task)})
        print(one.label, best, swept, flush=True)


def _beyond(swept: Mapping[float, float]) -> list[float]:
    """The next rate, where the best is at an edge."""
    rates = sorted(swept)
    best = max(rates, key=lambda lr: swept[lr])
    steps = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
    at = steps.index(best)
    if best == rates[0] and best > EDGES[0]:
        return [steps[at - 1]]
    return [steps[at + 1]] if best == rates[-1] and best < EDGES[1] else []


def gloss_table() -> None:
    held = done()
    print("| start, budget | rate | accuracy | seeds | trained | set-up, s | set-up, MB more | training, s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for one in EVERY:
        rows = [row for row in held["runs"] if row["contender"] == one.label and row["seed"] != SWEEP_SEED]
        swept = [row["lr"] for row in held["runs"] if row["contender"] == one.label and row["seed"] == SWEEP_SEED]
        if not rows:
            continue
        scores = [row["accuracy"] for row in rows]
        spread = statistics.stdev(scores) if len(scores) > 1 else float("nan")
        edge = "*" if rows[0]["lr"] in (min(swept), max(swept)) else ""
        peak = f"{held['peaks'][one.label] / 1e6:.0f}" if one.label in held["peaks"] else ""
        print(
            f"| {one.label} | {rows[0]['lr']:g}{edge} | {statistics.mean(scores):.3f} ± {spread:.3f} | {len(rows)} "
            f"| {statistics.mean(row['trained'] for row in rows):,.0f} "
            f"| {statistics.mean(row['setup_seconds'] for row in rows):.1f} | {peak} "
            f"| {statistics.mean(row['seconds'] for row in rows):.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--on", choices=("digits", "glosses"), required=True)
    parser.add_argument("--contenders", help="labels, separated by semicolons; all by default")
    parser.add_argument("--seeds", type=int, help="5 for digits and 3 for glosses by default")
    parser.add_argument("--encoder", type=Path, help="the encoder's folder, in place of the installed package")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--table", action="store_true", help="show what has been run on glosses")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.table:
        gloss_table()
        return
    labels = given.contenders.split(";") if given.contenders else [one.label for one in EVERY]
    chosen = [one for one in EVERY if one.label in labels]
    if given.on == "digits":
        seeds, budgets = given.seeds or 5, [one for one in chosen if " ranks" in one.label or "its own" in one.label]
        starts = [one for one in chosen if " ranks" not in one.label]
        budgets = [one for one in budgets if one.method != "lora-xs"]
        note = "rank 4 (LoRA-XS 8), s = 1, the two hidden layers of the MLP"
        if starts:
            on_digits(starts, seeds, "starts-digits", Setting(steps=150), note)
        note = "mean rank 4, s = 1, all six layers of an MLP 64-128-96-96-64-32-10"
        on_digits(budgets, seeds, "budgets-digits", Setting(net="deep", targets="all", steps=150), note)
    else:
        on_glosses(chosen, Task(given.encoder, given.wordnet), given.seeds or 3)


if __name__ == "__main__":
    main()
