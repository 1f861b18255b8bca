"""AnimateDiff (arXiv 2307.04725): a Stable Diffusion UNet with motion modules, which draws clips of frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from fallow.recipes.families.family import ATTENTION, Ask, Conditions, Family

FRAMES = 16  # of a clip, what published motion modules were trained at


class AnimateDiff(Family):
    """Latents are clips (B, C, F, h, w). What is trained is the motion modules, unless options say otherwise."""

    title = "AnimateDiff"
    pipelines = ("AnimateDiffPipeline",)
    network_class = "UNetMotionModel"
    loading: Mapping[str, Any] = {}
    lora_targets = rf".*motion_modules\..*\.({'|'.join(name.replace('.', chr(92) + '.') for name in ATTENTION)})"
    include = r"\.motion_modules\."
    clips = True

    def latents(self, config: Mapping[str, Any], side: int | None) -> tuple[int, ...]:
        channels, height, width = super().latents(config, side)
        return channels, min(FRAMES, int(config["motion_max_seq_length"])), height, width

    def predict(self, network: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        text = conditions["text"].repeat_interleave(noisy.shape[2], 0)  # each frame has its clip's
        predicted: Tensor = network(noisy, timesteps, text).sample
        return predicted

    def frames(self, pipeline: Any) -> int:
        return int(self.part(pipeline).config.motion_max_seq_length)

    def draw(self, pipeline: Any, ask: Ask) -> list[list[Image.Image]]:
        frames = ask.frames or min(FRAMES, self.frames(pipeline))
        drawn = pipeline(list(ask.prompts), **ask.common(), num_frames=frames)
        found: list[list[Image.Image]] = drawn.frames
        return found
