"""What takes rank from an adapter in AdaLoRA's form while it trains: counts steps, gathers scores, zeroes triplets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fallow.budgets.growable import DIMENSION
from fallow.core.accompany import trained
from fallow.core.delta import Delta
from fallow.core.errors import ConfigError
from fallow.core.fused import single
from fallow.core.pacing import Pace, keep_pace
from fallow.core.schedule import attached

if TYPE_CHECKING:
    from fallow.budgets.adalora import AdaLoRARanks


class Pruning:
    """To `fallow.step` and `fallow.Callback` a Schedule. `held`: the two means (2, ...) of each weight's tensors."""

    def __init__(self, budget: AdaLoRARanks, deltas: Mapping[str, Delta], rank: int) -> None:
        self.budget = budget
        self.parts: dict[str, Any] = {part: d for name, delta in deltas.items() for part, d in single(name, delta)}
        for name, delta in self.parts.items():
            if not hasattr(delta, "stage"):
                raise ConfigError(
                    f"budget='adalora' weighs triplets, which '{delta.name}' at '{name}' has not; attach 'adalora'"
                )
            if delta.o.offset:
                raise ConfigError(
                    f"'{name}' has taken its start out of the weight, which no zero undoes; leave start= out"
                )
        self.first = sum(int(delta.stage.shape[0]) for delta in self.parts.values())
        self.last = min(rank * len(self.parts), self.first)
        self.held: dict[str, dict[str, Tensor]] = {}
        self.steps = 0
        self.total: int | None = None
        keep_pace(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        keep_pace(self)

    # -- a Schedule ---------------------------------------------------------------------------------------------------

    def resolve(self, total: int) -> None:
        self.total = total
        self.budget.bounds(total)

    def check(self) -> None:
        """ConfigError where what is due hangs on the length of the run, which is not known."""
        self.budget.bounds(self.total)

    @torch.no_grad()
    def advance(self) -> bool:
        """After an optimizer step; whether triplets were zeroed."""
        self.steps += 1
        begin, end = self.budget.bounds(self.total)
        if self.steps > end:
            for delta in self.parts.values():
                delta.gate.masked_fill_(delta.stage == 0, 0.0)
            return False
        if not any(trained(delta) for delta in self.parts.values()):
            return False
        if self.steps <= begin or (self.steps % self.budget.every and self.steps != end):
            return False
        self._keep(left(self.steps, begin, end, self.first, self.last), final=self.steps == end)
        if self.steps == end:
            self.held.clear()
        return True

    def follows(self, delta: Delta) -> bool:
        return any(each is delta for each in self.parts.values())

    def finished(self) -> bool:
        """Whether the last decision is made."""
        return self.steps >= self.budget.bounds(self.total)[1]

    def _keep(self, count: int, final: bool) -> None:
        """Zero all but the best; `final`: for good."""
        device = next(iter(self.parts.values())).gate.device
        scores = torch.cat([self.score(name).to(device) for name in self.parts])
        kept = torch.zeros(len(scores), dtype=torch.bool, device=device)
        kept[scores.sort(descending=True, stable=True).indices[:count]] = True
        sizes = [int(delta.stage.shape[0]) for delta in self.parts.values()]
        for delta, mask in zip(self.parts.values(), kept.split(sizes), strict=True):
            mask = mask.to(delta.gate.device)
            delta.gate.masked_fill_(~mask, 0.0)
            if final:
                delta.stage.copy_(torch.where(mask, 2, 0))

    def score(self, name: str) -> Tensor:
        """(r,): S of the triplets of a weight; zeros where none has had a gradient."""
        delta, held = self.parts[name], self.held.get(name, {})
        found = torch.zeros_like(delta.gate, dtype=torch.float32)
        for tensor, means in held.items():
            each = means.prod(0)
            found += each if tensor == "gate" else each.mean(1 if tensor == "A" else 0)
        return found

    # -- what gathers the scores --------------------------------------------------------------------------------------

    @torch.no_grad()
    def gathered(self, held: set[int]) -> None:
        if self.finished():
            return
        for name, delta in self.parts.items():
            for tensor in DIMENSION:
                param = delta._parameters[tensor]
                if id(param) in held and param.grad is not None:
                    mine = self.held.setdefault(name, {})
                    if tensor not in mine:
                        mine[tensor] = param.new_zeros(2, *param.shape, dtype=torch.float32)
                    self._smooth(mine[tensor], (param * param.grad).abs_().float())

    def _smooth(self, means: Tensor, value: Tensor) -> None:
        mean, spread = means.unbind()
        mean.lerp_(value, 1 - self.budget.beta1)
        spread.lerp_(value.sub_(mean).abs_(), 1 - self.budget.beta2)

    def parameters(self) -> Iterator[tuple[nn.Parameter, int]]:
        for delta in self.parts.values():
            yield from ((delta._parameters[name], dim) for name, dim in DIMENSION.items())

    def paces(self, param: nn.Parameter, group: Mapping[str, Any], state: Mapping[str, Any]) -> list[Pace]:
        return []

    def state_dict(self) -> dict[str, Any]:
        """The step count and the means, by weight and tensor."""
        return {"steps": self.steps, "means": {name: dict(held) for name, held in self.held.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """ConfigError where the adapter has other weights."""
        if not state["means"].keys() <= self.parts.keys():
            raise ConfigError("the state is of an adapter of other weights")
        self.steps = int(state["steps"])
        self.held = {
            name: {tensor: value.to(self.parts[name].gate.device) for tensor, value in held.items()}
            for name, held in state["means"].items()
        }


def left(step: int, begin: int, end: int, first: int, last: int) -> int:
    """b(t): how many of `first` triplets are left at a step."""
    if step <= begin:
        return first
    share = max(0.0, 1 - (step - begin) / (end - begin))
    return int((first - last) * share**3 + last)


def pruning(model: nn.Module) -> Pruning:
    """What takes rank from a model's adapter. ConfigError where nothing does."""
    for each in attached(model):
        if isinstance(each, Pruning):
            return each
    raise ConfigError(f"no adapter of {type(model).__name__} is pruned; attach it with budget='adalora'")
