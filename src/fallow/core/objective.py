"""The contract of an objective: a term that training adds to the loss, of the weights or of what the model puts out.

An objective is one dataclass in one file, with a `name`, and writes one of

    penalty(deltas)                     of the weights alone: `fallow.attach(model, "lora", objective=...)` adds its
                                        gradient before each optimizer step, as that of `Delta.loss()`
    __call__(model, batch, outputs)     of what the model puts out: added to the loss by the loop, or, where the loop is
                                        another's, by `fallow.add_objective(model, objective)`

All compute in float32 whatever the model has. Those that change over a run count its steps themselves: an objective is
what `fallow.core.schedule` can attach to a model, so that `fallow.step(model)`, `fallow.Callback(model)` and resuming
drive it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fallow.core.delta import Delta
from fallow.core.errors import ConfigError, nearest
from fallow.core.fused import single

OBJECTIVES: dict[str, type[Objective]] = {}


class Objective:
    """A term of the loss. `steps`: how many optimizer steps were made; `total`: of how many, where that is known.

    `inputs`: entries of a batch that are for the objective and not for the model.
    """

    name: ClassVar[str] = ""
    inputs: tuple[str, ...] = ()
    steps = 0
    total: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if vars(cls).get("name"):
            if OBJECTIVES.setdefault(cls.name, cls).__qualname__ != cls.__qualname__:
                raise ConfigError(f"the name '{cls.name}' is taken by {OBJECTIVES[cls.name]}; choose another")
            OBJECTIVES[cls.name] = cls

    def penalty(self, deltas: Mapping[str, Delta]) -> Tensor | None:
        """A scalar of the trained weights of these Deltas, differentiable, weighed; None where there is nothing to add.

        ConfigError for a Delta that it cannot take.
        """
        return None

    def __call__(self, model: nn.Module, batch: Any, outputs: Any) -> Tensor:
        """A scalar of what the model puts out for a batch, differentiable, weighed. Of the weights: their penalty."""
        term = self.penalty(dict(trained_deltas(model)))
        return torch.zeros((), device=next(model.parameters()).device) if term is None else term

    @property
    def of_weights(self) -> bool:
        return type(self).penalty is not Objective.penalty

    @property
    def of_outputs(self) -> bool:
        return type(self).__call__ is not Objective.__call__

    def enter(self, model: nn.Module) -> None:
        """Before the first forward, for objectives that must see into it."""

    def leave(self) -> None:
        """Take back what `enter` did."""

    def resolve(self, total: int) -> None:
        """Be told how many steps the run has."""
        self.total = total

    def advance(self) -> bool:
        """Be told that an optimizer step was made."""
        self.steps += 1
        return False

    def told(self) -> dict[str, Any]:
        """For files: its name and its fields. ConfigError where one is nothing that JSON can hold."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(cast(Any, self)) if f.init}
        for name, value in fields.items():
            if not isinstance(value, str | int | float | bool | list | tuple | None):
                raise ConfigError(f"{name}={type(value).__name__} of objective '{self.name}' cannot be kept in a file")
        return {"name": self.name, **fields}


@dataclasses.dataclass
class Together(Objective):
    """Several objectives as one: their sum."""

    name: ClassVar[str] = "together"
    parts: Sequence[Objective]

    def __post_init__(self) -> None:
        self.inputs = tuple(name for part in self.parts for name in part.inputs)

    @property
    def of_weights(self) -> bool:
        return any(part.of_weights for part in self.parts)

    @property
    def of_outputs(self) -> bool:
        return any(part.of_outputs for part in self.parts)

    def penalty(self, deltas: Mapping[str, Delta]) -> Tensor | None:
        """That of those parts which are of the weights alone."""
        terms = [term for part in self.parts if (term := part.penalty(deltas)) is not None]
        return total(terms) if terms else None

    def __call__(self, model: nn.Module, batch: Any, outputs: Any) -> Tensor:
        """That of those parts which are of the outputs, if there are such; else the penalty."""
        parts = [part for part in self.parts if part.of_outputs]
        if not parts:
            return super().__call__(model, batch, outputs)
        terms = [part(model, batch, outputs) for part in parts]
        return total(terms)

    def enter(self, model: nn.Module) -> None:
        for part in self.parts:
            part.enter(model)

    def leave(self) -> None:
        for part in self.parts:
            part.leave()

    def resolve(self, total: int) -> None:
        for part in self.parts:
            part.resolve(total)

    def advance(self) -> bool:
        self.steps += 1
        acted = [part.advance() for part in self.parts]  # all of them, so no `any` over a generator
        return any(acted)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "steps":
            for part in self.parts:
                part.steps = value

    def told(self) -> dict[str, Any]:
        return {"name": self.name, "parts": [part.told() for part in self.parts]}


