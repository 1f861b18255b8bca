"""Do a model's smallest weights matter? The experiment of SaRA's section 3 (arXiv 2409.06633), as a tool.

    result = probe("mini-sd", shares=[0.01, 0.05, 0.1, 0.2, 0.5])

All entries of the denoising network below a threshold are set to zero, pictures are drawn and judged, and the entries
put back; for a list of thresholds. Where the figures stay flat, the entries are free to be trained: that is the
amount to give to `--threshold` or `--fraction`.

The reference is real pictures where `data` names some, else the model's own pictures from other noise (so that the row
with nothing set to zero is the floor, and not nought by construction).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from fallow import assets
from fallow.analysis.images import frechet_distance
from fallow.analysis.judges import make_judge
from fallow.analysis.small_weights import asked_thresholds, eligible, zero_small
from fallow.core.errors import ConfigError
from fallow.core.files import atomic_write
from fallow.recipes.evaluate import opened, own_prompts
from fallow.recipes.gallery import refuse_overwriting, sheet
from fallow.recipes.pictures import read_pictures
from fallow.recipes.pipelines import chosen_device, load_pipeline, stills, trained_part
from fallow.report.plots import threshold_plot

SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5)
SHOWN_PROMPTS = 6  # rows of the sheet
OTHER_NOISE = 7_000_003  # seeds of the reference pictures


@dataclass(frozen=True)
class Probe:
    """What is to be probed, and how closely."""

    model: str = "mini-sd"
    thresholds: Sequence[float] = ()
    shares: Sequence[float] = ()  # of the entries, smallest first; SHARES where neither is given
    data: str | None = None
    prompts: Sequence[str] = field(default_factory=list)
    images: int = 96
    steps: int = 25
    guidance: float = 3.0
    seed: int = 0
    include: str | None = None
    exclude: str | None = None
    vision: str | None = None
    clip: str | None = None
    device: str | None = None
    batch: int = 48
    output: Path = Path("probe")
    overwrite: bool = False


def probe(plan: Probe, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Carry it out; writes `probe.json`, `probe.png` (the plot) and `pictures.png` into `plan.output`.

    Returns `rows` (threshold, zeroed, total, share, frechet, alignment, recognised), the reference, the judge and the
    paths written. Raises ConfigError, ModelError, DataError or SelectionError before anything is drawn or written.
    """
    if plan.images < 2:
        raise ConfigError(f"images={plan.images} has no distance; give 2 or more")
    if plan.batch < 1:
        raise ConfigError(f"batch={plan.batch} is no batch; give 1 or more")
    targets = {name: plan.output / name for name in ("probe.json", "probe.png", "pictures.png")}
    refuse_overwriting(list(targets.values()), plan.overwrite)
    pipeline = load_pipeline(plan.model, device=plan.device)
    shares = list(plan.shares) or ([] if plan.thresholds else list(SHARES))
    thresholds = asked_thresholds(eligible(trained_part(pipeline), plan.include, plan.exclude), plan.thresholds, shares)
    judge = make_judge(plan.vision, plan.clip, device=str(chosen_device(plan.device)))
    prompts = list(plan.prompts) or own_prompts(plan.model, plan.vision, plan.clip)
    prompts = [prompts[at % len(prompts)] for at in range(plan.images)]

    def draw(first_seed: int) -> list[Image.Image]:
        pictures: list[Image.Image] = []
        for at in range(0, len(prompts), plan.batch):
            part = prompts[at : at + plan.batch]
            seeds = [first_seed + at + number for number in range(len(part))]
            pictures += stills(pipeline, part, seeds=seeds, steps=plan.steps, guidance=plan.guidance)
        return pictures

    if plan.data is not None:
        folder = assets.find(plan.data)
        real = read_pictures(folder / "test" if (folder / "test").is_dir() else folder, prompt="")
        reference, told = judge.features(opened(real)), f"{len(real)} real pictures of {plan.data}"
    else:
        say("drawing the reference")
        reference = judge.features(draw(plan.seed + OTHER_NOISE))
        told = f"{plan.images} pictures of the whole model from other noise"
    columns: list[list[Image.Image]] = []

    def figures(_: Any) -> Mapping[str, float | None]:
        say(f"drawing and judging, {len(columns) + 1} of {len(thresholds) + 1}")
        pictures = draw(plan.seed)
        columns.append(pictures[:SHOWN_PROMPTS])
        aligned = judge.alignment(pictures, prompts)
        distance = frechet_distance(judge.features(pictures), reference)
        return {"frechet": distance, "alignment": aligned.value, "recognised": aligned.recognised}

    rows = zero_small(
        trained_part(pipeline), figures, thresholds=thresholds, include=plan.include, exclude=plan.exclude
    )
    result = {
        "model": plan.model,
        "judge": judge.name,
        "reference": told,
        "images": plan.images,
        "seed": plan.seed,
        "steps": plan.steps,
        "guidance": plan.guidance,
        "rows": rows,
        "written": {name: str(path) for name, path in targets.items()},
    }
    _write(result, rows, columns, targets)
    return result


def _write(
    result: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Sequence[Image.Image]],
    targets: Mapping[str, Path],
) -> None:
    targets["probe.json"].parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(targets["probe.json"]) as partial:
        Path(partial).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    with atomic_write(targets["probe.png"]) as partial:
        threshold_plot(rows).savefig(partial, format="png", dpi=200)
    side_by_side = [picture for row in zip(*columns, strict=True) for picture in row]
    with atomic_write(targets["pictures.png"]) as partial:
        headings = [f"{100 * row['share']:.3g}% zero" for row in rows]
        sheet(side_by_side, len(columns), headings).save(partial, format="PNG")
