"""What a run is made from: every setting of `fallow train`, checked when it is made."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fallow.core.errors import ConfigError
from fallow.recipes.captions import CaptionRules
from fallow.recipes.flow_matching import Density, Weighting
from fallow.recipes.losses import Distance, HuberSchedule, LossRules
from fallow.recipes.low_memory import BasePrecision, settle
from fallow.recipes.methods import check_options
from fallow.recipes.noise import NoiseRules, Prediction
from fallow.recipes.optimizers import Rule, check_optimizer
from fallow.recipes.pictures import Reading
from fallow.recipes.provenance import check_fields

# What may be another when a run is resumed: it does not touch what was computed so far.
FREE = {
    "resume", "output", "steps", "device", "save_every", "keep", "log_every",
    "samples", "sample_prompts", "sample_every", "sample_steps", "guidance", "metadata",
}  # fmt: skip


class TrainConfig(BaseModel):
    """What to train, on what, how; each field is a flag of `fallow train`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str = Field("mini-sd", description="Base model: mini-sd, a pipeline directory, or a hub id.")
    data: str = Field("blueprint", description="Shipped style set, or a folder of pictures (or with train/ in it).")
    concepts: list[str] = Field(
        default_factory=list, description="Further folders to train on, each FOLDER or FOLDER:REPEATS."
    )
    prompt: str | None = Field(None, description="Caption of the pictures that have none of their own.")
    method: str = Field(
        "sara",
        description="sara, shira, largest, random, lt-sft, lora, another weight parameterization (fallow methods), "
        "peft (any PEFT config) or full.",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="The method's own arguments.")
    lr: float | None = Field(None, gt=0, description="Learning rate; the method's own when not given.")
    lr_blocks: dict[str, float] = Field(
        default_factory=dict,
        description="Factors of the learning rate for weights by name, like mid_block=0.5; regular expressions.",
    )
    optimizer: str = Field(
        "adamw",
        description="adamw, adamw8bit, prodigy, adafactor, lion, schedule-free, sgd; or galore and its kin.",
    )
    optimizer_options: dict[str, Any] = Field(default_factory=dict, description="That optimizer's own arguments.")
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
    shuffle_caption: bool = Field(False, description="Put the tags of a caption, between commas, in a new order.")
    keep_tokens: int = Field(0, ge=0, description="How many of the first tags are neither moved nor dropped.")
    tag_dropout: float = Field(0.0, ge=0, le=1, description="How often each tag of a caption is left out.")
    wildcards: bool = Field(False, description="Draw one line of a caption, and one word of each {a|b|c} in it.")
    trigger_phrase: str | None = Field(None, description="Stands in front of captions that do not hold it already.")
    caption_prefix: str = Field("", description="Stands before every caption.")
    caption_suffix: str = Field("", description="Stands behind every caption.")
    masks: bool = Field(False, description="Weight the loss by NAME.mask.png beside NAME.png, or masks/NAME.png.")
    alpha_mask: bool = Field(False, description="Weight the loss by the pictures' own transparency.")
    unmasked_weight: float = Field(0.0, ge=0, le=1, description="What the loss weighs where a mask is black.")
    normalize_masked_loss: bool = Field(False, description="Let small masks count as much as large ones.")
    class_data: Path | None = Field(None, description="Pictures of the subject's class, for prior preservation.")
    class_prompt: str | None = Field(
        None, description="Prompt of such pictures; the base model draws them where class_data is not given."
    )
    class_images: int = Field(64, ge=1, description="How many it draws.")
    prior_weight: float = Field(1.0, ge=0, description="Weight of the loss on the class's pictures.")
    validation: Path | None = Field(None, description="Pictures that are not trained on, to measure the loss on.")
    validation_share: float = Field(0.0, ge=0, lt=1, description="Share of the pictures to hold out for that instead.")
    validation_every: int = Field(100, ge=1, description="Steps between two such measurements.")
    validation_draws: int = Field(4, ge=1, description="Noises and timesteps for each of these pictures.")
    keep_best: bool = Field(False, description="Keep in best/ the adapter of the lowest validation loss.")
    precision: Literal["no", "bf16", "fp16"] = Field(
        "no", description="Of the forward and backward pass; weights stay in float32."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    low_memory: bool = Field(False, description="For small GPUs: fp8 base, bf16, checkpointing, fused step if able.")
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
    loss: Distance = Field("mse", description="Distance of prediction and target.")
    huber_delta: float = Field(0.1, gt=0, le=1, description="Where huber and smooth-l1 turn from square to linear.")
    huber_schedule: HuberSchedule = Field("snr", description="How that follows the noise; from 1 down to huber_delta.")
    min_snr: float | None = Field(None, gt=0, description="Gamma of min-SNR weights (5 is usual); none: no weights.")
    debiased_estimation: bool = Field(False, description="Weight the loss by 1 / sqrt(snr) instead.")
    noise_offset: float = Field(0.0, ge=0, description="Noise shared by a whole channel (0.05 is usual).")
    multires_noise_iterations: int = Field(0, ge=0, description="Levels of coarser noise (6 is usual); 0: none.")
    multires_noise_discount: float = Field(0.3, gt=0, lt=1, description="Weight of each level over the finer one's.")
    ip_noise_gamma: float = Field(0.0, ge=0, description="Input perturbation (0.1 is usual).")
    timestep_min: int = Field(0, ge=0, description="First timestep that is trained.")
    timestep_max: int | None = Field(None, ge=1, description="The timestep before which training ends; all if none.")
    zero_terminal_snr: bool = Field(False, description="Let the noise schedule end in noise alone; for v_prediction.")
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
    metadata: dict[str, str] = Field(
        default_factory=dict,
        description="What the adapter's file says: title, author, license, description, usage_hint, tags.",
    )
    samples: int = Field(8, ge=0, description="Pictures to draw before, during and after training; 0: none.")
    sample_prompts: list[str] | None = Field(None, description="What to draw; captions of the pictures when not given.")
    sample_every: int = Field(250, ge=0, description="Steps between drawings during training; 0: none.")
    sample_steps: int = Field(25, ge=1, description="Denoising steps of a drawing.")
    guidance: float = Field(3.0, description="Guidance of a drawing.")
    save_every: int = Field(250, ge=0, description="Steps between checkpoints; 0: only when interrupted.")
    keep: int = Field(2, ge=0, description="Checkpoints to keep, the newest ones; 0: all.")
    log_every: int = Field(10, ge=1, description="Steps between two looks at the losses.")

    @field_validator("lr_blocks", mode="before")
    @classmethod
    def join_names(cls, value: Any) -> Any:
        """Names with dots, which a flag or a TOML key takes for tables in tables."""
        return dict(_joined(value)) if isinstance(value, dict) else value

    @field_validator("metadata", mode="before")
    @classmethod
    def read_texts(cls, value: Any) -> Any:
        """Numbers and truth values as the texts that they were typed as."""
        return {key: str(text) for key, text in value.items()} if isinstance(value, dict) else value

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
        check_optimizer(self.optimizer, self.optimizer_options, self.options, self.lr, bool(self.lr_blocks))
        self._check_rates()
        self._check_noise()
        self._check_pictures()
        check_fields(self.metadata)
        return self

    def _check_rates(self) -> None:
        for pattern, factor in self.lr_blocks.items():
            if not factor > 0:
                raise ConfigError(f"lr_blocks: {pattern}={factor} must be above 0; to train no such weight, exclude it")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"lr_blocks: '{pattern}' is no regular expression ({error})") from None
        if self.optimizer == "schedule-free":
            if "schedule" in self.model_fields_set and self.schedule != "constant":
                raise ConfigError(
                    f"optimizer=schedule-free averages in place of schedule={self.schedule}; leave schedule out"
                )
            self.schedule = "constant"
            if self.ema:
                raise ConfigError("optimizer=schedule-free averages by itself; leave ema out")

    def _check_noise(self) -> None:
        if self.timestep_max is not None and self.timestep_max <= self.timestep_min:
            raise ConfigError(
                f"timestep_min={self.timestep_min} and timestep_max={self.timestep_max} leave no timestep to train"
            )
        if self.debiased_estimation and self.min_snr is not None:
            raise ConfigError(
                f"min_snr={self.min_snr} and debiased_estimation both weight the loss by its noise; leave one out"
            )

    def _check_pictures(self) -> None:
        if self.keep_tokens and not (self.shuffle_caption or self.tag_dropout):
            raise ConfigError(
                f"keep_tokens={self.keep_tokens} keeps tags where they are; give shuffle_caption or tag_dropout too"
            )
        for name in ("unmasked_weight", "normalize_masked_loss"):
            if getattr(self, name) and not (self.masks or self.alpha_mask):
                raise ConfigError(f"{name}={getattr(self, name)} is for masks; give masks or alpha_mask too")
        if self.validation is not None and self.validation_share:
            raise ConfigError("validation and validation_share both say what to measure the loss on; leave one out")
        if self.keep_best and self.validation is None and not self.validation_share:
            raise ConfigError("keep_best needs a loss to go by; give validation or validation_share")

    # -- what the parts of a run are made from ------------------------------------------------------------------------

    @property
    def caption_rules(self) -> CaptionRules:
        return CaptionRules(
            self.shuffle_caption, self.keep_tokens, self.tag_dropout, self.caption_prefix, self.caption_suffix,
            self.trigger_phrase or "", self.wildcards,
        )  # fmt: skip

    @property
    def noise_rules(self) -> NoiseRules:
        return NoiseRules(
            self.noise_offset, self.multires_noise_iterations, self.multires_noise_discount, self.ip_noise_gamma,
            self.timestep_min, self.timestep_max,
        )  # fmt: skip

    @property
    def loss_rules(self) -> LossRules:
        return LossRules(
            self.loss, self.huber_delta, self.huber_schedule, self.min_snr, self.debiased_estimation,
            self.unmasked_weight, self.normalize_masked_loss,
        )  # fmt: skip

    @property
    def reading(self) -> Reading:
        return Reading(self.wildcards, self.masks, self.alpha_mask, self.unmasked_weight)

    @property
    def rule(self) -> Rule:
        return Rule(self.optimizer, self.optimizer_options, self.lr is None, self.lr_blocks)


def _joined(table: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _joined(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
