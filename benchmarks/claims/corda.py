"""CorDA's two starts against LoRA's, PiSSA's and MiLoRA's, on digits that turn: what is learned, what is forgotten.

python benchmarks/claims/corda.py --seeds 5

An MLP 64-128-128-10 that knows upright digits learns turned ones for 60 steps; rank 4 in all layers. "IPA" has seen the
turned training images, "KPA" the upright ones, an image a batch as in the paper, where a batch is a sample. After the
usual table comes the trade-off, of the seeds that rates are chosen by: at which target accuracy, of all rates and of 60
and 120 steps, no more than 0.1 or 0.3 of the upright accuracy is lost.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from protocol import RESULTS, SWEEP_SEEDS, Contender, Digits, Setting, adapt, arguments, compare
from torch import nn

import fallow

LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SETTING = Setting(targets="all", steps=60)
Seen = Callable[[nn.Module, Digits], Mapping[str, Any]]


def after(part: str, **options: Any) -> Seen:
    """The start once the images of this part were seen, "source" or "target"."""

    def seen(model: nn.Module, digits: Digits) -> Mapping[str, Any]:
        images = getattr(digits, part)["train"][0]
        found = fallow.probe(model, images.split(1), want={"input_covariance"}, targets=["0", "2", "4"])
        return {"start": fallow.CorDA(found, **options)}

    return seen


def with_rank(label: str, seen: Seen | None = None, **options: Any) -> Contender:
    return Contender(label, "lora", {"rank": 4, **options}, seen=seen)


CONTENDERS = [
    with_rank("LoRA, alpha 2 r", alpha=8.0),
    with_rank("PiSSA", start="pissa"),
    with_rank("MiLoRA", start="milora"),
    with_rank("CorDA IPA", after("target", mode="ipa")),
    with_rank("CorDA IPA, |A| = |B|", after("target", mode="ipa", balance="equal")),
    with_rank("CorDA KPA", after("source", mode="kpa")),
    with_rank("CorDA KPA, |A| = |B|", after("source", mode="kpa", balance="equal")),
]


def trade_off() -> list[dict[str, Any]]:
    """Means over the seeds of the sweep, for each contender, rate and length."""
    rows = []
    for contender in CONTENDERS:
        for steps in (60, 120):
            setting = dataclasses.replace(SETTING, steps=steps)
            for lr in LRS:
                runs = [adapt(contender, lr, seed, setting)[1] for seed in SWEEP_SEEDS]
                means = {key: statistics.fmean(run[key] for run in runs) for key in ("target", "forgotten")}
                rows.append({"label": contender.label, "steps": steps, "lr": lr, **means})
        own = [row for row in rows if row["label"] == contender.label]
        best = {
            lost: max((row["target"] for row in own if row["forgotten"] <= lost), default=float("nan"))
            for lost in (0.1, 0.3)
        }
        print(f"{contender.label:24}" + "".join(f"  lost <= {lost}: {best[lost]:.3f}" for lost in best), flush=True)
    return rows


if __name__ == "__main__":
    compare("corda", CONTENDERS, seeds=arguments(__doc__).seeds, lrs=LRS, setting=SETTING)
    told = {"name": "corda-trade-off", "seeds": SWEEP_SEEDS, "torch": torch.__version__, "runs": trade_off()}
    (RESULTS / "claims-corda-trade-off.json").write_text(json.dumps(told, indent=1) + "\n")
