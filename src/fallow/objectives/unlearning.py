"""Forgetting losses: the inverted hinge of LoKU, and gradient ascent, the baseline that it replaces.

"Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs", arXiv 2408.06621. For each token to forget, p =
softmax(y) of the logits y, t the true one, u the likeliest of the others:

    inverted hinge      1 + p_t - p_u              in [0, 2]
    gradient ascent     log p_t                    without a lower bound
    dL/dy of the hinge  p_t (1 + p_u - p_t) at t;  -p_u (1 + p_t - p_u) at u;  p_v (p_u - p_t) elsewhere

The hinge lowers the true token and lifts the runner-up alone, and is quiet once the two have changed places; ascent
lifts all others in proportion and never ends. Beside it runs the usual cross-entropy of what is to be kept:

    loss = hinge(forgotten batch) + cross-entropy(kept batch)       LoKU; with ascent: gradient difference

Both are means over the tokens that count, so they depend neither on width nor on the number of layers. The softmax is
always taken, in float32; the official code leaves it out where all logits lie in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fallow.core.delta import number
from fallow.core.objective import Objective
from fallow.objectives.rows import Job, Term, labels_of, logits_of, sum_over_rows, target_rows

FORGET = "forget_labels"


def inverted_hinge(logits: Tensor, labels: Tensor, shift: bool = True) -> Tensor:
    """1 + p_t - max_(v != t) p_v, the mean over the labels that are not -100; 0 without any. Differentiable once.

    `logits` (n, t, v) of a causal language model with `labels` (n, t), whose positions are shifted by one; or (n, d) of
    a classifier with (n,).
    """
    return _mean(logits, labels, shift, _hinge)


def log_likelihood(logits: Tensor, labels: Tensor, shift: bool = True) -> Tensor:
    """log p_t likewise: what gradient ascent minimises, the cross-entropy with the other sign."""
    return _mean(logits, labels, shift, lambda targets: lambda z, at: -F.cross_entropy(z, targets[at], reduction="sum"))


def _mean(logits: Tensor, labels: Tensor, shift: bool, term: Any) -> Tensor:
    rows, targets = target_rows(logits, labels, shift)
    return sum_over_rows(logits, Job(rows, term(targets))) / max(1, len(rows))


def _hinge(targets: Tensor) -> Term:
    def term(z: Tensor, at: Tensor) -> Tensor:
        p, true = F.softmax(z, -1), targets[at].unsqueeze(1)
        first, second = z.detach().topk(2, -1).indices.split(1, 1)
        other = torch.where(first == true, second, first)
        return (1 + p.gather(1, true) - p.gather(1, other)).sum()

    return term


@dataclass
class InvertedHinge(Objective):
    """`weight` times the inverted hinge. `shift=False`: labels stand where their logits do, as for token classes.

    Of the batch's `forget_labels`, where it has some, which are kept from the model: one batch then holds both, with
    `labels` of -100 for what is to be forgotten, and the model's own loss is of the rest. Else of its `labels`.
    """

    name: ClassVar[str] = "inverted-hinge"
    inputs = (FORGET,)
    weight: float = 1.0
    shift: bool = True

    def __post_init__(self) -> None:
        number("weight", self.weight)

    def __call__(self, model: nn.Module, batch: Any, outputs: Any) -> Tensor:
        return self.weight * self.term(logits_of(outputs), _forgotten(batch))

    def term(self, logits: Tensor, labels: Tensor) -> Tensor:
        return inverted_hinge(logits, labels, self.shift)


@dataclass
class GradientAscent(InvertedHinge):
    """`weight` times the mean log-likelihood of what is to be forgotten; labels as in InvertedHinge. Without a bound:
    with a weight of 1 it outgrows whatever is to be kept within a few dozen steps.
    """

    name: ClassVar[str] = "gradient-ascent"

    def term(self, logits: Tensor, labels: Tensor) -> Tensor:
        return log_likelihood(logits, labels, self.shift)


def _forgotten(batch: Any) -> Tensor:
    return labels_of(batch, FORGET if isinstance(batch, Mapping) and FORGET in batch else "labels")
