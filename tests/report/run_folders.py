"""A run and a comparison as they lie on disk, made by hand: the report knows nothing but these files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, width: int = 64, height: int = 64, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_run(folder: Path, steps: int = 40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text('model = "mini-sd"\ndata = "blueprint"\nmethod = "sara"\nsteps = 40\n')
    for seed, name in enumerate(("before", "after", "examples", "step-000010", "step-000020")):
        picture(folder / "samples" / f"{name}.png", seed=seed)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = {"step": step, "loss": 0.2 + math.exp(-step / 9), "lr": 5e-4, "memory_bytes": 8e8, "grad_norm": 0.5}
            file.write(json.dumps(line) + "\n")
        file.write(json.dumps({"event": "reselect", "step": 20, "kept": 25, "of": 100}) + "\n")
    run = {
        "method": "sara", "model": "mini-sd", "data": "blueprint", "command": "fallow train --data blueprint",
        "steps": steps,
        "trained_parameters": 1300, "total_parameters": 26000, "seconds": 192.4, "seconds_per_step": 0.384,
        "peak_memory_bytes": 951_000_000, "adapter_bytes": 5200, "threshold": 2e-3, "status": "finished",
        "trained_where": {
            "conv_in.weight": [100, 1000],
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": [200, 5000],
            "down_blocks.0.resnets.0.conv1.weight": [600, 10000],
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": [400, 10000],
        },
        "hardware": {"processor": "a processor", "cores": 2}, "versions": {"torch": "2.13.0"},
        "prompts": ["a photo of a coat", "a photo of a dress"],
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def change(folder: Path, name: str = "run.json", **values: object) -> None:
    """Set (or, with None, remove) entries of a JSON file of the folder."""
    found = json.loads((folder / name).read_text())
    for key, value in values.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = value
    (folder / name).write_text(json.dumps(found))


FIGURES = ("frechet", "alignment", "recognised", "prior_frechet", "prior_alignment", "prior_recognised")


def make_comparison(folder: Path) -> Path:
    """Three methods, two seeds; the third method failed at every rate."""
    values = {"sara": [(6.0, 0.9), (7.0, 0.86)], "lora": [(9.0, 0.93), (9.4, 0.95)]}
    methods = []
    for series, name in enumerate(("sara", "lora", "full")):
        runs = []
        for seed, (frechet, aligned) in enumerate(values.get(name, [])):
            run = make_run(folder / "runs" / f"{name}-{seed}")
            for i in range(3):
                picture(run / "evaluation" / f"picture-{i:03d}.png", 32, 32, seed=i)
            told = dict(zip(FIGURES, (frechet, aligned, 0.9, 1.5, 0.8, 0.8), strict=True))
            runs.append({"lr": 1e-3, "seed": seed, "status": "finished", "error": None, "folder": f"runs/{name}-{seed}",
                         "seconds": 20.0, "vlhi": 1.0 + 0.1 * seed, **told})  # fmt: skip
        if runs:
            sweep = [{**runs[0], "score": 1.6, "chosen": True}]
            sweep.append(
                {**runs[0], "lr": 3e-3, "score": 1.2, "chosen": False, "frechet": 8.0, "folder": f"runs/{name}-x"}
            )
            mean = {k: float(np.mean([r[k] for r in runs])) for k in FIGURES}
        else:
            sweep = [{"lr": 1e-3, "seed": 0, "status": "failed", "error": "RuntimeError: <out of memory>",
                      "score": None, "folder": f"runs/{name}-x", "chosen": False,
                      **dict.fromkeys(FIGURES)}]  # fmt: skip
            mean = dict.fromkeys(FIGURES)
        methods.append(
            {
                "method": name, "label": name, "series": series, "lr": 1e-3 if runs else None, "sweep": sweep,
                "runs": runs,
                "failed": 0 if runs else 1, "trained_parameters": 1300.0 * (1 + series) if runs else None,
                "total_parameters": 26000.0, "trained_share": 0.05, "seconds": 20.0, "seconds_per_step": 0.38,
                "peak_memory_bytes": 9.5e8, "adapter_bytes": 5200.0, "vlhi": 1.8 - series * 0.5 if runs else None,
                "vlhi_spread": 0.1 if runs else None, "vlhi_by_seed": [1.7, 1.9] if runs else [],
                **mean, "frechet_spread": 0.5 if runs else None, "alignment_spread": 0.02 if runs else None,
                "prior_frechet_spread": 0.1 if runs else None,
            }
        )  # fmt: skip
    for kind in ("real", "base"):
        picture(folder / kind / "picture-000.png", 32, 32)
    result = {
        "status": "finished", "finished": 6, "planned": 7,
        "config": {"model": "mini-sd", "data": "blueprint", "steps": 40, "seeds": [0, 1], "budget": 1300,
                   "search_seeds": 1, "select_by": "anchored", "methods": ["sara", "lora", "full"]},
        "judge": "garment net", "images": 64, "reference_images": 100, "floor_images": 64, "frechet_floor": 1.1,
        "alignment_real": 0.91, "recognised_real": 0.95, "prior_reference": "the base model's own pictures",
        "prompts": ["a photo of a coat"], "notes": [],
        "base": {"frechet": 30.0, "alignment": 0.88, "recognised": 0.9, "prior_frechet": 0.0, "prior_alignment": 0.9},
        "methods": methods,
    }  # fmt: skip
    (folder / "comparison.json").write_text(json.dumps(result))
    return folder
