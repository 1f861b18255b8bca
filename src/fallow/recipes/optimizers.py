"""Optimizers by name, over whole tensors (LoRA, full fine-tuning) and over chosen entries (SaRA, SHiRA, ...) alike.

    adamw          torch's AdamW, fused
    adamw8bit      AdamW with moments of 8 bits (fallow.core.states8bit)
    prodigy        finds the learning rate itself (prodigyopt); `lr` is a factor, 1 if not given
    adafactor      transformers' Adafactor: the second moment of a matrix as rows x columns, no first one
    lion           the sign of a momentum (fallow.core.lion)
    schedule-free  AdamW with an average in place of a schedule (schedulefree)
    sgd            torch's SGD; it wants an `lr` of its own
    galore, ...    AdamW with moments of low rank (fallow.optim), over whole matrices alone: LOW_RANK

The methods' own learning rates are AdamW's; where none is given, that of another optimizer is made from it as OWN says.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fallow import catalogue
from fallow.core.errors import ConfigError, nearest
from fallow.core.lion import Lion
from fallow.core.states8bit import AdamW8bit
from fallow.optim.groups import grouped

Groups = list[dict[str, Any]]
EXTRA = "pip install 'fallow[optimizers]'"


def _adamw() -> Any:
    return torch.optim.AdamW


def _prodigy() -> Any:
    try:
        from prodigyopt import Prodigy
    except ImportError:
        raise ConfigError(f"optimizer=prodigy needs the package prodigyopt; install it with: {EXTRA}") from None
    return Prodigy


def _adafactor() -> Any:
    from transformers.optimization import Adafactor

    return Adafactor


def _schedule_free() -> Any:
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError:
        raise ConfigError(f"optimizer=schedule-free needs the package schedulefree; install it with: {EXTRA}") from None
    return AdamWScheduleFree


def _low_rank(slug: str) -> Any:
    return catalogue.card(slug).load()


@dataclass(frozen=True)
class Optimizer:
    """One row: its class, what it is given unless told otherwise, and how its learning rate follows from AdamW's.

    `share` of AdamW's rate; `rate` in its place; neither: it has none of its own. `projects`: it is a LowRank, which
    has nothing to project in single entries.
    """

    load: Callable[[], Any]
    defaults: Mapping[str, Any]
    share: float | None = 1.0
    rate: float | None = None
    projects: bool = False


# A quarter of each matrix's shorter side, since networks differ in width, and AdamW's rate without a scale of its own.
LOW_RANK: dict[str, Optimizer] = {
    name: Optimizer(partial(_low_rank, name), defaults, share, projects=True)
    for name, defaults, share in (
        ("galore", {"rank": 0.25, "scale": 1.0}, 1.0),
        ("q-galore", {"rank": 0.25, "scale": 1.0}, 1.0),
        ("fira", {"rank": 0.25, "scale": 1.0}, 1.0),
        ("frugal", {}, 1.0),
        ("dct-adamw", {"rank": 0.25}, 1.0),
        ("trion", {"rank": 0.25}, None),
        ("apollo", {"rank": 0.25}, 1.0),
        ("apollo-mini", {}, 1.0),
        ("gradnormlorp", {"scale": 1.0}, 1.0),
    )
}
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(_adamw, {}),
    "adamw8bit": Optimizer(lambda: AdamW8bit, {}),
    "prodigy": Optimizer(_prodigy, {}, None, 1.0),
    # Its own steps relative to the weights, which a schedule would fight, are off: `lr` is then the rate.
    "adafactor": Optimizer(_adafactor, {"scale_parameter": False, "relative_step": False, "warmup_init": False}),
    "lion": Optimizer(lambda: Lion, {}, 0.2),
    "schedule-free": Optimizer(_schedule_free, {}),
    "sgd": Optimizer(lambda: torch.optim.SGD, {}, None),
    **LOW_RANK,
}
# What the recipe decides, or what would break its promise of bit-identical runs; no options of an optimizer.
APART = {
    "self", "params", "lr", "weight_decay", "fused", "capturable", "differentiable", "maximize", "fsdp_in_use",
    "options", "include", "exclude", "largest_side", "mode", "accumulate", "max_norm",
}  # fmt: skip
ADAMW = ("betas", "eps")  # options of the methods, which the others have under their own names


def check_optimizer(
    name: str, options: Mapping[str, Any], method_options: Mapping[str, Any], lr: float | None, blocks: bool
) -> None:
    """ConfigError for an optimizer or an option that does not exist, with the nearest that does; for one without a
    learning rate; for `blocks` of other rates where there can be only one.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"optimizer={name} does not exist{nearest(name, OPTIMIZERS)}")
    row = OPTIMIZERS[name]
    if name == "adamw" and options:
        raise ConfigError(
            f"optimizer_options={dict(options)}: what AdamW takes (betas, eps, weight_decay) are options of the method;"
            " give them there, like --option weight_decay=0.1"
        )
    allowed = [key for key in _arguments(row.load()) if key not in APART]
    for key in options:
        if key not in allowed:
            raise ConfigError(f"the optimizer {name} has no option '{key}'{nearest(key, allowed)}")
    if name != "adamw" and (told := [key for key in ADAMW if key in method_options]):
        raise ConfigError(f"the option {told[0]} is AdamW's; give {name} its own in optimizer_options")
    if lr is None and row.share is None and row.rate is None:
        raise ConfigError(f"optimizer={name} has no learning rate of its own; give lr, like lr=0.1")
    if name == "prodigy" and blocks:
        raise ConfigError("optimizer=prodigy finds one rate for everything; leave lr_blocks out, or take another")


