"""The paper's comparison on mini-sd: SaRA against its neighbours over the five style sets, and its ablations.

    python benchmarks/evidence.py runs/evidence                   # any number of these may run side by side
    python benchmarks/evidence.py runs/evidence --summary benchmarks/results/evidence-<hardware>.json

Every method trains the same number of parameters (full fine-tuning: all) for the same steps. First a sweep of learning
rates for each method on two of the sets with seed 0; the best mean score (`recipes.compare.anchored_score`) fixes the
method's rate. Then every method at its rate, on every set, with every seed. The ablations of SaRA have its
budget and its rate. Seed goes after seed, so that what is there is balanced whenever one looks. A run is one file
OUT/<name>.json, so that what was stopped goes on where it stands.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fallow.analysis.images import vlhi
from fallow.core.files import write_json
from fallow.recipes.compare import CompareConfig, anchored_score, equal_parameters
from fallow.recipes.evaluate import Evaluation
from fallow.recipes.text_to_image import train
from fallow.recipes.train_config import TrainConfig

STYLES = ("blueprint", "bronze", "halftone", "mosaic", "sunset")
SWEPT = ("blueprint", "bronze")
SEEDS = (0, 1, 2)
STEPS, BUDGET = 300, 157_632  # the budget: 5 % of mini-sd's network
IMAGES, PRIOR = 104, 64
# label: (method, options beside the budget, learning rates to try)
VARIANTS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "sara": ("sara", {}, (3e-3, 6e-3, 1.2e-2)),
    "lora": ("lora", {}, (1e-3, 2e-3, 4e-3)),
    "shira": ("shira", {}, (1e-3, 3e-3, 9e-3)),
    "random": ("random", {}, (1e-3, 3e-3, 9e-3)),
    "largest": ("largest", {}, (1e-3, 3e-3, 9e-3)),
    "full": ("full", {}, (1e-4, 3e-4, 9e-4)),
    "sara without re-selection": ("sara", {"reselect_at": []}, (6e-3,)),
    "sara without nuclear term": ("sara", {"rank_weight": 0.0}, (6e-3,)),
    "sara without both": ("sara", {"reselect_at": [], "rank_weight": 0.0}, (6e-3,)),
}
METHODS = ("sara", "lora", "shira", "random", "largest", "full")
ABLATIONS = tuple(label for label in VARIANTS if label not in METHODS)
FIGURES = ("frechet", "kernel", "alignment", "recognised", "prior_frechet", "prior_alignment", "prior_recognised")


@cache
def evaluation(style: str) -> Evaluation:
    return Evaluation(data=style, images=IMAGES, prior_images=PRIOR)


@cache
def amount(method: str) -> dict[str, Any]:
    return equal_parameters(method, CompareConfig(methods=[method], budget=BUDGET))


def claimed(path: Path) -> bool:
    """Whether this process may do the work behind `path`; a claim of a process that is gone counts as none."""
    try:
        handle = os.open(path.with_suffix(".claim"), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        try:
            os.kill(int(path.with_suffix(".claim").read_text() or 0), 0)
            return False
        except (ProcessLookupError, ValueError, FileNotFoundError):
            path.with_suffix(".claim").unlink(missing_ok=True)
            return claimed(path)
    with os.fdopen(handle, "w") as file:
        file.write(str(os.getpid()))
    return True


def base_run(folder: Path, style: str) -> None:
    target = folder / f"base-{style}.json"
    if target.exists() or not claimed(target):
        return
    measured = evaluation(style).measure()
    measured.save(folder / "pictures" / f"base-{style}", pictures=8)
    write_json(target, measured.figures)


def run(folder: Path, label: str, style: str, lr: float, seed: int) -> None:
    target = folder / f"{name_of(label, style, lr, seed)}.json"
    if target.exists() or not claimed(target):
        return
    method, options, _ = VARIANTS[label]
    place = folder / "runs" / target.stem
    if place.exists():
        shutil.rmtree(place)
    begun = time.perf_counter()
    outcome = train(
        TrainConfig(
            data=style,
            method=method,
            options={**amount(method), **options},
            lr=lr,
            steps=STEPS,
            seed=seed,
            samples=0,
            sample_every=0,
            save_every=0,
            output=place,
        )
    )
    measured = evaluation(style).measure([(outcome.adapter, 1.0)])
    measured.save(folder / "pictures" / target.stem, pictures=8)
    kept = ("trained_parameters", "total_parameters", "seconds", "peak_memory_bytes", "adapter_bytes", "hardware")
    found = {"label": label, "style": style, "lr": lr, "seed": seed, "whole_seconds": time.perf_counter() - begun}
    found |= {name: outcome.info.get(name) for name in kept} | {name: measured.figures[name] for name in FIGURES}
    found["floor"], found["real"] = measured.figures["frechet_floor"], measured.figures["alignment_real"]
    write_json(target, found)
    shutil.rmtree(place)
    print(f"{label}, {style}, lr {lr:g}, seed {seed}: {found['frechet']:.1f} / {found['alignment']:.2f}", flush=True)


def name_of(label: str, style: str, lr: float, seed: int) -> str:
    return f"{label.replace(' ', '-')}_{style}_lr{lr:g}_seed{seed}"


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def score(folder: Path, found: dict[str, Any]) -> float:
    base = read(folder / f"base-{found['style']}.json")
    assert base is not None
    return anchored_score(found, base["frechet"], found["floor"], found["real"])


def chosen(folder: Path, label: str) -> float | None:
    """The rate with the best mean score over the swept sets; None while runs of the sweep are missing."""
    means = {}
    for lr in VARIANTS[label][2]:
        runs = [read(folder / f"{name_of(label, style, lr, 0)}.json") for style in SWEPT]
        if None in runs or any(read(folder / f"base-{style}.json") is None for style in SWEPT):
            return None
        means[lr] = statistics.fmean(score(folder, found) for found in runs if found is not None)
    return max(means, key=lambda lr: means[lr])


def work(folder: Path) -> None:
    for style in STYLES:
        base_run(folder, style)
    for seed in SEEDS:
        for labels in (METHODS, ABLATIONS):
            for label in labels if seed == SEEDS[0] else ():
                for lr in VARIANTS[label][2]:
                    for style in SWEPT:
                        run(folder, label, style, lr, seed)
            for style in STYLES:
                for label in labels:
                    while (lr := chosen(folder, label)) is None:
                        time.sleep(5)  # another process is at the last run of the sweep
                    run(folder, label, style, lr, seed)


def summary(folder: Path) -> dict[str, Any]:
    """Figures of every method over sets and seeds; VLHI within each set, over all runs at the chosen rates."""
    runs = [found for file in sorted(folder.glob("*.json")) if "label" in (found := json.loads(file.read_text()))]
    base = {style: read(folder / f"base-{style}.json") for style in STYLES}
    rates = {label: chosen(folder, label) for label in VARIANTS}
    main = [found for found in runs if found["lr"] == rates[found["label"]]]
    for style in STYLES:
        group = [found for found in main if found["style"] == style]
        if len(group) > 1:
            scores = vlhi([found["frechet"] for found in group], [found["alignment"] for found in group])
            for found, value in zip(group, scores, strict=True):
                found["vlhi"] = value
    table = {}
    for label in VARIANTS:
        rows = [found for found in main if found["label"] == label]
        if not rows:
            continue
        table[label] = {"lr": rates[label], "runs": len(rows), "trained_parameters": rows[0]["trained_parameters"]}
        for name in (*FIGURES, "vlhi", "seconds"):
            by_style = {
                style: [found[name] for found in rows if found["style"] == style and found.get(name) is not None]
                for style in STYLES
            }
            means = [statistics.fmean(values) for values in by_style.values() if values]
            within = [statistics.stdev(values) for values in by_style.values() if len(values) > 1]
            table[label][name] = statistics.fmean(means)
            table[label][f"{name}_between_sets"] = statistics.stdev(means) if len(means) > 1 else None
            table[label][f"{name}_between_seeds"] = statistics.fmean(within) if within else None
    return {
        "steps": STEPS, "budget": BUDGET, "images": IMAGES, "prior_images": PRIOR, "styles": STYLES, "seeds": SEEDS,
        "swept_on": SWEPT, "rates": {label: VARIANTS[label][2] for label in VARIANTS}, "table": table,
        "base": {style: found and {name: found[name] for name in FIGURES} for style, found in base.items()},
        "runs": runs,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--summary", type=Path, help="write the summary of what is there, and run nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.summary:
        write_json(given.summary, summary(given.folder))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    work(given.folder)


if __name__ == "__main__":
    main()
