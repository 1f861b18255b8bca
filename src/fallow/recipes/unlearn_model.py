"""The language model that is to forget: loading it with its tokenizer, its adapter, and training that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.errors import ConfigError, ModelError, TrainingError
from fallow.core.host import detach
from fallow.core.probe import probe
from fallow.core.statistics import Statistics
from fallow.deltas import attach
from fallow.objectives.unlearning import inverted_hinge, log_likelihood
from fallow.recipes.pipelines import chosen_device, quietly
from fallow.recipes.unlearn_config import UnlearnConfig
from fallow.recipes.unlearn_data import Example, batch_of, pairs
from fallow.starts.fila import FILA

LENGTH = 512  # tokens
FORGETTING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "loku": inverted_hinge,
    "gradient-difference": log_likelihood,
    "gradient-ascent": log_likelihood,
}


def load(config: UnlearnConfig) -> tuple[nn.Module, Any]:
    """The model in evaluation mode and its tokenizer. ModelError where it is no causal language model that loads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = chosen_device(config.device)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(config.model)
            model: Any = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"model={config.model} is no causal language model that can be loaded ({reason}); give a folder as "
            "transformers saves it, with its tokenizer and safetensors, or a hub id"
        ) from None
    places = getattr(model.config, "max_position_embeddings", None)
    if places is not None and (config.max_length or 0) > places:
        raise ConfigError(f"max_length={config.max_length} is above the {places} positions of {config.model}")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found: nn.Module = model.to(device).eval()
    return found, tokenizer


def longest(config: UnlearnConfig, model: nn.Module) -> int:
    """How many tokens of a text are taken."""
    places = getattr(model.config, "max_position_embeddings", None)
    return int(config.max_length or min(LENGTH, places or LENGTH))


@dataclass
class Sets:
    """What is forgotten, kept and never seen, as tokens; `pad`: the token that fills up batches."""

    forget: list[Example]
    retain: list[Example]
    reference: list[Example]
    pad: int


@dataclass
class Trained:
    """What came of a method's training. `updates`: optimizer steps; `lines`: for metrics.jsonl; `stopped`: early."""

    updates: int = 0
    trained: int = 0
    stopped: bool = False
    lines: list[dict[str, Any]] = field(default_factory=list)


class Unlearning:
    """One model, its texts, and one method after another on it; the base weights are never written to."""

    def __init__(self, config: UnlearnConfig, model: nn.Module, sets: Sets) -> None:
        self.config, self.model, self.sets = config, model, sets
        self.device = next(model.parameters()).device
        self.found: tuple[Statistics, Statistics] | None = None

    @property
    def targets(self) -> Any:
        return self.config.targets or "all-linear"

    def importance(self) -> tuple[Statistics, Statistics]:
        """The Fisher of what is forgotten and of as many retained texts, of one epoch; found once."""
        if self.found is None:
            generator = torch.Generator().manual_seed(self.config.seed)
            epoch = list(pairs(self.sets.forget, self.sets.retain, self.config.batch_size, generator))
            halves = [[batch_of(pair[side], self.sets.pad, self.device) for pair in epoch] for side in (0, 1)]
            first, second = (probe(self.model, half, {"fisher"}, targets=self.targets) for half in halves)
            self.found = first, second
        return self.found

    def adapt(self, method: str) -> None:
        """Put a fresh adapter into the model. ConfigError for targets and ranks that it has not."""
        config = self.config
        name = config.start_of(method)
        start = FILA(*self.importance()) if name == "fila" else name
        alpha = 2.0 * config.rank if config.alpha is None else config.alpha
        torch.manual_seed(config.seed)
        attach(self.model, "lora", self.targets, rank=config.rank, alpha=alpha, start=start)

    def release(self) -> None:
        """The model as it was."""
        detach(self.model)
        self.model.eval()

    def train(
        self, method: str, forgotten: Callable[[], bool], tell: Callable[[int, int, float], None] = lambda *told: None
    ) -> Trained:
        """Train the adapter that is in the model; `forgotten()` is asked after each epoch. TrainingError where the loss
        is no number any more.
        """
        config, done = self.config, Trained()
        params = [param for param in self.model.parameters() if param.requires_grad]
        done.trained = sum(param.numel() for param in params)
        each = math.ceil(math.ceil(len(self.sets.forget) / config.batch_size) / config.accumulation)
        total = each * config.epochs
        warmup = min(each, total // 5) if config.warmup is None else config.warmup
        optimizer = torch.optim.AdamW(params, lr=config.lr, weight_decay=config.weight_decay)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, warmup=warmup, total=total))
        generator = torch.Generator().manual_seed(config.seed)
        for epoch in range(config.epochs):
            self.model.train()
            batches = list(pairs(self.sets.forget, self.sets.retain, config.batch_size, generator))
            for start in range(0, len(batches), config.accumulation):
                line = self._update(method, batches[start : start + config.accumulation], params, optimizer)
                done.updates += 1
                done.lines.append(
                    {"step": done.updates, "epoch": epoch + 1, "lr": rate.get_last_lr()[0], "method": method, **line}
                )
                _refuse_no_number(method, done)
                rate.step()
                tell(done.updates, total, line["loss"])
            self.model.eval()
            if config.stop != "never" and epoch + 1 < config.epochs and forgotten():
                done.stopped = True
                break
        return done

    def _update(
        self, method: str, batches: list[tuple[list[Example], list[Example]]], params: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> dict[str, float]:  # fmt: skip
        """One step; the two losses are differentiated one after the other, so that one graph stands at a time."""
        sums = torch.zeros(2, device=self.device)
        optimizer.zero_grad()
        kept = self.config.retain_weight if method != "gradient-ascent" else 0.0
        for forget, retain in batches:
            batch = batch_of(forget, self.sets.pad, self.device)
            term = FORGETTING[method](self._logits(batch), batch["labels"]) / len(batches)
            term.backward()
            sums[0] += term.detach()
            if kept:
                batch = batch_of(retain, self.sets.pad, self.device)
                loss = -log_likelihood(self._logits(batch), batch["labels"]) / len(batches)
                (kept * loss).backward()
                sums[1] += loss.detach()
        most = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(params, most)
        optimizer.step()
        forget_loss, retain_loss = sums.tolist()
        told = {"loss": forget_loss + kept * retain_loss, "forget": forget_loss, "grad_norm": float(norm)}
        return told | ({"retain": retain_loss} if kept else {})

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        found: Tensor = self.model(**given, use_cache=False).logits
        return found


def _rate(step: int, warmup: int, total: int) -> float:
    """Up over the warm-up, then down to zero in a line."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(0.0, (total - step) / max(1, total - warmup))


def _refuse_no_number(method: str, done: Trained) -> None:
    line = done.lines[-1]
    if not all(math.isfinite(value) for value in _numbers(line)):
        raise TrainingError(
            f"the loss of {method} is {line['loss']} and its gradient {line['grad_norm']} in update {done.updates}; "
            "lower lr, or use method loku, whose loss has a bound"
        )


def _numbers(line: Mapping[str, Any]) -> Iterable[float]:
    return (line["loss"], line["grad_norm"])
