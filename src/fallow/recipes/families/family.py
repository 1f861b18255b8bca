"""What a kind of text-to-image model knows of itself: its parts, its conditions, its objective, how it draws.

A family is a small class without state, one for each diffusers pipeline class that differs. This base is Stable
Diffusion 1.x and 2.x; the others override what is different. Conditions are tensors by name, the first axis being the
captions or pictures; `predict` gets those of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from fallow.core.errors import ConfigError
from fallow.recipes import noise
from fallow.recipes.losses import LossRules
from fallow.recipes.pictures import Picture, Size

Conditions = dict[str, Tensor]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # of LoRA on CLIP's text encoders
T5_TARGETS = ("q", "k", "v", "o")


class Latents(Protocol):
    """What the loss needs of a batch: latents (B, C, ..., h, w), what chance decided, which places count, and their
    conditions.
    """

    latents: Tensor
    drawn: noise.Draw
    mask: Tensor | None

    def given(self) -> Conditions:
        """Their conditions."""
        ...


@dataclass(frozen=True)
class Ask:
    """What a drawing is asked for: prompts (with the negative one, or none), denoising steps, guidance, sides, noise.

    `frames`: of a clip, where the family makes clips; None is 16.
    """

    prompts: Sequence[str]
    generators: Sequence[torch.Generator]
    steps: int
    guidance: float
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None

    def common(self) -> dict[str, Any]:
        """The arguments that all pipelines of diffusers share."""
        return {
            "negative_prompt": None if self.negative is None else [self.negative] * len(self.prompts),
            "num_inference_steps": self.steps, "guidance_scale": self.guidance, "width": self.width,
            "height": self.height, "generator": list(self.generators),
        }  # fmt: skip


class Family:
    """Stable Diffusion 1.x/2.x, and what every family does like it."""

    title = "Stable Diffusion 1.x/2.x"
    pipelines: tuple[str, ...] = ("StableDiffusionPipeline",)  # diffusers' classes, the first for single files
    network = "unet"  # the part that denoises, by its name in the pipeline
    network_class = "UNet2DConditionModel"
    text_encoders: tuple[str, ...] = ("text_encoder",)
    lora_targets: Sequence[str] | str = ATTENTION
    include: str | None = None  # what is trained of the network where options do not say, a pattern; None: all
    trained_encoders: tuple[str, ...] = ("text_encoder",)  # those that are trained where that is asked for
    clips = False  # whether it draws clips of frames
    loading: Mapping[str, Any] = {"safety_checker": None, "requires_safety_checker": False}

    # -- parts --------------------------------------------------------------------------------------------------------

    def part(self, pipeline: Any) -> Any:
        """The denoising network."""
        return getattr(pipeline, self.network)

    def encoders(self, pipeline: Any) -> dict[str, nn.Module]:
        """The text encoders that the pipeline has; some may be absent."""
        found = {name: getattr(pipeline, name, None) for name in self.text_encoders}
        return {name: part for name, part in found.items() if part is not None}

    def targets_alone(self) -> list[str] | str:
        """What LoRA is put on in the network, as PEFT takes it."""
        return self.lora_targets if isinstance(self.lora_targets, str) else list(self.lora_targets)

    def targets(self, pipeline: Any) -> dict[str, Sequence[str] | str]:
        """What LoRA is put on, by part; "" is the network where it stands alone."""
        own: dict[str, Sequence[str] | str] = {"": self.lora_targets, self.network: self.lora_targets}
        for name, encoder in self.encoders(pipeline).items():
            own[name] = T5_TARGETS if "T5" in type(encoder).__name__ else ENCODER_TARGETS
        return {part: targets if isinstance(targets, str) else list(targets) for part, targets in own.items()}

    def frames(self, pipeline: Any) -> int | None:
        """The most frames of a clip, where it draws clips."""
        return None

    # -- sizes --------------------------------------------------------------------------------------------------------

    def multiple(self, pipeline: Any) -> int:
        """What the sides of a training picture are multiples of, in pixels: the network halves them as it goes."""
        halvings = len(self.part(pipeline).config.block_out_channels) - 1
        return int(pipeline.vae_scale_factor) * 2**halvings

    def drawing_multiple(self, pipeline: Any) -> int:
        """The same of a drawing, as far as the pipeline takes other sides than the network was trained at."""
        return int(pipeline.vae_scale_factor)

    def side(self, pipeline: Any) -> int:
        """The model's own side of a square picture, in pixels."""
        return int(self.part(pipeline).config.sample_size) * int(pipeline.vae_scale_factor)

    # -- latents and conditions ---------------------------------------------------------------------------------------

    def scaling(self, pipeline: Any) -> tuple[float, float]:
        """(shift, scale): the network sees (latents - shift) * scale."""
        config = pipeline.vae.config
        return float(getattr(config, "shift_factor", None) or 0.0), float(config.scaling_factor)

    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        """The conditions of captions, on the pipeline's device; gradients flow where the caller lets them."""
        embedded, _ = pipeline.encode_prompt(list(captions), self.part(pipeline).device, 1, False)
        return {"text": embedded}

    def picture_conditions(self, pipeline: Any, picture: Picture, size: Size) -> Conditions:
        """What the network is told of a picture apart from its caption; without a batch axis."""
        return {}

    # -- of a configuration alone, to estimate memory -----------------------------------------------------------------

    def grid(self, config: Mapping[str, Any]) -> int:
        """What the sides of latents are multiples of in training."""
        return int(2 ** (len(config["block_out_channels"]) - 1))

    def latents(self, config: Mapping[str, Any], side: int | None) -> tuple[int, ...]:
        """The shape of a picture's latents of this side, None is the model's own, without a batch axis."""
        side = side or int(config.get("sample_size") or 64)
        return int(config["in_channels"]), side, side

    def blank(self, config: Mapping[str, Any], count: int, tokens: int) -> Conditions:
        """Conditions of the right shapes and no meaning; `tokens` are those of CLIP."""
        width = config["cross_attention_dim"]
        return {"text": torch.randn(count, tokens, int(width[0] if isinstance(width, (list, tuple)) else width))}

    # -- training -----------------------------------------------------------------------------------------------------

    def objective(self, pipeline: Any, prediction: noise.Prediction | None = None, **flow: Any) -> noise.Objective:
        """What the network is trained to predict; `prediction` where the model's scheduler says it wrongly.

        ConfigError for what is impossible with this family: `flow` are options of flow matching.
        """
        if flow := {name: value for name, value in flow.items() if value is not None}:
            name = min(flow)
            raise ConfigError(f"{name}={flow[name]} is for models of flow matching, not for {self.title}; leave it out")
        return noise.Diffusion(pipeline.scheduler, prediction)

    def predict(self, network: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """What the network says of noisy latents (B, C, ..., h, w); of the same shape."""
        predicted: Tensor = network(noisy, timesteps, conditions["text"]).sample
        return predicted

    def loss(self, network: Any, batch: Latents, objective: noise.Objective, rules: LossRules | None = None) -> Tensor:
        """The loss of a batch, a scalar in float32."""

        conditions = batch.given()

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return self.predict(network, noisy, timesteps, conditions)

        return noise.denoising_loss(predict, objective, batch.latents, batch.drawn, rules=rules, mask=batch.mask)

    # -- drawing ------------------------------------------------------------------------------------------------------

    def draw(self, pipeline: Any, ask: Ask) -> list[list[Image.Image]]:
        """The frames for each prompt: one, but for clips."""
        return [[image] for image in pipeline(list(ask.prompts), **ask.common()).images]

    def longest_prompts(self, pipeline: Any) -> Iterable[tuple[Any, int]]:
        """Tokenizers of the pipeline, each with the number of tokens that is read of a prompt."""
        tokenizer = pipeline.tokenizer
        yield tokenizer, int(tokenizer.model_max_length)
