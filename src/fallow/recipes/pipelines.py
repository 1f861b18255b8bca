"""Base models: loading one, putting adapters on it, drawing pictures with it.

pipeline = load_pipeline("mini-sd")
apply_adapters(pipeline, [("runs/sara-blueprint-1/adapter", 0.8)])
pictures = generate(pipeline, ["a photo of a dress"], seeds=[0], steps=25, guidance=3.0)
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn

from fallow import assets
from fallow.core.errors import AdapterError, ConfigError, ModelError
from fallow.recipes import adapter_files, noise
from fallow.recipes.clips import strip
from fallow.recipes.families import Ask, Family, family_named, family_of
from fallow.recipes.noise import Prediction

# a tensor by which the single file of a family is known; the first that is in it
CHECKPOINTS = {
    "conditioner.embedders.1.model.ln_final.weight": "StableDiffusionXLPipeline",
    "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": "StableDiffusion3Pipeline",
    "double_blocks.0.img_attn.qkv.weight": "FluxPipeline",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "FluxPipeline",
    "model.diffusion_model.input_blocks.0.0.weight": "StableDiffusionPipeline",
}
# the same, of files that hold a part of a pipeline and no more
PARTIAL = {
    "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": "the motion modules of AnimateDiff",
    "adaln_single.emb.timestep_embedder.linear_1.weight": "the transformer of PixArt",
    "t_embedder.mlp.0.weight": "a diffusion transformer",
}
WHAT_TO_GIVE = "give 'mini-sd', a pipeline directory as diffusers saves it, a .safetensors checkpoint, or a hub id"


def best_device() -> str:
    """`cuda`, else `mps`, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def chosen_device(device: str | None) -> torch.device:
    """The device of that name, or the best there is. ConfigError where this machine has none such."""
    try:
        found = torch.device(device or best_device())
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # torch: an unknown or absent device; one it was not built for
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device={device} does not work here ({reason}); give {best_device()}, or none") from None
    return found


def load_pipeline(model: str, device: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A diffusers pipeline of a family that Fallow trains, in `dtype` on `device` (the best there is), ready to draw.

    `model`: `mini-sd`, a pipeline directory, a `.safetensors` checkpoint, or a hub id. Without safety checker and
    progress bars, in eval mode. Weights are read from safetensors only. Raises ModelError or ConfigError.
    """
    place = chosen_device(device)
    with quietly():
        pipeline = _loaded(model)
        pipeline.to(place, dtype)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipeline


def kind_of_model(model: str) -> str:
    """The diffusers pipeline class of a model, of a family that Fallow trains; found without loading it.

    Raises ModelError where the model is not there, or of another family.
    """
    if not model.strip():
        raise ModelError(f"the model has no name; {WHAT_TO_GIVE}")
    source = place_of(model)
    if source.is_file():
        kind = _kind_of_file(source)
    elif source.is_dir():
        kind = _kind_of_directory(model, source)
    elif model == "mini-sd":
        raise ModelError(f"mini-sd is not in {source}; the installation is incomplete: install Fallow again")
    elif is_hub_id(model):
        kind = _kind_on_hub(model)
    else:
        raise ModelError(f"model {model} does not exist; {WHAT_TO_GIVE}")
    family_named(kind, model)
    return kind


def place_of(model: str) -> Path:
    """Where the model lies if it lies on this machine."""
    return assets.MINI_SD if model == "mini-sd" else Path(model).expanduser()


def _loaded(model: str) -> Any:
    kind = kind_of_model(model)
    family, source = family_named(kind), place_of(model)
    try:
        if source.is_file():
            return _pipeline_class(kind).from_single_file(str(source), **family.loading)
        if source.is_dir():
            how = _how(family, source)
            return _pipeline_class(kind).from_pretrained(source, **how, local_files_only=True)
        return _pipeline_class(kind).from_pretrained(model, **_how(family, None))
    except _UNLOADABLE as error:
        if source.is_file():
            raise ModelError(
                f"model {source} cannot be loaded ({_first_line(error)}); a single file has no tokenizer and "
                "configuration, which diffusers fetches from the hub: without a connection give a pipeline directory"
            ) from None
        if source.is_dir():
            raise ModelError(
                f"model {model} cannot be loaded ({_first_line(error)}); a file is missing or cut off: copy it again"
            ) from None
        raise ModelError(_unreachable(model, error)) from None


def is_hub_id(model: str) -> bool:
    """Whether it reads like `owner/name`; whether there is such a model only the hub can tell."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith("/")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Within the block diffusers and transformers show no progress bars and say errors only."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def _kind_of_directory(model: str, folder: Path) -> str:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(f"model {model} is no pipeline: {folder} has no model_index.json; {WHAT_TO_GIVE}")
    try:
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} cannot be read ({error}); copy the model again") from None


