"""Judge a model with adapters: does it draw like the data, does it follow its prompts, what has it forgotten?

    result = evaluate("mini-sd", [("runs/sara-blueprint-1/adapter", 1.0)], "blueprint")

Three questions, each answered on pictures generated at fixed seeds:
  frechet           distance to the *test* half of the data (pictures that training never saw), in the judge's features
  alignment         do the pictures show what the captions ask for; `recognised` is the share that clearly does
  prior_...         the same two on prompts of the base model's own domain: how much of what it could do is left
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fallow import assets
from fallow.analysis.images import frechet_distance, kernel_distance
from fallow.analysis.judges import Aligned, GarmentJudge, Judge, make_judge
from fallow.core.errors import ConfigError, DataError
from fallow.core.files import atomic_write
from fallow.recipes import adapter_files, run_directory
from fallow.recipes.pictures import Picture, open_picture, read_pictures
from fallow.recipes.pipelines import apply_adapters, chosen_device, load_pipeline, stills

# What each base model could draw before: mini-sd's eight garments in three shades, in the words it was trained on.
GARMENT_PROMPTS = [
    f"a photo of {'' if garment == 'trousers' else 'a '}{shade} {garment}"
    for shade in ("dark", "grey", "light")
    for garment in ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker")
]
# Everyday subjects for the models of the world at large, where a CLIP or a vision model is given to judge them.
EVERYDAY_PROMPTS = [
    "a photo of a brown dog lying in the grass", "a photo of a grey cat on a windowsill", "a photo of a red bicycle",
    "a photo of a sailing boat at sea", "a photo of a mountain lake at dawn", "a photo of a city street at night",
    "a photo of a bowl of fruit on a table", "a photo of an old man reading a newspaper", "a photo of a steam train",
    "a photo of a lighthouse on a cliff", "a photo of a slice of chocolate cake", "a photo of a horse in a field",
    "a photo of a child flying a kite", "a photo of a wooden chair by a window", "a photo of a snowy forest",
    "a photo of a market stall with vegetables", "a photo of a yellow taxi", "a photo of a vase of sunflowers",
    "a photo of an owl on a branch", "a photo of a stone bridge over a river", "a photo of a cup of coffee",
    "a photo of a violin on a bed", "a photo of an astronaut on the moon", "a photo of a castle on a hill",
]  # fmt: skip
PRIOR_SEED = 7_000  # apart from the seeds of the data's own prompts


@dataclass
class Measurement:
    """The figures of one evaluation (JSON-able), and the pictures of its first seed beside their prompts."""

    figures: dict[str, Any]
    pictures: list[Image.Image]
    prompts: list[str]

    def save(self, folder: str | Path, *, pictures: int = 0) -> Path:
        """Write `evaluation.json` and the first `pictures` pictures as `picture-000.png`, ...; returns the JSON."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(self.pictures[:pictures]):
            with atomic_write(folder / f"picture-{index:03d}.png") as partial:
                picture.save(partial, format="PNG")
        target = folder / "evaluation.json"
        with atomic_write(target) as partial:
            partial.write_text(json.dumps(self.figures, indent=2) + "\n", encoding="utf-8")
        return target


