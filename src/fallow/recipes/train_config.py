"""What a run is made from: every setting of `fallow train`, checked when it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fallow.core.errors import ConfigError
from fallow.recipes.flow_matching import Density, Weighting
from fallow.recipes.low_memory import BasePrecision, settle
from fallow.recipes.methods import check_options
from fallow.recipes.noise import Prediction

# What may be another when a run is resumed: it does not touch what was computed so far.
FREE = {
    "resume", "output", "steps", "device", "save_every", "keep", "log_every",
    "samples", "sample_prompts", "sample_every", "sample_steps", "guidance",
}  # fmt: skip


class TrainConfig(BaseModel):
    """What to train, on what, how; each field is a flag of `fallow train`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str = Field("mini-sd", description="Base model: mini-sd, a pipeline directory, or a hub id.")
    data: str = Field("blueprint", description="Shipped style set, or a folder of pictures (or with train/ in it).")
    prompt: str | None = Field(None, description="Caption of the pictures that have none of their own.")
    method: str = Field(
        "sara", description="sara, shira, largest, random, lt-sft, lora, peft (any PEFT config) or full."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="The method's own arguments.")
    lr: float | None = Field(None, gt=0, description="Learning rate; the method's own when not given.")
    steps: int = Field(500, ge=1, description="Updates to make.")
    batch_size: int = Field(8, ge=1, description="Pictures that go through the network together.")
    accumulation: int = Field(1, ge=1, description="Batches that make one update.")
    output: Path | None = Field(None, description="Run directory; runs/<method>-<data>-<n> when not given.")
    resume: Path | None = Field(None, description="Run directory to go on with, from its last checkpoint.")
    seed: int = Field(0, ge=0, lt=2**63, description="Of all chance: order, noise, choice of entries.")
    device: str | None = Field(None, description="cpu, cuda, ...; the best there is when not given.")
    resolution: int | None = Field(None, ge=8, description="Side of a square picture; the model's own when not given.")
    bucket: bool = Field(True, description="Keep the pictures' shapes, in buckets of equal size; off: square crops.")
    flip: bool = Field(True, description="Show half of the pictures mirrored.")
    caption_dropout: float = Field(0.05, ge=0, le=1, description="How often a caption is left empty, for guidance.")
    class_data: Path | None = Field(None, description="Pictures of the subject's class, for prior preservation.")
    class_prompt: str | None = Field(
        None, description="Prompt of such pictures; the base model draws them where class_data is not given."
    )
    class_images: int = Field(64, ge=1, description="How many it draws.")
    prior_weight: float = Field(1.0, ge=0, description="Weight of the loss on the class's pictures.")
    precision: Literal["no", "bf16", "fp16"] = Field(
        "no", description="Of the forward and backward pass; weights stay in float32."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    low_memory: bool = Field(False, description="For small GPUs: fp8 base, bf16, checkpointing, fused step if possible.")
    base_precision: BasePrecision = Field(
        "float32", description="What frozen weights are kept in; trained entries and adapters stay in full precision."
    )
    block_swap: int = Field(0, ge=0, description="Blocks that wait in host memory until they are needed.")
    fused_step: bool = Field(False, description="Update each weight within the backward pass; without clipping.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning rate after the warm-up.")
    warmup: int | None = Field(
        None, ge=0, description="Steps in which the learning rate rises from 0; a twentieth, at most 100, if not given."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient to this norm; 0: never.")
    min_snr: float | None = Field(None, gt=0, description="Gamma of min-SNR weights (5 is usual); none: no weights.")
    noise_offset: float = Field(0.0, ge=0, description="Noise shared by a whole channel (0.05 is usual).")
    prediction: Prediction | None = Field(
        None, description="What the network predicts, where the model's scheduler says it wrongly."
    )
    timestep_density: Density | None = Field(
        None, description="Of flow matching (SD3, FLUX): where timesteps fall; logit-normal when not given."
    )
    timestep_weighting: Weighting | None = Field(
        None, description="Of flow matching: weights of the timesteps; none when not given."
    )
    train_text_encoder: bool = Field(False, description="Train the text encoders too (not the T5 of SD3 and FLUX).")
    frames: int | None = Field(
        None, ge=2, description="Frames of a clip that are trained together, of video models; at most 16 if not given."
    )
    ema: bool = Field(False, description="Draw and save with a moving average of what is trained.")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="How slowly that average moves.")
    samples: int = Field(8, ge=0, description="Pictures to draw before, during and after training; 0: none.")
    sample_prompts: list[str] | None = Field(None, description="What to draw; captions of the pictures when not given.")
    sample_every: int = Field(250, ge=0, description="Steps between drawings during training; 0: none.")
    sample_steps: int = Field(25, ge=1, description="Denoising steps of a drawing.")
    guidance: float = Field(3.0, description="Guidance of a drawing.")
    save_every: int = Field(250, ge=0, description="Steps between checkpoints; 0: only when interrupted.")
    keep: int = Field(2, ge=0, description="Checkpoints to keep, the newest ones; 0: all.")
    log_every: int = Field(10, ge=1, description="Steps between two looks at the losses.")

    @model_validator(mode="after")
    def check_together(self) -> TrainConfig:
        """What only several settings together can get wrong."""
        check_options(self.method, self.options)
        settle(self)
        if self.class_data is not None and self.class_prompt is None:
            raise ConfigError(
                "class_data needs class_prompt, the prompt of its pictures; give one, like 'a photo of a dog'"
            )
        if self.sample_prompts is not None and not all(prompt.strip() for prompt in self.sample_prompts):
            raise ConfigError(
                f"sample_prompts={self.sample_prompts} holds an empty prompt; give texts, or leave it out"
            )
        return self
