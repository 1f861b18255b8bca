"""BA-LoRA: three penalties of the logits keep fine-tuning from forgetting, from collapsing and from fitting noise.

"BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large Language Models", arXiv
2408.04556. Z_F, Z_P: logits of the tuned and of the original model; means are over rows that count, n of them:

    loss = task + l1 L_CR + l2 L_DR + l3 L_SVDR
    L_CR    mean T² KL(softmax(Z_P / T) | softmax(Z_F / T))
    nlu     Z (n, d) of a batch          L_DR = 1/d sum_(i != j) cov(Z_F)_ij²   L_SVDR = -sum_(i <= k) s_i / sum s_i
    nlg     Z (n, v) of its targets     L_DR = -mean H(K largest logits)        L_SVDR = -sum_(i <= k) s_i / |Z_F|_F

Of a language model, position i counts where label i + 1 is a target, as in its cross-entropy. The official code takes
label i, so the first answer's position is lost and the one behind the end is in: `shift=False`. It decomposes the
singular values of all n rows; here of `spectral_rows`, evenly spaced, since the cost grows with n². v1 of the paper is
`variant="v1"`: the nlu consistency is the distance of normalised logits, the nlg ones have T = 1, the entropy of all
logits, and the sum of singular values below the fraction.

The paper starts from PiSSA: `fallow.attach(model, "lora", rank=128, start="pissa")`; the terms are of outputs, and go
with every adapter. Their teacher is the same network with its adapters off: one more forward a step, no second model.
None depends on width or number of layers; l2 of nlu grows with the fourth power of the logits' size, the others not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fallow.core.delta import number, one_of, whole
from fallow.core.errors import ConfigError, DataError
from fallow.core.objective import Objective
from fallow.objectives.output_terms import (
    divergence,
    entropy,
    normalised_distance,
    off_diagonal_covariance,
    spectral_share,
)
from fallow.objectives.rows import Job, Term, labels_of, logits_of, sum_over_rows, target_rows
from fallow.objectives.teacher import Teacher, as_it_was

WARM_UP, START, RAMP = 0.1, 0.2, 0.05  # shares of the run
NAMES = ("consistency", "diversity", "spectral")
DEFAULTS = {"nlg": (0.025, 0.005, 0.005), "nlu": (0.15, 0.03, 0.03), "prediction": (0.15, 0.0, 0.0)}
V1 = (1e-4, 3e-4, 1e-4)


def falling(share: float) -> float:
    """Of l1, at a share of the run: from 1 to 0.1 along a cosine."""
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


RISING: dict[str, Callable[[float], float]] = {  # of l2 and l3
    "constant": lambda share: 1.0,
    "linear": lambda share: min(1.0, share / WARM_UP),
    "quadratic": lambda share: min(1.0, share / WARM_UP) ** 2,
    "two-phase": lambda share: min(1.0, max(0.0, share - START) / RAMP),
}


@dataclass
class BALoRA(Objective):
    """`task`: "nlg", a causal language model's logits (n, t, v) with labels; "nlu", a classifier's (n, d); or
    "prediction", where logits are no logits, as of a diffusion model: l1 times the mean squared distance from the
    original model's output, and nothing else. `consistency`, `diversity`, `spectral`: l1, l2, l3; None for the paper's.
    `k`: leading singular values; None for 10 (nlg), 5 (nlu), 3 (v1). `candidates`: K. `temperature`: T.
    `consistency_schedule`: "constant", or "cosine", falling to a tenth; `schedule`, of the other two: "constant",
    "linear" or "quadratic" over the first tenth of the run, or "two-phase", nothing for a fifth and up in a twentieth,
    which the official code offers and does not do. `teacher`: None, the network with its adapters off; another module;
    or a function of the batch.
    """

    name: ClassVar[str] = "ba-lora"
    task: str = "nlg"
    consistency: float | None = None
    diversity: float | None = None
    spectral: float | None = None
    k: int | None = None
    candidates: int = 20
    temperature: float = 2.0
    variant: str = "final"
    consistency_schedule: str = "constant"
    schedule: str = "constant"
    shift: bool = True
    spectral_rows: int = 512
    teacher: Teacher | None = None

    def __post_init__(self) -> None:
        one_of("task", self.task, tuple(DEFAULTS))
        one_of("variant", self.variant, ("final", "v1"))
        one_of("consistency_schedule", self.consistency_schedule, ("constant", "cosine"))
        one_of("schedule", self.schedule, tuple(RISING))
        one_of("shift", self.shift, (True, False))
        given = (self.consistency, self.diversity, self.spectral)
        usual = V1 if self.variant == "v1" and self.task != "prediction" else DEFAULTS[self.task]
        self.weights = tuple(own if one is None else one for one, own in zip(given, usual, strict=True))
        for label, weight in zip(NAMES, self.weights, strict=True):
            number(label, weight)
        if self.task == "prediction" and any(self.weights[1:]):
            raise ConfigError('task="prediction" has no probabilities, so diversity and spectral must be 0')
        self.leading = self.k if self.k is not None else 3 if self.variant == "v1" else 10 if self.task == "nlg" else 5
        whole("k", self.leading)
        whole("candidates", self.candidates, 2)
        whole("spectral_rows", self.spectral_rows, 2)
        number("temperature", self.temperature, open_below=True)
        if self.teacher is not None and not callable(self.teacher):
            raise ConfigError(f"teacher={self.teacher!r} must be a module, or a function of the batch")

    def now(self) -> tuple[float, float, float]:
        """l1, l2, l3 at this step. ConfigError where they depend on the length of the run and that is not known."""
        l1, l2, l3 = self.weights
        if (self.consistency_schedule, self.schedule) == ("constant", "constant"):
            return l1, l2, l3
        if self.total is None:
            raise ConfigError(
                f"schedule={self.schedule!r}, consistency_schedule={self.consistency_schedule!r} need the length of "
                "the run: objective.resolve(total), and advance() after each step; fallow.Callback(model) does both"
            )
        share = self.steps / self.total
        rising = RISING[self.schedule](share)
        return l1 * (falling(share) if self.consistency_schedule == "cosine" else 1.0), l2 * rising, l3 * rising

    def __call__(self, model: nn.Module, batch: Any, outputs: Any) -> Tensor:
        """l1 L_CR + l2 L_DR + l3 L_SVDR; each by itself is then in `terms`, by name.

        DataError for outputs that do not fit the task, and for missing labels.
        """
        logits, weights = logits_of(outputs), dict(zip(NAMES, self.now(), strict=True))
        self.terms: dict[str, Tensor] = {}
        if not any(weights.values()):
            return torch.zeros((), device=logits.device)
        if self.task == "prediction":
            self.terms["consistency"] = self._distance(model, batch, logits)
            return weights["consistency"] * self.terms["consistency"]
        rows = self._rows(batch, logits)
        jobs = {name: self._job(name, model, batch, logits, rows) for name in NAMES if weights[name] and len(rows)}
        signs = {name: job.weight for name, job in jobs.items()}
        # Divided by n at the end: the gradient of a mean over many rows would underflow in fp16, where it is kept.
        n = max(1, len(rows))
        for name, job in jobs.items():
            job.weight *= n * weights[name]
        total = sum_over_rows(logits, *jobs.values()) / n
        self.terms = {name: signs[name] * cast(Tensor, job.value) for name, job in jobs.items()}
        return total

    def _job(self, name: str, model: nn.Module, batch: Any, logits: Tensor, rows: Tensor) -> Job:
        """One of the three terms, whose own factor and sign are the weight of the job."""
        if name == "consistency":
            return Job(rows, self._against(self._original(model, batch, logits), rows), 1 / len(rows))
        if name == "spectral":
            if len(rows) > self.spectral_rows:
                rows = rows[torch.linspace(0, len(rows) - 1, self.spectral_rows, device=rows.device).long()]
            against = "sum" if self.task == "nlu" or self.variant == "v1" else "norm"
            return Job(rows, lambda z, at: spectral_share(z, self.leading, against), -1.0, whole=True)
        if self.task == "nlu":
            return Job(rows, lambda z, at: off_diagonal_covariance(z), whole=True)
        kept = None if self.variant == "v1" else self.candidates
        return Job(rows, lambda z, at: entropy(z, kept), -1 / len(rows))

    def _against(self, original: Tensor, rows: Tensor) -> Term:
        original = original.reshape(-1, original.shape[-1])
        normalised = self.variant == "v1" and self.task == "nlu"
        heat = 1.0 if self.variant == "v1" else self.temperature

        def term(z: Tensor, at: Tensor) -> Tensor:
            before = original.index_select(0, rows[at]).to(z)
            return normalised_distance(z, before) if normalised else divergence(z, before, heat)

        return term

    def _rows(self, batch: Any, logits: Tensor) -> Tensor:
        wanted = 3 if self.task == "nlg" else 2
        if logits.ndim != wanted:
            other = {3: "(samples, positions, words)", 2: "(samples, classes)"}[wanted]
            raise DataError(f'task="{self.task}" needs logits {other}, and they are {tuple(logits.shape)}')
        if self.task == "nlu":
            return torch.arange(len(logits), device=logits.device)
        return target_rows(logits, labels_of(batch), self.shift)[0]

    def _original(self, model: nn.Module, batch: Any, logits: Tensor) -> Tensor:
        with as_it_was(model, self.teacher) as original:
            found = logits_of(original(batch))
        if found.shape != logits.shape:
            raise DataError(f"the teacher's logits are {tuple(found.shape)}, the model's {tuple(logits.shape)}")
        return found.detach()

    def _distance(self, model: nn.Module, batch: Any, output: Tensor) -> Tensor:
        return (output.float() - self._original(model, batch, output).float()).square().mean()