@dataclass
class Evaluation:
    """A base model, real pictures and a judge, made ready once; `measure` then judges any number of adapters.

    images: pictures generated for each seed, one for each caption of the test half in turn
    prior_images: pictures generated for each seed on the prior prompts; 0 leaves prior preservation out
    repeats: how many seeds: `seed`, `seed + 1`, ...; figures are means over them, `..._spread` the standard deviation
    prior_prompts: the base model's own domain; None: what `own_prompts` takes it to be
    prior_data: real pictures of that domain to compare with; None: the base model's own pictures of the same noise
    prompt: the caption of those real pictures that have none of their own
    vision, clip: weights of other judges than the shipped GarmentNet (see `fallow.analysis.judges`)
    say: called with a line of progress

    Raises ConfigError, DataError or ModelError before anything is generated.
    """

    model: str = "mini-sd"
    data: str = "blueprint"
    images: int = 200
    prior_images: int = 96
    seed: int = 0
    repeats: int = 1
    steps: int = 25
    guidance: float = 3.0
    prior_prompts: Sequence[str] | None = None
    prior_data: str | None = None
    prompt: str | None = None
    vision: str | None = None
    clip: str | None = None
    device: str | None = None
    batch: int = 50
    say: Callable[[str], None] = lambda text: None
    notes: list[str] = field(default_factory=list, init=False)
    unseen: bool = field(default=True, init=False)  # whether the reference pictures are apart from those of training

    def __post_init__(self) -> None:
        for name, least in (
            ("images", 2), ("prior_images", 0), ("seed", 0), ("repeats", 1), ("steps", 1), ("batch", 1)
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} is too small; give {least} or more")
        if self.prior_images == 1:
            raise ConfigError("prior_images=1 has no distance; give 0 (prior preservation is left out) or 2 or more")
        self.prior_prompts = list(self.prior_prompts or []) or own_prompts(self.model, self.vision, self.clip)
        self.judge: Judge = make_judge(self.vision, self.clip, device=str(chosen_device(self.device)))
        self.real, others = self._read_real()
        if isinstance(self.judge, GarmentJudge) and any(min(p.width, p.height) > 64 for p in self.real):
            self.notes.append(
                "the garment net, which judges here, knows garments of 32x32 pixels; of larger pictures its figures "
                "say little: give weights of a vision model and of CLIP (--vision, --clip)"
            )
        self.real_features = self.judge.features(opened(self.real))
        self.real_aligned = self.judge.alignment(opened(self.real), [picture.caption for picture in self.real])
        self.floor, self.floor_kernel, self.floor_images = self._floor(others)
        self._prior_real = None
        if self.prior_data is not None:
            self._prior_real = self.judge.features(opened(read_pictures(assets.find(self.prior_data), prompt="")))
        self._prior: dict[int, tuple[torch.Tensor, Aligned]] = {}

    @property
    def prompts(self) -> list[str]:
        """One for each generated picture: the captions of the test half in turn."""
        return _in_turn([picture.caption for picture in self.real], self.images)

    def _read_real(self) -> tuple[list[Picture], list[Picture]]:
        """The reference pictures (the test half), and others of the same source for the floor (the training half)."""
        folder = assets.find(self.data)
        if (folder / "test").is_dir():
            real = read_pictures(folder / "test", self.prompt)
            others = read_pictures(folder / "train", self.prompt) if (folder / "train").is_dir() else []
        else:
            real, others = read_pictures(folder, self.prompt), []
            self.unseen = False
            self.notes.append(
                f"{folder.name} has no test half: its pictures may be those that were trained on, and a model that "
                "copies them looks good; put unseen pictures into a folder named test beside a folder named train"
            )
        if len(real) < 2:
            raise DataError(f"{folder} has {len(real)} picture to compare with; the Frechet distance needs 2 or more")
        return real, others

    def _floor(self, others: list[Picture]) -> tuple[float | None, float | None, int]:
        """Frechet and kernel distance of real and real pictures, and of how many: what no model can be asked to beat.

        As many training pictures as are generated, against the test half; without a training half, one half of the
        reference against the other (then biased upwards, having half the pictures).
        """
        if len(others) >= 2:
            some, reference = self.judge.features(opened(others[: self.images])), self.real_features
        elif len(self.real) >= 4:
            some, reference = self.real_features[0::2], self.real_features[1::2]
        else:
            self.notes.append(f"{len(self.real)} real pictures are too few for a floor of the Frechet distance")
            return None, None, 0
        return frechet_distance(some, reference), kernel_distance(some, reference), len(some)

    def _pipeline(self, adapters: Sequence[tuple[str, float]], force: bool) -> Any:
        pipeline = load_pipeline(self.model, device=self.device)
        if adapters:
            apply_adapters(pipeline, list(adapters), force=force)
        return pipeline

    def draw(self, pipeline: Any, prompts: Sequence[str], seed: int) -> list[Image.Image]:
        """A picture for each prompt; picture i of seed s starts from the same noise whatever the adapters.

        Of a model that draws clips the middle frame of each: the judges know pictures alone.
        """
        pictures: list[Image.Image] = []
        for at in range(0, len(prompts), self.batch):
            part = list(prompts[at : at + self.batch])
            seeds = [seed * 1_000_003 + at + i for i in range(len(part))]
            pictures += stills(pipeline, part, seeds=seeds, steps=self.steps, guidance=self.guidance)
            self.say(f"{len(pictures)} of {len(prompts)} pictures")
        return pictures

    def _judge_prior(self, pipeline: Any, seed: int) -> tuple[torch.Tensor, Aligned]:
        assert self.prior_prompts is not None
        prompts = _in_turn(self.prior_prompts, self.prior_images)
        pictures = self.draw(pipeline, prompts, PRIOR_SEED + seed)
        return self.judge.features(pictures), self.judge.alignment(pictures, prompts)

    def measure(self, adapters: Sequence[tuple[str | Path, float]] = (), *, force: bool = False) -> Measurement:
        """Generate with the adapters (none: the base model) at every seed, and judge.

        Raises AdapterError for a broken adapter, or one of another base unless `force`.
        """
        begun = time.perf_counter()
        named = [(str(path), float(scale)) for path, scale in adapters]
        sizes = [adapter_size(path) for path, _ in named]
        pipeline = self._pipeline(named, force)
        seeds = [self.seed + i for i in range(self.repeats)]
        if self.prior_images:
            missing = [seed for seed in seeds if seed not in self._prior]
            base = (self._pipeline([], force) if named else pipeline) if missing else None
            self._prior.update({seed: self._judge_prior(base, seed) for seed in missing})
        prompts = self.prompts
        by_seed: list[dict[str, Any]] = []
        first: list[Image.Image] = []
        for seed in seeds:
            pictures = self.draw(pipeline, prompts, seed)
            first = first or pictures
            features, aligned = self.judge.features(pictures), self.judge.alignment(pictures, prompts)
            figures: dict[str, Any] = {
                "seed": seed,
                "frechet": frechet_distance(features, self.real_features),
                "kernel": kernel_distance(features, self.real_features),
                "alignment": aligned.value,
                "recognised": aligned.recognised,
                "aligned_images": aligned.judged,
                "alignment_reason": aligned.reason,
            }
            if self.prior_images:
                base_features, base_aligned = self._prior[seed]
                prior_features, prior = self._judge_prior(pipeline, seed) if named else self._prior[seed]
                reference = base_features if self._prior_real is None else self._prior_real
                figures |= {
                    "prior_frechet": frechet_distance(prior_features, reference),
                    "prior_alignment": prior.value,
                    "prior_recognised": prior.recognised,
                    "prior_alignment_base": base_aligned.value,
                    "prior_recognised_base": base_aligned.recognised,
                    "prior_alignment_reason": prior.reason,
                }
            by_seed.append(figures)
        result = {
            "model": self.model,
            "adapters": [{"path": path, "scale": scale} for path, scale in named],
            "data": self.data,
            "judge": self.judge.name,
            "images": self.images,
            "reference_images": len(self.real),
            "reference_unseen": self.unseen,
            "prior_images": self.prior_images,
            "prior_data": self.prior_data,
            "prior_reference": None if not self.prior_images else self.prior_data or "the base model's own pictures",
            "seeds": seeds,
            "steps": self.steps,
            "guidance": self.guidance,
            **_over_seeds(by_seed),
            "frechet_floor": self.floor,
            "kernel_floor": self.floor_kernel,
            "floor_images": self.floor_images,
            "alignment_real": self.real_aligned.value,
            "recognised_real": self.real_aligned.recognised,
            "trained_parameters": sum(count for count, _ in sizes),
            "adapter_bytes": sum(size for _, size in sizes),
            "seconds": time.perf_counter() - begun,
            "by_seed": by_seed,
            "notes": [*self.notes, *_reasons(by_seed, self.prior_images)],
        }
        return Measurement(result, first, prompts)