Told = Objective | str | Mapping[str, Any] | Sequence["Objective | str | Mapping[str, Any]"]


def objective_of(told: Told | None) -> Objective | None:
    """An objective as it may be given: itself, its name for its defaults, what `told()` gave, or a list of such.

    ConfigError for a name that there is not, and for fields that it cannot take.
    """
    if told is None or isinstance(told, Objective):
        return told
    if isinstance(told, str):
        told = {"name": told}
    if isinstance(told, Mapping):
        fields = dict(told)
        name = fields.pop("name", "")
        if name not in OBJECTIVES:
            raise ConfigError(f"objective={name!r} is none{nearest(str(name), OBJECTIVES)}")
        return _made(OBJECTIVES[name], fields)
    if not isinstance(told, Sequence) or not told:
        raise ConfigError(f"objective={told!r} must be an objective, the name of one, or a list of these")
    return Together([cast(Objective, objective_of(part)) for part in told])


def _made(kind: type[Objective], fields: dict[str, Any]) -> Objective:
    known = [field.name for field in dataclasses.fields(cast(Any, kind)) if field.init]
    for name in fields:
        if name not in known:
            raise ConfigError(f"objective '{kind.name}' has no {name}={fields[name]!r}{nearest(name, known)}")
    if kind is Together:
        return Together([cast(Objective, objective_of(part)) for part in fields["parts"]])
    return kind(**fields)


def trained_deltas(model: nn.Module) -> Iterator[tuple[str, Delta]]:
    """The Deltas of a model that are trained, by their names in it; a fused weight's as one."""
    deltas = [(name, module) for name, module in model.named_modules() if isinstance(module, Delta)]
    within = {id(part) for _, delta in deltas for part in delta.modules() if part is not delta}
    for name, delta in deltas:
        if id(delta) not in within and any(param.requires_grad for param in delta.all_parameters()):
            yield name, delta


def each(deltas: Mapping[str, Delta]) -> Iterator[tuple[str, Delta]]:
    """The Deltas of single matrices: the blocks of fused weights each by itself."""
    for name, delta in deltas.items():
        yield from single(name, delta)


def in_float32(
    penalty: Callable[[Any, Mapping[str, Delta]], Tensor | None],
) -> Callable[[Any, Mapping[str, Delta]], Tensor | None]:
    """For `penalty`: autocast is off within, and without Deltas there is nothing to add."""

    @wraps(penalty)
    def run(self: Any, deltas: Mapping[str, Delta]) -> Tensor | None:
        if not deltas:
            return None
        device = next((p.device.type for delta in deltas.values() for p in delta.all_parameters()), "cpu")
        with torch.autocast(device, enabled=False):
            return penalty(self, deltas)

    return run


def total(terms: Sequence[Tensor], reduction: str = "sum") -> Tensor:
    """The "sum" or the "mean" of scalars, which may be on several devices."""
    together = torch.stack([term.to(terms[0]) for term in terms])
    return together.sum() if reduction == "sum" else together.mean()


def factors_of(deltas: Mapping[str, Delta], objective: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, B (out, r), A (r, in)) in float32 or wider, of each matrix. ConfigError where D has no such form."""
    for name, delta in each(deltas):
        if not delta.exact:
            raise ConfigError(
                f"objective '{objective}' needs a change B A, and '{delta.name}' of '{name}' has none; use lora or "
                "another method with factors"
            )
        b, a = delta.factors()
        yield name, _wide(b), _wide(a)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
