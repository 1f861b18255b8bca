"""Stable Diffusion 3: a transformer over pictures and text (MMDiT), three text encoders, flow matching."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fallow.core.errors import ConfigError
from fallow.recipes.families.family import ATTENTION, Conditions, Family
from fallow.recipes.flow_matching import FlowMatching
from fallow.recipes.noise import Prediction

TOKENS = 256  # that T5 reads of a prompt, as the pipeline has it


class FlowFamily(Family):
    """What SD3 and FLUX share: a transformer without halvings, trained by flow matching."""

    network = "transformer"
    loading: Mapping[str, Any] = {}
    lora_targets = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def patch(self, pipeline: Any) -> int:
        """The side of a token, in latents."""
        return int(self.part(pipeline).config.patch_size)

    def multiple(self, pipeline: Any) -> int:
        return int(pipeline.vae_scale_factor) * self.patch(pipeline)

    def drawing_multiple(self, pipeline: Any) -> int:
        return self.multiple(pipeline)

    def side(self, pipeline: Any) -> int:
        return int(pipeline.default_sample_size) * int(pipeline.vae_scale_factor)

    def grid(self, config: Mapping[str, Any]) -> int:
        return int(config["patch_size"])

    def blank(self, config: Mapping[str, Any], count: int, tokens: int) -> Conditions:
        return {
            "text": torch.randn(count, tokens + TOKENS, int(config["joint_attention_dim"])),
            "pooled": torch.randn(count, int(config["pooled_projection_dim"])),
        }

    def objective(self, pipeline: Any, prediction: Prediction | None = None, **flow: Any) -> FlowMatching:
        if prediction is not None:
            raise ConfigError(f"prediction={prediction} is for models of diffusion; {self.title} predicts flow")
        given = {name: value for name, value in flow.items() if value is not None}
        return FlowMatching(pipeline.scheduler, self.patch(pipeline), **given)


class StableDiffusion3(FlowFamily):
    """The tokens of two CLIP encoders and of T5 (zeros where it is absent), and the pooled embeddings of the two."""

    title = "Stable Diffusion 3"
    pipelines = ("StableDiffusion3Pipeline",)
    network_class = "SD3Transformer2DModel"
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    trained_encoders = ("text_encoder", "text_encoder_2")  # T5 stays as it is

    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        some = list(captions)
        embedded, _, pooled, _ = pipeline.encode_prompt(
            some, some, some, device=self.part(pipeline).device, do_classifier_free_guidance=False,
            max_sequence_length=TOKENS,
        )  # fmt: skip
        return {"text": embedded, "pooled": pooled}

    def predict(self, network: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        predicted: Tensor = network(
            hidden_states=noisy, timestep=timesteps, encoder_hidden_states=conditions["text"],
            pooled_projections=conditions["pooled"],
        ).sample  # fmt: skip
        return predicted

    def longest_prompts(self, pipeline: Any) -> Iterable[tuple[Any, int]]:
        yield pipeline.tokenizer, int(pipeline.tokenizer_max_length)
        if pipeline.text_encoder_3 is not None:
            yield pipeline.tokenizer_3, TOKENS
