"""What an unlearning run is made from: every setting of `fallow unlearn`, checked when it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fallow.core.errors import ConfigError

Method = Literal["loku", "gradient-difference", "gradient-ascent"]
Start = Literal["fila", "zero", "pissa", "gaussian"]
Stop = Literal["never", "swapped", "reference"]


class UnlearnConfig(BaseModel):
    """What to forget, what to keep, how; each field is a flag of `fallow unlearn`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str = Field(description="A causal language model: a folder as transformers saves it, or a hub id.")
    forget: Path = Field(
        description="What to forget: a .txt file, a line each, or .jsonl with text, or prompt and completion."
    )
    retain: Path = Field(
        description="What to keep, likewise: text like the forgotten one that the model is to go on knowing."
    )
    reference: Path | None = Field(
        None, description="Text that the model has never seen, likewise: what forgotten text should look like to it."
    )
    method: Method = Field(
        "loku",
        description="loku: inverted hinge; gradient-difference: ascent; both beside retained text; gradient-ascent.",
    )
    against: list[Method] = Field(
        default_factory=list, description="Methods to run from the same model for comparison; nothing of them is kept."
    )
    start: Start | None = Field(
        None, description="What the adapter starts from: fila, zero, pissa, gaussian; none: fila for loku, else zero."
    )
    rank: int = Field(16, ge=1, description="Rank of the adapter.")
    alpha: float | None = Field(None, gt=0, description="Its scale is alpha / rank; none: 2 rank, as in the paper.")
    targets: list[str] = Field(
        default_factory=list, description="Names of the layers to adapt; every linear one but the head when not given."
    )
    retain_weight: float = Field(1.0, ge=0, description="What the retained text counts in the loss.")
    lr: float = Field(2e-4, gt=0, description="Highest learning rate; ten times that of the model's own fine-tuning.")
    epochs: int = Field(5, ge=1, description="Times that the text to forget is gone through.")
    batch_size: int = Field(2, ge=1, description="Texts of each kind in a batch.")
    accumulation: int = Field(16, ge=1, description="Batches that make one update.")
    warmup: int | None = Field(
        None, ge=0, description="Updates in which the rate rises; none: an epoch, at most a fifth."
    )
    weight_decay: float = Field(0.01, ge=0, description="Of AdamW.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient to this norm; 0: never.")
    max_length: int | None = Field(
        None,
        ge=2,
        description="Tokens of a text, what is beyond is left out; 512, or what the model takes, if not given.",
    )
    stop: Stop = Field(
        "never",
        description="End early, after an epoch: swapped, when no forgotten token is the likeliest any more; reference, "
        "when forgotten text is remembered and extracted no more than the reference.",
    )
    ngram: int = Field(10, ge=1, description="n of the extraction likelihood EL_n.")
    extraction_texts: int = Field(32, ge=0, description="Texts it is measured on, evenly picked; 0: it is left out.")
    extraction_every: int = Field(1, ge=1, description="Take every so manyth prefix of a text: less time, less exact.")
    retain_texts: int = Field(500, ge=0, description="Texts to keep that are measured, evenly picked; 0: all.")
    merged: bool = Field(False, description="Save the merged model too, from which nothing can be detached.")
    precision: Literal["no", "bf16"] = Field("no", description="What the base is kept in; the adapter is in float32.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    seed: int = Field(0, ge=0, lt=2**63, description="Of all chance: order, partners, fresh factors.")
    device: str | None = Field(None, description="cpu, cuda, ...; the best there is when not given.")
    output: Path | None = Field(None, description="Run directory; runs/<method>-<forget>-<n> when not given.")

    @model_validator(mode="after")
    def _together(self) -> UnlearnConfig:
        if self.stop == "reference" and self.reference is None:
            raise ConfigError("stop=reference needs reference=, a file with text that the model has never seen")
        if self.stop == "reference" and not self.extraction_texts:
            raise ConfigError("stop=reference compares the extraction likelihood; give extraction_texts above 0")
        if self.method in self.against or len(set(self.against)) != len(self.against):
            raise ConfigError(f"against={self.against} names a method twice, or method={self.method} itself")
        if self.max_length is not None and self.ngram >= self.max_length:
            raise ConfigError(f"ngram={self.ngram} must be below max_length={self.max_length}")
        return self

    def start_of(self, method: str) -> str:
        """What a method starts from, where nothing was said."""
        return self.start or ("fila" if method == "loku" else "zero")
