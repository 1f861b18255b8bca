"""Stable Diffusion XL: two text encoders, a pooled embedding, and what size and crop a picture has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fallow.recipes.families.family import Conditions, Family
from fallow.recipes.pictures import Picture, Size


class StableDiffusionXL(Family):
    """As Stable Diffusion, told besides: the pooled embedding of the second encoder, and six numbers (arXiv 2307.01952,
    2.2): height and width of the picture on disk, top and left of its crop, height and width it is trained at.
    """

    title = "Stable Diffusion XL"
    pipelines = ("StableDiffusionXLPipeline",)
    text_encoders = ("text_encoder", "text_encoder_2")
    trained_encoders = text_encoders
    loading: Mapping[str, Any] = {}

    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        """An empty caption is all zeros where the pipeline takes it so for guidance, as the published models do."""
        embedded, _, pooled, _ = pipeline.encode_prompt(
            list(captions), device=self.part(pipeline).device, do_classifier_free_guidance=False
        )
        if pipeline.config.force_zeros_for_empty_prompt:
            kept = torch.tensor([bool(caption.strip()) for caption in captions], device=pooled.device)
            embedded, pooled = embedded * kept[:, None, None], pooled * kept[:, None]
        return {"text": embedded, "pooled": pooled}

    def picture_conditions(self, pipeline: Any, picture: Picture, size: Size) -> Conditions:
        width, height = size
        scale = max(width / picture.width, height / picture.height)  # resized until it covers, then cut at the centre
        top, left = round((picture.height * scale - height) / 2), round((picture.width * scale - width) / 2)
        told = (picture.height, picture.width, top, left, height, width)
        return {"time_ids": torch.tensor(told, dtype=torch.float32)}

    def blank(self, config: Mapping[str, Any], count: int, tokens: int) -> Conditions:
        pooled = int(config["projection_class_embeddings_input_dim"]) - 6 * int(config["addition_time_embed_dim"])
        return super().blank(config, count, tokens) | {
            "pooled": torch.randn(count, pooled),
            "time_ids": torch.ones(count, 6),
        }

    def predict(self, network: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        told = {"text_embeds": conditions["pooled"], "time_ids": conditions["time_ids"]}
        predicted: Tensor = network(noisy, timesteps, conditions["text"], added_cond_kwargs=told).sample
        return predicted

    def longest_prompts(self, pipeline: Any) -> Iterable[tuple[Any, int]]:
        yield pipeline.tokenizer_2, int(pipeline.tokenizer_2.model_max_length)
