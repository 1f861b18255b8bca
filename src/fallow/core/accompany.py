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

    `penalised`: those whose `loss()` is added before an optimizer's step. Copies of the Deltas have one of their own.
    """

    def __init__(self, stepping: Mapping[str, Delta], penalised: Mapping[str, Delta]) -> None:
        self.stepping, self.penalised = Weakly(stepping), Weakly(penalised)
        self.steps = 0
        self.total: int | None = None
        self._begin(bool(penalised))

    def _begin(self, penalises: bool) -> None:
        if penalises:
            _PENALISED.add(self)
            _hook_all_optimizers()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin(next(self.penalised.items(), None) is not None)

    def resolve(self, total: int) -> None:
        self.total = total

    def check(self) -> None:
        """Nothing depends on the length of the run before it is known."""

    def advance(self) -> bool:
        """Whether any Delta was there to be told."""
        self.steps += 1
        present = [delta for delta in self.stepping.values() if trained(delta)]
        for delta in present:
            delta.on_step(self.steps, self.total)
        return bool(present)


def trained(delta: Delta) -> bool:
    return any(param.requires_grad for param in delta.all_parameters())


def accompany(deltas: Mapping[str, Delta], own_loss: Penalty = "step") -> None:
    """Let an adapter's Deltas, by the names of their weights, have their steps and their penalty.

    ConfigError for another word.
    """
    one_of("own_loss", own_loss, get_args(Penalty))
    stepping = {name: delta for name, delta in deltas.items() if type(delta).on_step is not Delta.on_step}
    penalised = {name: delta for name, delta in deltas.items() if type(delta).loss is not Delta.loss}
    penalised = penalised if own_loss == "step" else {}
    if stepping or penalised:
        schedule.carry(next(iter(deltas.values())), EachStep(stepping, penalised))


def penalty(model: nn.Module) -> Tensor:
    """The sum of `loss()` over the trained Deltas of a model: a scalar, 0 where there is none.

    For adapters made with `own_loss="manual"`; added to the objective beside "step" it counts twice.
    """
    total = torch.zeros(())
    deltas = [module for module in model.modules() if isinstance(module, Delta)]
    within = {id(part) for delta in deltas for part in delta.modules() if part is not delta}  # blocks of a fused weight
    for delta in deltas:
        if id(delta) not in within and trained(delta) and (term := delta.loss()) is not None:
            total = total.to(term.device) + term
    return total


@cache
def _hook_all_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    held = {id(param) for group in optimizer.param_groups for param in group["params"] if param.grad is not None}
    deltas = [delta for each in list(_PENALISED) for delta in each.penalised.values()]
    deltas = [delta for delta in deltas if any(id(param) in held for param in delta.all_parameters())]
    if not deltas:
        return
    scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer divides by it inside its step
    params = list(dict.fromkeys(p for delta in deltas for p in delta.all_parameters() if p.requires_grad))
    with torch.enable_grad():
        terms = [term for delta in deltas if (term := delta.loss()) is not None and term.requires_grad]
        if not terms:
            return
        grads = torch.autograd.grad(torch.stack(terms).sum(), params, allow_unused=True)
    for param, grad in zip(params, grads, strict=True):
        if isinstance(grad, Tensor):  # None where no term needs the parameter
            grad = grad if scale is None else grad * scale
            param.grad = grad if param.grad is None else param.grad.add_(grad)
