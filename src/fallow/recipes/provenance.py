"""What an adapter's file says of its making, in the words of the tools that image users know.

    modelspec.*   Stability's ModelSpec 1.0.1: title, architecture, resolution, prediction type, trigger phrase, hash
    ss_*          kohya's sd-scripts: rates, steps, seed, folders, how often each tag occurs

They stand in the metadata of the safetensors file beside Fallow's own, all of them text. Nothing depends on when or
where a run was made but `modelspec.date`, the day on which it was begun.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fallow.core.content_hash import HASH
from fallow.core.errors import ConfigError, nearest
from fallow.recipes.captions import tags_of
from fallow.recipes.methods import DELTAS
from fallow.recipes.pictures import Picture, Size

SPEC = "modelspec."
# What a user may say in ModelSpec's words; all else is known from the run.
FREE_FIELDS = ("title", "description", "author", "license", "usage_hint", "tags")
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # ModelSpec's names, where it has one
# Pipelines of diffusers: ModelSpec's architecture, sd-scripts' version of the base.
ARCHITECTURES: dict[str, tuple[str, str]] = {
    "StableDiffusionXLPipeline": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    "StableDiffusion3Pipeline": ("stable-diffusion-3", "sd3"),
    "FluxPipeline": ("flux-1", "flux1"),
}
# Text widths of Stable Diffusion's UNets.
STABLE_DIFFUSION = {768: ("stable-diffusion-v1", "sd_v1"), 1024: ("stable-diffusion-v2-512", "sd_v2")}
V2_OF_VELOCITY = ("stable-diffusion-v2-768-v", "sd_v2_v")


@dataclass(frozen=True)
class Making:
    """What is known of a run when its adapter is written. `settings`: those of the run; `base`: marks of its weights.

    `rate`: the learning rate; `begun`: the day, as ISO 8601 writes it. `pictures` and `class_pictures` as trained on.
    """

    pipeline: str
    text_width: int | None
    prediction: str
    settings: Mapping[str, Any]
    rate: float
    steps: int
    sizes: Sequence[Size]
    pictures: Sequence[Picture]
    class_pictures: Sequence[Picture]
    validation_pictures: int
    base: Mapping[str, str]
    begun: str


def check_fields(fields: Mapping[str, str]) -> None:
    """ConfigError for a field that ModelSpec does not have, or that the run itself fills in."""
    for name, value in fields.items():
        if name not in FREE_FIELDS:
            raise ConfigError(f"metadata has no field '{name}'{nearest(name, FREE_FIELDS)}")
        if not value.strip():
            raise ConfigError(f"metadata: the field {name} is empty; give a text, or leave it out")


def header(making: Making) -> dict[str, str]:
    """The metadata of an adapter's file; its hash is filled in when it is written."""
    return {**model_spec(making), **training_notes(making)}


def architecture(making: Making) -> tuple[str, str]:
    """ModelSpec's architecture of the base, and sd-scripts' version of it ("" where it has no name for it)."""
    if making.pipeline in ARCHITECTURES:
        return ARCHITECTURES[making.pipeline]
    if making.pipeline == "StableDiffusionPipeline" and making.text_width in STABLE_DIFFUSION:
        second = making.text_width == 1024
        return V2_OF_VELOCITY if second and making.prediction == "v_prediction" else STABLE_DIFFUSION[making.text_width]
    return making.pipeline.removesuffix("Pipeline").lower() or "unknown", ""


def adapter_kind(settings: Mapping[str, Any]) -> str:
    """What ModelSpec puts behind the architecture: lora, or the kind of another adapter; "" for whole weights."""
    method = settings["method"]
    if method == "peft":
        return str(settings["options"].get("peft_type", "peft")).lower()
    if method in DELTAS:
        return str(method)
    return {"lora": "lora", "full": ""}.get(method, "sparse")


def model_spec(making: Making) -> dict[str, str]:
    """`modelspec.*`."""
    settings, kind = making.settings, adapter_kind(making.settings)
    width, height = Counter(making.sizes).most_common(1)[0][0]
    said = dict(settings["metadata"])
    fields = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture(making)[0] + (f"/{kind}" if kind else ""),
        "implementation": "diffusers",
        "implementation_version": f"fallow/{version('fallow')}",
        "title": f"{settings['method']} on {Path(settings['data']).name}",
        "resolution": f"{width}x{height}",
        "date": making.begun,
        "prediction_type": PREDICTIONS.get(making.prediction),
        "trigger_phrase": settings["trigger_phrase"],
        "timestep_range": _range(settings),
        **said,
    }
    return {SPEC + name: str(value) for name, value in fields.items() if value is not None} | {HASH: ""}


def _range(settings: Mapping[str, Any]) -> str | None:
    """As ModelSpec writes it, `0,1000`; none where all timesteps are trained."""
    if settings["timestep_max"] is None and not settings["timestep_min"]:
        return None
    return f"{settings['timestep_min']},{settings['timestep_max'] or 1000}"


