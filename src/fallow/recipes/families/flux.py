"""FLUX: a transformer over packed latents and T5's tokens, a pooled CLIP embedding, flow matching."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fallow.recipes.families.family import Ask, Conditions
from fallow.recipes.families.stable_diffusion_3 import FlowFamily

PATCH = 2  # latents that are packed into one token, along each side
SIDE = 128  # latents of a side of the model's own pictures, of 1024 pixels
GUIDANCE = 1.0  # what a guidance-distilled network is told in training: none


class Flux(FlowFamily):
    """The network takes tokens (B, h/2 * w/2, 4 C) with their places, and (FLUX.1-dev) the guidance as an input.

    Drawn with a negative prompt, guidance is by a second pass of the network; else it is that input alone, and means
    nothing to a network without it (FLUX.1-schnell).
    """

    title = "FLUX"
    pipelines = ("FluxPipeline",)
    network_class = "FluxTransformer2DModel"
    text_encoders = ("text_encoder", "text_encoder_2")

    def patch(self, pipeline: Any) -> int:
        return PATCH

    def tokens(self, pipeline: Any) -> int:
        """What T5 reads of a prompt."""
        return 512 if self.part(pipeline).config.guidance_embeds else 256

    def grid(self, config: Mapping[str, Any]) -> int:
        return PATCH

    def latents(self, config: Mapping[str, Any], side: int | None) -> tuple[int, ...]:
        side = side or SIDE
        return int(config["in_channels"]) // PATCH**2, side, side

    def blank(self, config: Mapping[str, Any], count: int, tokens: int) -> Conditions:
        read = 512 if config["guidance_embeds"] else 256
        found = super().blank(config, count, tokens)
        return found | {"text": torch.randn(count, read, int(config["joint_attention_dim"]))}

    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        embedded, pooled, _ = pipeline.encode_prompt(
            list(captions), list(captions), device=self.part(pipeline).device,
            max_sequence_length=self.tokens(pipeline),
        )  # fmt: skip
        return {"text": embedded, "pooled": pooled}

    def predict(self, network: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        text = conditions["text"]
        height, width = noisy.shape[-2] // PATCH, noisy.shape[-1] // PATCH
        guidance = torch.full_like(timesteps, GUIDANCE) if network.config.guidance_embeds else None
        predicted: Tensor = network(
            hidden_states=packed(noisy), timestep=timesteps / 1000, guidance=guidance,
            pooled_projections=conditions["pooled"], encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3), img_ids=places(height, width).to(text),
        ).sample  # fmt: skip
        return unpacked(predicted, height, width)

    def draw(self, pipeline: Any, ask: Ask) -> list[list[Image.Image]]:
        second = {} if ask.negative is None else {"true_cfg_scale": ask.guidance}
        drawn = pipeline(
            list(ask.prompts), **ask.common(), **second, max_sequence_length=self.tokens(pipeline)
        )  # fmt: skip
        return [[image] for image in drawn.images]

    def longest_prompts(self, pipeline: Any) -> Iterable[tuple[Any, int]]:
        yield pipeline.tokenizer_2, self.tokens(pipeline)


def packed(latents: Tensor) -> Tensor:
    """(B, C, 2h, 2w) -> (B, h * w, 4 C): squares of two by two latents as tokens."""
    squares = latents.unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH))  # (B, C, h, 2, w, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, height * width, 4 C) -> (B, C, 2 height, 2 width)."""
    squares = tokens.unflatten(1, (height, width)).unflatten(-1, (-1, PATCH, PATCH))  # (B, h, w, C, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def places(height: int, width: int) -> Tensor:
    """(height * width, 3): 0, row and column of each token."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
