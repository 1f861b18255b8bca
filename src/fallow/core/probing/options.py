"""What `fallow.probe` can be asked for, and how it gathers it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fallow.core.delta import number, one_of, whole
from fallow.core.errors import ConfigError, nearest

WANTS = ("gradient", "input_covariance", "activation", "fisher", "contribution", "spectrum")
OF_INPUTS = frozenset({"input_covariance", "activation"})  # forward passes alone
OF_GRADIENTS = frozenset({"gradient", "fisher"})
Mask = str | Callable[[Any], "Tensor | Iterable[Tensor] | None"] | None
Scale = Literal["official", "max_abs", "none"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How statistics are gathered. ConfigError, by name, for what cannot be.

    Args:
        max_batches: no more than so many of the batches; None for all.
        train: run in training mode (dropout), the buffers being put back afterwards; else in eval mode.
        loss_scale: the loss times this, and its gradients divided by it in float32, for models in float16.
        mask: of padding: the key under which a batch holds it, (samples, tokens), not 0 where tokens count; or a
            function that makes one or several such masks of a batch; None for none.
        sketch: k; in place of a gradient (out, in) keep k out + (2k + 1) in numbers, where that is less.
        scale: what inputs X are divided by for a covariance: "official" |max X|, "max_abs" max |X|, "none".
        scale_by: "call", by that of all samples of a call, K counting calls; "sample", each by its own, K counting
            samples, so that C does not depend on the batches.
        components: how many directions of a layer's inputs, q.
        center: the inputs about their mean, as in EVA's code; False for the theorem of its paper.
        tolerance: the least cosine between a direction before and after a batch, at which it counts as settled.
        converged: "component", each by its number; "subspace", all together, which equal singular values do not
            keep from settling.
        rank: so many components of a layer must settle as EVA gives it of `rank` on average; None for all.
        passes: how often the batches are gone through, at most, until all have settled.
        positions: of each sample of a convolution's input so many, drawn at random; None for all.
        per_sample: the Fisher diagonal of the gradients of single samples, in place of those of a batch's mean.
        tokens: counts the label tokens of a batch, its weight in the Fisher diagonal; by default its labels but those
            of -100.
        tuned: the state dict of the same model after training, with the layers' weights, for the contribution.
        points: of the path to it, in the middle of equal parts, where gradients are taken.
        cache: a directory; what is found there of the same model, batches and request is returned without a forward
            pass.
        data: what the batches are known by there; None to read them through once beforehand.
        save_every: batches after which a state is written there, from which an interrupted run goes on; 0 for never.
        limit: bytes that may be kept; what would keep more is refused beforehand.
        progress: say what is kept, and show a bar.
        seed: of sketches and positions.
    """

    max_batches: int | None = None
    train: bool = False
    loss_scale: float = 1.0
    mask: Mask = "attention_mask"
    sketch: int | None = None
    scale: Scale = "official"
    scale_by: Literal["call", "sample"] = "call"
    components: int = 16
    center: bool = True
    tolerance: float = 0.99
    converged: Literal["component", "subspace"] = "component"
    rank: int | None = None
    passes: int = 1
    positions: int | None = 1024
    per_sample: bool = False
    tokens: Callable[[Any], float] | None = None
    tuned: Mapping[str, Tensor] | None = None
    points: int = 32
    cache: str | os.PathLike[str] | None = None
    data: str | None = None
    save_every: int = 64
    limit: float | None = None
    progress: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_batches", "sketch", "components", "rank", "passes", "positions", "points"):
            if (value := getattr(self, name)) is not None:
                whole(name, value)
        whole("save_every", self.save_every, 0)
        number("loss_scale", self.loss_scale, open_below=True)
        number("tolerance", self.tolerance, 0, 1, open_below=True)
        one_of("scale", self.scale, ("official", "max_abs", "none"))
        one_of("scale_by", self.scale_by, ("call", "sample"))
        one_of("converged", self.converged, ("component", "subspace"))
        if self.rank is not None and self.rank > self.components:
            raise ConfigError(f"rank={self.rank} is above components={self.components}; give at least as many")
        if self.mask is not None and not isinstance(self.mask, str) and not callable(self.mask):
            raise ConfigError(f"mask={self.mask!r} must be a key of the batches, a function of one, or None")
        if self.data is not None and self.cache is None:
            raise ConfigError(f"data={self.data!r} is for the cache; give cache=, a directory, too")


def options_of(given: Mapping[str, Any]) -> Options:
    """ConfigError for options that do not exist, and values that they cannot take."""
    known = [field.name for field in dataclasses.fields(Options)]
    for name in given:
        if name not in known:
            raise ConfigError(f"fallow.probe has no option {name!r}{nearest(name, known)}")
    return Options(**given)


def wanted(want: str | Iterable[str]) -> frozenset[str]:
    """What is asked for. ConfigError for nothing, and for what does not exist."""
    names = [want] if isinstance(want, str) else list(want)
    if not names:
        raise ConfigError(f"want={want!r} asks for nothing; give some of {', '.join(WANTS)}")
    for name in names:
        if name not in WANTS:
            raise ConfigError(f"want: {name!r} cannot be gathered{nearest(str(name), WANTS)}")
    return frozenset(names)


def check(want: frozenset[str], options: Options) -> None:
    """ConfigError where an option and what is wanted do not belong together."""
    if "contribution" in want and options.tuned is None:
        raise ConfigError(
            "want='contribution' compares two states of a model; give tuned=, the state dict of the tuned one"
        )
    given = {field.name for field in dataclasses.fields(Options) if getattr(options, field.name) != field.default}
    of = {

        "sketch": "gradient", "scale": "input_covariance", "scale_by": "input_covariance",
        "components": "activation", "center": "activation",
        "tolerance": "activation", "converged": "activation", "rank": "activation", "passes": "activation",
        "per_sample": "fisher", "tokens": "fisher", "tuned": "contribution", "points": "contribution",
    }  # fmt: skip
    for name, need in of.items():
        if name in given and need not in want:
            raise ConfigError(f"{name}= is for want={need!r}, which is not asked for; add it to want, or leave it out")
