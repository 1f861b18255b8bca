"""PixArt: a diffusion transformer (DiT) with cross-attention to T5's tokens; alpha (arXiv 2310.00426) and sigma."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fallow.recipes.families.family import Ask, Conditions, Family
from fallow.recipes.pictures import Picture, Size


class PixArt(Family):
    """Diffusion as Stable Diffusion's; T5's mask goes along, and where the network takes them (alpha at 1024 pixels)
    height, width and their ratio. A network that predicts a variance too is trained on its noise alone.
    """

    title = "PixArt"
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    network = "transformer"
    network_class = "PixArtTransformer2DModel"
    loading: Mapping[str, Any] = {}

    def multiple(self, pipeline: Any) -> int:
        return int(pipeline.vae_scale_factor) * int(self.part(pipeline).config.patch_size)

    def drawing_multiple(self, pipeline: Any) -> int:
        return self.multiple(pipeline)

    def grid(self, config: Mapping[str, Any]) -> int:
        return int(config["patch_size"])

    def blank(self, config: Mapping[str, Any], count: int, tokens: int) -> Conditions:
        found = {
            "text": torch.randn(count, 120, int(config["caption_channels"])),
            "mask": torch.ones(count, 120, dtype=torch.long),
        }
        told = config.get("use_additional_conditions")
        if config["sample_size"] == 128 if told is None else told:
            found |= {"resolution": torch.ones(count, 2), "aspect_ratio": torch.ones(count, 1)}
        return found

    def tokens(self, pipeline: Any) -> int:
        """What T5 reads of a prompt."""
        return 300 if type(pipeline).__name__ == "PixArtSigmaPipeline" else 120

    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        embedded, mask, _, _ = pipeline.encode_prompt(
            list(captions), do_classifier_free_guidance=False, device=self.part(pipeline).device,
            max_sequence_length=self.tokens(pipeline),
        )  # fmt: skip
        return {"text": embedded, "mask": mask}

    def picture_conditions(self, pipeline: Any, picture: Picture, size: Size) -> Conditions:
        if not self.part(pipeline).use_additional_conditions:
            return {}
        width, height = size
        return {
            "resolution": torch.tensor([height, width], dtype=torch.float32),
            "aspect_ratio": torch.tensor([height / width]),
        }

    def predict(self, network: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        told = {name: conditions.get(name) for name in ("resolution", "aspect_ratio")}
        predicted: Tensor = network(
            noisy, encoder_hidden_states=conditions["text"], encoder_attention_mask=conditions["mask"],
            timestep=timesteps, added_cond_kwargs=told,
        ).sample  # fmt: skip
        return predicted[:, : noisy.shape[1]]

    def draw(self, pipeline: Any, ask: Ask) -> list[list[Image.Image]]:
        how = ask.common() | {"negative_prompt": [ask.negative or ""] * len(ask.prompts)}
        drawn = pipeline(
            list(ask.prompts), **how, clean_caption=False, use_resolution_binning=False,
            max_sequence_length=self.tokens(pipeline),
        )  # fmt: skip
        return [[image] for image in drawn.images]

    def longest_prompts(self, pipeline: Any) -> Iterable[tuple[Any, int]]:
        yield pipeline.tokenizer, self.tokens(pipeline)