def _arguments(cls: type) -> list[str]:
    """Those of its constructor, and where it hands others on by name, those of the class it is made from."""
    own = inspect.signature(cls).parameters
    open_ = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    return [*own, *(_arguments(cls.__mro__[1]) if open_ and cls.__mro__[1] is not object else [])]


@dataclass(frozen=True)
class Rule:
    """Makes the optimizer of a name over groups that have `params`, their `names`, `lr` and `weight_decay`.

    `own_rate`: the groups' rates are the method's own, made for AdamW, and become this optimizer's. `lr_blocks`: by
    regular expression on names, a factor of the rate; the first that matches counts.
    """

    name: str = "adamw"
    options: Mapping[str, Any] = field(default_factory=dict)
    own_rate: bool = False
    lr_blocks: Mapping[str, float] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether it is AdamW at one rate."""
        return self.name == "adamw" and not self.lr_blocks

    def __call__(self, groups: Groups) -> torch.optim.Optimizer:
        """ConfigError where the optimizer refuses its options, or a pattern of `lr_blocks` matches no name."""
        row = OPTIMIZERS[self.name]
        groups = [part for group in groups for part in self._by_rate(group)]
        groups = [part for group in groups for part in _projected(group, row.projects)]
        if self.own_rate:
            for group in groups:
                group["lr"] = row.rate if row.rate is not None else group["lr"] * (row.share or 1.0)
        given = {**row.defaults, **self.options}
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        if self.name == "adamw":  # one fused kernel over all tensors where the device has it
            kinds = {param.device.type for group in groups for param in group["params"]}
            options["fused"] = kinds <= {"cpu", "cuda", "xpu", "mps"} or None
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # Prodigy's constructor prints
                made = row.load()(groups, lr=groups[0]["lr"], **options)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ConfigError(f"{row.load().__name__} refuses its options {options}: {error}") from error
        if averages(made):
            made.train()
        return made

    def _by_rate(self, group: dict[str, Any]) -> Groups:
        """A group for each factor of the rate, those of the plain rate first."""
        names, params = group.get("names", []), list(group["params"])
        rest = {key: value for key, value in group.items() if key not in ("names", "params")}
        if not self.lr_blocks:
            return [{**group, "params": params}]
        unused, factors = set(self.lr_blocks), []
        for name in names:
            matched = [pattern for pattern in self.lr_blocks if re.search(pattern, name)]
            unused -= set(matched)
            factors.append(self.lr_blocks[matched[0]] if matched else 1.0)
        if unused:
            blocks = dict.fromkeys(".".join(name.split(".")[:2]) for name in names)
            raise ConfigError(
                f"lr_blocks: '{min(unused)}' matches no weight in training; there are {', '.join(list(blocks)[:12])}"
            )
        return [
            {
                **rest,
                "lr": rest["lr"] * factor,
                "params": [p for p, own in zip(params, factors, strict=True) if own == factor],
                "names": [name for name, own in zip(names, factors, strict=True) if own == factor],
            }
            for factor in sorted(set(factors), key=lambda factor: (factor != 1.0, factor))
        ]


def _projected(group: dict[str, Any], projects: bool) -> Groups:
    """The group without the names; for a low-rank optimizer with embeddings and heads in a group of their own."""
    rest = {key: value for key, value in group.items() if key != "names"}
    names = group.get("names", [])
    if not projects or len(names) != len(group["params"]):
        return [rest]
    return [{**rest, **part} for part in grouped(list(zip(names, group["params"], strict=True)), None, None)]


class Trained(Protocol):
    """What is trained: its optimizer, and its values by name, to read and to set."""

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...
    def masters(self) -> dict[str, Tensor]: ...
    def put(self, values: dict[str, Tensor]) -> None: ...


def averages(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer trains at one point and means another: a schedule-free one."""
    return "train_mode" in optimizer.param_groups[0]


@contextlib.contextmanager
def averaged_values(trained: Trained) -> Iterator[None]:
    """Within the block the model has the values that a schedule-free optimizer means; afterwards its own, bit for bit.

    Its own way back (`train()`) rounds, so the values are kept aside: 4 bytes for each that is trained.
    """
    own = {name: value.clone() for name, value in trained.masters().items()}
    rule: Any = getattr(trained.optimizer, "rule", trained.optimizer)
    rule.eval()
    trained.put(trained.masters())
    try:
        yield
    finally:
        trained.put(own)
        for group in rule.param_groups:
            group["train_mode"] = True
