"""What goes along with Deltas in a forward and in training, whichever host holds them.

    with fallow.condition(model, quality=q): model(x)    values that Deltas read in this forward, as self.context
    fallow.step(model) after optimizer.step()            calls on_step(step, total) of every Delta that is trained
    fallow.penalty(model)                                the sum of their loss(), for those who add it themselves

Unless told otherwise, the gradient of loss() is added right before `optimizer.step()` by torch's hook, so after
unscaling and clipping, once per step whatever the accumulation; thus any Trainer or loop works unchanged.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fallow.core import schedule
from fallow.core.delta import Delta, one_of
from fallow.core.errors import ConfigError
from fallow.core.objective import Objective, Told, objective_of
from fallow.core.weakly import Weakly

Penalty = Literal["step", "manual"]
_PENALISED: weakref.WeakSet[EachStep] = weakref.WeakSet()


def context_of(model: nn.Module) -> dict[str, Any]:
    """What the Deltas of this model read as `context`: the dictionary that those there already have."""
    return next((delta.context for delta in model.modules() if isinstance(delta, Delta)), {})


@contextmanager
def condition(model: nn.Module, **values: Any) -> Iterator[None]:
    """Give the Deltas of a model values for the forwards within, such as `quality=` or `timestep=`.

    `model` may be wrapped by PEFT, DDP or torch.compile. ConfigError where it has no Delta to read them.
    """
    contexts = {id(delta.context): delta.context for delta in model.modules() if isinstance(delta, Delta)}
    if not contexts:
        raise ConfigError(f"{type(model).__name__} has no adapter to read {', '.join(values)}; attach one first")
    before = [dict(context) for context in contexts.values()]
    try:
        for context in contexts.values():
            context.update(values)
        yield
    finally:
        for context, kept in zip(contexts.values(), before, strict=True):
            context.clear()
            context.update(kept)


class EachStep:
    """Calls `on_step` of an adapter's Deltas; to `fallow.step`, `fallow.Callback` and checkpoints it is a Schedule.

    `penalised`: those whose `loss()`, and what `objective` says of them together, counts in training; `added`: before
    an optimizer's step, not by the user. Copies of the Deltas have one of their own.
    """

    def __init__(
        self,
        stepping: Mapping[str, Delta],
        penalised: Mapping[str, Delta],
        objective: Objective | None = None,
        added: bool = True,
    ) -> None:
        self.stepping, self.penalised = Weakly(stepping), Weakly(penalised)
        self.objective, self.added = objective, added
        self.steps = 0
        self.total: int | None = None
        self._begin(added and bool(penalised))

    def _begin(self, penalises: bool) -> None:
        if penalises:
            _PENALISED.add(self)
            hook_optimizers()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin(self.added and next(self.penalised.items(), None) is not None)

    def resolve(self, total: int) -> None:
        self.total = total

    def check(self) -> None:
        """Nothing depends on the length of the run before it is known."""

    def terms(self, held: set[int] | None = None) -> list[Tensor]:
        """What is added to the objective now: `loss()` of each Delta that is trained and the penalty of all of them.

        `held`: of those alone whose Parameters are among these, by id.
        """
        present = {name: delta for name, delta in self.penalised.items() if trained(delta)}
        if held is not None:
            present = {name: d for name, d in present.items() if any(id(param) in held for param in d.all_parameters())}
        terms = [delta.loss() for delta in present.values()]
        return [term for term in (*terms, self.of_all(present)) if term is not None]

    def of_all(self, present: Mapping[str, Delta] | None = None) -> Tensor | None:
        """What the objective says of these together, else of all that are trained."""
        if self.objective is None:
            return None
        if present is None:
            present = {name: delta for name, delta in self.penalised.items() if trained(delta)}
        return self.objective.penalty(present) if present else None

    def advance(self) -> bool:
        """Whether any Delta was there to be told."""
        self.steps += 1
        present = [delta for delta in self.stepping.values() if trained(delta)]
        for delta in present:
            delta.on_step(self.steps, self.total)
        return bool(present)


def trained(delta: Delta) -> bool:
    return any(param.requires_grad for param in delta.all_parameters())


def penalty_of(given: Told | None) -> Objective | None:
    """The objective that is meant. ConfigError for one of a model's outputs, which no adapter sees."""
    objective = objective_of(given)
    if objective is not None and not objective.of_weights:
        raise ConfigError(
            f"objective='{objective.name}' is of the model's outputs, which an adapter does not see; add it to the "
            "loss: loss + objective(model, batch, outputs), or fallow.add_objective(model, objective)"
        )
    return objective


def accompany(deltas: Mapping[str, Delta], own_loss: Penalty = "step", objective: Objective | None = None) -> None:
    """Let an adapter's Deltas, by the names of their weights, have their steps, their penalty and one of all of them.

    ConfigError for another word.
    """
    one_of("own_loss", own_loss, get_args(Penalty))
    stepping = {name: delta for name, delta in deltas.items() if type(delta).on_step is not Delta.on_step}
    with_loss = {name: delta for name, delta in deltas.items() if type(delta).loss is not Delta.loss}
    penalised = dict(deltas) if objective is not None else with_loss
    if stepping or penalised:
        schedule.carry(next(iter(deltas.values())), EachStep(stepping, penalised, objective, added=own_loss == "step"))
    if objective is not None:
        schedule.carry(next(iter(deltas.values())), objective)


def penalty(model: nn.Module) -> Tensor:
    """The sum of `loss()` over the trained Deltas of a model, and of `objective=` of attach: a scalar, 0 for none.

    For adapters made with `own_loss="manual"`; added to the objective beside "step" it counts twice.
    """
    total = torch.zeros(())
    deltas = [module for module in model.modules() if isinstance(module, Delta)]
    within = {id(part) for delta in deltas for part in delta.modules() if part is not delta}  # blocks of a fused weight
    terms = [delta.loss() for delta in deltas if id(delta) not in within and trained(delta)]
    terms += [each.of_all() for each in schedule.attached(model) if isinstance(each, EachStep)]
    for term in terms:
        total = total if term is None else total.to(term.device) + term
    return total


@cache
def hook_optimizers() -> None:
    """Let penalties have their gradients before each step of every optimizer."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    held = {id(param) for group in optimizer.param_groups for param in group["params"] if param.grad is not None}
    params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
    scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer divides by it inside its step
    with torch.enable_grad():
        terms = [term for each in list(_PENALISED) for term in each.terms(held) if term.requires_grad]
        if not terms:
            return
        params = list(dict.fromkeys(params))
        grads = torch.autograd.grad(torch.stack(terms).sum(), params, allow_unused=True)
    for param, grad in zip(params, grads, strict=True):
        if isinstance(grad, Tensor):  # None where no term needs the parameter
            grad = grad if scale is None else grad * scale
            param.grad = grad if param.grad is None else param.grad.add_(grad)