def _kind_on_hub(model: str) -> str:
    from diffusers import DiffusionPipeline

    try:
        return str(DiffusionPipeline.load_config(model).get("_class_name", ""))
    except _UNLOADABLE as error:
        raise ModelError(_unreachable(model, error)) from None


def _unreachable(model: str, error: BaseException) -> str:
    return (
        f"model {model} is no folder here, and cannot be fetched from the hub ({_first_line(error)}); check the "
        f"name and the connection, or {WHAT_TO_GIVE}"
    )


def _kind_of_file(file: Path) -> str:
    if file.suffix != ".safetensors":
        raise ModelError(f"model {file} is no .safetensors file, and other checkpoints can run code; convert it first")
    try:
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"model {file} cannot be read ({error}); it may have been cut off: copy it again") from None
    kind = next((kind for name, kind in CHECKPOINTS.items() if name in names), None)
    if kind is not None:
        return kind
    for name, what in PARTIAL.items():
        if name in names:
            raise ModelError(
                f"model {file} holds {what} alone; give a pipeline directory, which has the other parts too"
            )
    first = f" (its first tensor is {min(names)})" if names else ""
    raise ModelError(f"model {file} is no checkpoint of a whole model{first}; an adapter is given as --adapter")


# What diffusers, transformers and huggingface_hub raise for files that are missing, broken or out of reach.
_UNLOADABLE = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _pipeline_class(kind: str) -> Any:
    import diffusers

    return getattr(diffusers, kind)


def _how(family: Family, folder: Path | None) -> dict[str, Any]:
    """Arguments of from_pretrained; of a directory that holds half-precision files alone, those."""
    how: dict[str, Any] = {**family.loading, "use_safetensors": True}
    weights = [file.name for file in (folder / family.network).glob("*.safetensors")] if folder is not None else []
    if weights and all(".fp16." in name for name in weights):
        how["variant"] = "fp16"
    return how


def apply_adapters(pipeline: Any, adapters: Sequence[tuple[str | Path, float]], *, force: bool = False) -> None:
    """Put adapters of any kinds on the pipeline's network, and on its text encoders those that change them, in place:
    base + the sum of scale x change.

    The scheduler is told what they were trained to predict, where that was said in training. All are checked before any
    weight is touched. Raises AdapterError for one that is broken or fits nothing, or was trained on another base unless
    `force`, and for adapters that were trained to predict different things.
    """
    scheduler = believing(pipeline.scheduler, adapters)
    plans = [adapter_files.prepare(trained_part(pipeline), adapters, force=force)]
    for part in dict.fromkeys(part for path, _ in adapters for part in adapter_files.other_parts(path)):
        encoder = getattr(pipeline, part, None)
        if not isinstance(encoder, nn.Module):
            raise AdapterError(
                f"an adapter changes {part}, which {type(pipeline).__name__} lacks; give the base it was trained on"
            )
        plans.append(adapter_files.prepare(encoder, adapters, force=force, part=part))
    for plan in plans:
        plan.apply()
    pipeline.scheduler = scheduler


def believing(scheduler: Any, adapters: Sequence[tuple[str | Path, float]]) -> Any:
    """The scheduler with the objective that the adapters were trained with; itself where it has that already."""
    told = {path: adapter_files.settings_of(path) for path, scale in adapters if scale}
    predictions = {path: found["prediction"] for path, found in told.items() if found.get("prediction")}
    if len(set(predictions.values())) > 1:
        said = "; ".join(f"{path}: {prediction}" for path, prediction in predictions.items())
        raise AdapterError(f"these adapters were trained to predict different things ({said}); give those of one kind")
    prediction = next(iter(predictions.values()), None)
    if prediction in get_args(Prediction) and scheduler.config.get("prediction_type", prediction) != prediction:
        scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction)
    if any(found.get("zero_terminal_snr") for found in told.values()):
        scheduler = noise.zero_terminal(scheduler)
    return scheduler