def evaluate(
    model: str = "mini-sd",
    adapters: Sequence[tuple[str | Path, float]] = (),
    data: str = "blueprint",
    *,
    images: int = 200,
    prior_images: int = 96,
    seed: int = 0,
    repeats: int = 1,
    steps: int = 25,
    guidance: float = 3.0,
    prior_prompts: Sequence[str] | None = None,
    prior_data: str | None = None,
    prompt: str | None = None,
    vision: str | None = None,
    clip: str | None = None,
    device: str | None = None,
    batch: int = 50,
    force: bool = False,
    output: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Judge `model` with `adapters` [(path, scale), ...] on the test half of `data`; arguments as of `Evaluation`.

    Returns the figures (JSON-able): `frechet`, `kernel`, `alignment`, `recognised`, `prior_frechet`, `prior_alignment`,
    `prior_recognised`, each the mean over the seeds with its `..._spread` (None for one seed); `frechet_floor` (real
    against real), `alignment_real`, `images`, `reference_images`, `trained_parameters`, `adapter_bytes`, `seconds`,
    `by_seed`, and `notes`: everything that was left out, with the reason. What cannot be told is None, never a number.
    `output`: a folder for `evaluation.json` and the pictures.

    Raises ConfigError, DataError, ModelError or AdapterError before anything is generated.
    """
    if output is not None:
        run_directory.make(Path(output))
    evaluation = Evaluation(
        model=model, data=data, images=images, prior_images=prior_images, seed=seed, repeats=repeats, steps=steps,
        guidance=guidance, prior_prompts=prior_prompts, prior_data=prior_data, prompt=prompt, vision=vision, clip=clip,
        device=device, batch=batch, say=say,
    )  # fmt: skip
    measured = evaluation.measure(adapters, force=force)
    if output is not None:
        measured.save(output, pictures=images)
    return measured.figures


def own_prompts(model: str, vision: str | None, clip: str | None) -> list[str]:
    """Prompts of a base model's own domain: garments for mini-sd, and wherever the garment net judges (it knows nothing
    else, and what it judges is likely made from mini-sd); everyday subjects where a model of the world does."""
    return GARMENT_PROMPTS if model == "mini-sd" or (vision is None and clip is None) else EVERYDAY_PROMPTS


def opened(pictures: Sequence[Picture]) -> list[Image.Image]:
    """The pictures' pixels, read."""
    return [open_picture(picture.path) for picture in pictures]


def adapter_size(path: str | Path) -> tuple[int, int]:
    """Trained parameters and bytes on disk of an adapter (a directory, or one safetensors file)."""
    return adapter_files.adapter_size(path)


def _in_turn(items: Sequence[str], count: int) -> list[str]:
    return [items[i % len(items)] for i in range(count)]


def _over_seeds(by_seed: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of every figure; None where any seed could not tell."""
    out: dict[str, Any] = {}
    for name in by_seed[0]:
        values = [figures[name] for figures in by_seed]
        if name == "seed" or name.endswith("_reason"):
            continue
        told = all(value is not None for value in values)
        out[name] = statistics.fmean(values) if told else None
        out[f"{name}_spread"] = statistics.stdev(values) if told and len(values) > 1 else None
    return out


def _reasons(by_seed: list[dict[str, Any]], prior_images: int) -> list[str]:
    reasons = {f"alignment: {figures['alignment_reason']}" for figures in by_seed if figures["alignment_reason"]}
    if not prior_images:
        reasons.add("prior preservation was not measured (prior_images=0)")
    reasons |= {
        f"prior alignment: {figures['prior_alignment_reason']}"
        for figures in by_seed
        if figures.get("prior_alignment_reason")
    }
    return sorted(reasons)