def training_notes(making: Making) -> dict[str, str]:
    """`ss_*`, as sd-scripts names and writes them: numbers and truth values in Python's way, the rest as JSON."""
    settings, options = making.settings, making.settings["options"]
    whole = settings["batch_size"] * settings["accumulation"]
    seen = sum(picture.repeats for picture in making.pictures)
    lora = settings["method"] == "lora"
    rank = options.get("rank", options.get("r", 8)) if lora else None
    notes: dict[str, Any] = {
        "ss_base_model_version": architecture(making)[1] or None,
        "ss_sd_model_name": Path(settings["model"]).name,
        "ss_sd_model_hash": hashlib.sha256(json.dumps(dict(making.base), sort_keys=True).encode()).hexdigest()[:8],
        "ss_network_module": "networks.lora" if lora else f"fallow.{settings['method']}",
        "ss_network_dim": rank,
        "ss_network_alpha": options.get("alpha", options.get("lora_alpha", rank)) if lora else None,
        "ss_network_args": json.dumps(options, sort_keys=True) if options else None,
        "ss_learning_rate": making.rate,
        "ss_unet_lr": making.rate,
        "ss_optimizer": settings["optimizer"],
        "ss_lr_scheduler": settings["schedule"],
        "ss_lr_warmup_steps": settings["warmup"],
        "ss_max_train_steps": settings["steps"],
        "ss_steps": making.steps,
        "ss_epoch": -(-making.steps * whole // seen),
        "ss_num_train_images": seen,
        "ss_num_reg_images": sum(picture.repeats for picture in making.class_pictures),
        "ss_num_validation_images": making.validation_pictures,
        "ss_batch_size_per_device": settings["batch_size"],
        "ss_total_batch_size": whole,
        "ss_gradient_accumulation_steps": settings["accumulation"],
        "ss_gradient_checkpointing": settings["gradient_checkpointing"],
        "ss_mixed_precision": settings["precision"],
        "ss_max_grad_norm": settings["max_grad_norm"],
        "ss_seed": settings["seed"],
        "ss_noise_offset": settings["noise_offset"],
        "ss_multires_noise_iterations": settings["multires_noise_iterations"],
        "ss_multires_noise_discount": settings["multires_noise_discount"],
        "ss_ip_noise_gamma": settings["ip_noise_gamma"],
        "ss_zero_terminal_snr": settings["zero_terminal_snr"],
        "ss_min_snr_gamma": settings["min_snr"],
        "ss_debiased_estimation": settings["debiased_estimation"],
        "ss_loss_type": {"mse": "l2", "smooth-l1": "smooth_l1"}.get(settings["loss"], settings["loss"]),
        "ss_huber_c": settings["huber_delta"],
        "ss_huber_schedule": settings["huber_schedule"],
        "ss_prior_loss_weight": settings["prior_weight"],
        "ss_caption_dropout_rate": settings["caption_dropout"],
        "ss_caption_tag_dropout_rate": settings["tag_dropout"],
        "ss_shuffle_caption": settings["shuffle_caption"],
        "ss_keep_tokens": settings["keep_tokens"],
        "ss_flip_aug": settings["flip"],
        "ss_enable_bucket": settings["bucket"],
        "ss_cache_latents": True,
        "ss_resolution": str(max(making.sizes)),
        "ss_dataset_dirs": json.dumps(_folders(making.pictures)),
        "ss_reg_dataset_dirs": json.dumps(_folders(making.class_pictures)),
        "ss_tag_frequency": json.dumps(tag_frequency(making.pictures), ensure_ascii=False),
        "ss_bucket_info": json.dumps(_buckets(making.sizes)),
    }
    return {name: str(value) for name, value in notes.items() if value is not None}


def _folders(pictures: Sequence[Picture]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for picture in pictures:
        folder = found.setdefault(picture.path.parent.name, {"n_repeats": picture.repeats, "img_count": 0})
        folder["img_count"] += 1
    return found


def tag_frequency(pictures: Sequence[Picture]) -> dict[str, dict[str, int]]:
    """{folder: {tag: pictures that have it}}, the most frequent first; a caption without commas is one tag."""
    found: dict[str, Counter[str]] = {}
    for picture in pictures:
        lines = picture.caption.splitlines()
        found.setdefault(picture.path.parent.name, Counter()).update(tag for line in lines for tag in tags_of(line))
    return {folder: dict(counts.most_common()) for folder, counts in found.items()}


def _buckets(sizes: Sequence[Size]) -> dict[str, Any]:
    counts = sorted(Counter(sizes).items())
    return {"buckets": {str(at): {"resolution": list(size), "count": n} for at, (size, n) in enumerate(counts)}}