def trained_part(pipeline: Any) -> nn.Module:
    """The denoising network of a pipeline."""
    part: nn.Module = family_of(pipeline).part(pipeline)
    return part


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int = 25,
    guidance: float = 3.0,
    negative: str | None = None,
    width: int | None = None,
    height: int | None = None,
    frames: int | None = None,
) -> list[Image.Image]:
    """A picture for each prompt, from the noise of the seed beside it: whatever else is in the batch, it is the same.

    Of a model that draws clips, a strip of the clip's frames.

    (To the last bit of a pixel only if the matrix products of this machine do not depend on the batch.) The noise is
    drawn on the CPU, so that a seed means the same on every device; the global random state is not touched; parts
    that were in training mode are again afterwards. `guidance` 1 is none. `width`, `height` in pixels; None is the
    model's own. Warns of a prompt that is longer than the model reads. Raises ConfigError for sides that the
    autoencoder cannot make, or seeds that do not match the prompts.
    """
    drawn = generate_clips(
        pipeline, prompts, seeds=seeds, steps=steps, guidance=guidance, negative=negative, width=width, height=height,
        frames=frames,
    )  # fmt: skip
    return [strip(frames) for frames in drawn]


def stills(pipeline: Any, prompts: Sequence[str], **how: Any) -> list[Image.Image]:
    """As `generate`, but of each clip its middle frame: for judges, which know no clips."""
    return [frames[len(frames) // 2] for frames in generate_clips(pipeline, prompts, **how)]


def generate_clips(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int = 25,
    guidance: float = 3.0,
    negative: str | None = None,
    width: int | None = None,
    height: int | None = None,
    frames: int | None = None,
) -> list[list[Image.Image]]:
    """The frames for each prompt: one, but for models that draw clips. Arguments and errors as of `generate`."""
    if len(seeds) != len(prompts):
        raise ConfigError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one for each")
    family = family_of(pipeline)
    multiple = math.lcm(family.drawing_multiple(pipeline), 8)  # diffusers takes no sides but multiples of 8
    for name, side in (("width", width), ("height", height)):
        if side is not None and (side < multiple or side % multiple):
            below = max(multiple, side // multiple * multiple)
            raise ConfigError(f"{name}={side} is not a multiple of {multiple}; give {below} or {below + multiple}")
    most = pipeline.scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise ConfigError(f"{steps} denoising steps are impossible with this model; give 1 to {most}, 25 is usual")
    if not math.isfinite(guidance):
        raise ConfigError(f"guidance={guidance} must be a finite number; 1 is none, 3 to 8 is usual")
    check_frames(family, pipeline, frames)
    if not prompts:
        return []
    _tell_of_long_prompts(family.longest_prompts(pipeline), prompts)
    generators = [torch.Generator("cpu").manual_seed(seed % 2**63) for seed in seeds]
    ask = Ask(prompts, generators, steps, guidance, negative, width, height, frames)
    with drawing_mode(pipeline), torch.no_grad(), quietly():
        return family.draw(pipeline, ask)


def check_frames(family: Family, pipeline: Any, frames: int | None) -> None:
    """ConfigError for frames that the model cannot draw, or that are asked for of one that draws pictures."""
    most = family.frames(pipeline)
    if frames is not None and most is None:
        raise ConfigError(f"frames={frames} is for models that draw clips, not for {family.title}; leave it out")
    if frames is not None and most is not None and not 2 <= frames <= most:
        raise ConfigError(f"frames={frames} is impossible with this model; give 2 to {most}")


def _tell_of_long_prompts(readers: Iterable[tuple[Any, int]], prompts: Sequence[str]) -> None:
    """Warn of the first prompt that is longer than the model reads; diffusers would do so at every call and for all.

    Where several text encoders read it, it is too long only for all of them: what one misses another may read.
    """
    tokenizers = list(readers)
    for prompt in dict.fromkeys(prompts):
        counts = [(len(tokenizer(prompt, verbose=False).input_ids), most) for tokenizer, most in tokenizers]
        if all(count > most for count, most in counts):
            count, most = counts[-1]
            warnings.warn(
                f"the prompt '{prompt}' has {count} tokens, of which this model reads {most}; the rest is ignored",
                stacklevel=3,
            )
            return


@contextlib.contextmanager
def drawing_mode(pipeline: Any) -> Iterator[None]:
    """Within the block every part of the pipeline is in eval mode; afterwards each module is as it was."""
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    training = [module for part in parts for module in part.modules() if module.training]
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
