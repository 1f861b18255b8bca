"""What lets the ranks of an adapter grow while it trains: counts steps, gathers scores, decides, adds.

With stages (AdaLoRA's form) all lies in a Delta's own buffers, and resumes with them; `state_dict()` is for others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fallow.budgets.growable import Growable, Resized, Staged
from fallow.core.accompany import trained
from fallow.core.delta import Delta
from fallow.core.distributed import mean
from fallow.core.errors import ConfigError, ModelError
from fallow.core.factor_pair import FactorPair
from fallow.core.fused import single
from fallow.core.pacing import Pace, adam_catches_up, keep_pace
from fallow.core.schedule import attached
from fallow.core.sensitivity import smoothed
from fallow.core.sharded import is_dtensor

if TYPE_CHECKING:
    from fallow.budgets.increlora import IncreLoRA


class Growing:
    """To `fallow.step` and `fallow.Callback` a Schedule; to `fallow.core.pacing` what has ranks with paces."""

    def __init__(self, budget: IncreLoRA, deltas: Mapping[str, Delta], rank: int) -> None:
        self.budget, self.rank = budget, rank
        parts = [pair for name, delta in deltas.items() for pair in single(name, delta)]
        self.parts: list[Growable] = [
            growable(name, delta, budget.first, budget.growth(rank) if budget.reserve else 0, budget.score == "exact")
            for name, delta in parts
        ]
        self.goal = min(rank * len(parts), sum(part.most for part in self.parts))
        self.steps = 0
        self.total: int | None = None
        self._given = False
        self._at: dict[int, tuple[Growable, str]] = {}
        keep_pace(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        keep_pace(self)

    @property
    def steps(self) -> int:
        """How many optimizer steps were made; the next one's passes are scored where that is due."""
        return self._steps

    @steps.setter
    def steps(self, made: int) -> None:
        self._steps = made
        for part in self.parts:
            part.observe((made + 1) % self.budget.score_every == 0)

    # -- a Schedule ---------------------------------------------------------------------------------------------------

    def resolve(self, total: int) -> None:
        self.total = total
        self.budget.due(len(self.parts), self.rank, total)

    def check(self) -> None:
        """ConfigError where growth hangs on the length of the run, which is not known."""
        self.budget.due(len(self.parts), self.rank, self.total)

    def advance(self) -> bool:
        """After an optimizer step; whether it grew."""
        self.steps += 1
        if self.finished():
            self._finish()
            return False
        if not any(trained(part.delta) for part in self.parts):
            return False
        if self.steps % self.budget.score_every == 0:
            self._score()
        begin, every = self.budget.due(len(self.parts), self.rank, self.total)
        if self.steps <= begin or self.steps % every:
            return False
        self._grow()
        if self.finished():
            self._finish()
        return True

    def finished(self) -> bool:
        """Whether all the rank is given."""
        return self._given or sum(part.rank for part in self.parts) >= self.goal

    def follows(self, delta: Delta) -> bool:
        return any(part.delta is delta for part in self.parts)

    def _finish(self) -> None:
        self._given = True  # also where ranks are cut later
        for part in self.parts:
            part.finish()

    @torch.no_grad()
    def _score(self) -> None:
        """Take in what the passes since the last step say."""
        device = self.parts[0].score.device
        scores = torch.stack([part.score.to(device) for part in self.parts])
        value = mean(torch.stack([part.taken().to(device) for part in self.parts]))
        total = value.sum()
        if not self.budget.absolute:
            value = value / total
        said = torch.isfinite(value).all() & (total > 0)  # no passes, or none without an overflow, say nothing
        after = torch.where(said, smoothed(scores, value, (self.budget.beta1, self.budget.beta2)), scores)
        for part, score in zip(self.parts, after.unbind(), strict=True):
            part.score.copy_(score)

    def _grow(self) -> None:
        device = self.parts[0].score.device
        scores = torch.stack([part.score.to(device) for part in self.parts]).prod(-1).tolist()
        room = [part.most - part.rank for part in self.parts]
        left = self.goal - sum(part.rank for part in self.parts)
        step, top = self.budget.growth(self.rank), self.budget.at_once(len(self.parts))
        for i, count in chosen(scores, room, top, step, left).items():
            before = self.parts[i].rank
            self.parts[i].grow(count, self.steps)
            if self.budget.compat_scale:
                self.parts[i].shrink(before, before / (before + count))

    # -- paces of new ranks -------------------------------------------------------------------------------------------

    def gathered(self, held: set[int]) -> None:
        due = (self.steps + 1) % self.budget.score_every == 0
        if self.budget.score == "gates" and due and not self.finished():
            for part in self.parts:
                part.gather(held)

    def parameters(self) -> Iterator[tuple[nn.Parameter, int]]:
        self._at = {}
        for part in self.parts:
            for name, (param, dim) in part.parameters().items():
                self._at[id(param)] = part, name
                yield param, dim

    def paces(self, param: nn.Parameter, group: Mapping[str, Any], state: Mapping[str, Any]) -> list[Pace]:
        part, name = self._at[id(param)]
        paces: list[Pace] = []
        for first, last, born in part.runs(name):
            pace = 0.0 if born is None else self.pace(self.steps - born, group, state)
            if pace != 1.0:
                paces.append((first, last, pace))
        return paces

    def pace(self, age: int, group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        """f of ranks that have made `age` steps, in the next one."""
        warmup = self.warmup
        factor = 1.0 if age >= warmup else age / warmup
        peak, now = group.get("initial_lr"), float(group["lr"])
        if peak is not None and self.total is not None and now > 0:
            if age >= warmup:
                whole = self.total - (self.steps - age)
                factor = max(0.0, (whole - age) / max(1, whole - warmup))
            factor *= float(peak) / now
        return factor * adam_catches_up(age + 1, group, state)

    @property
    def warmup(self) -> int:
        if self.budget.warmup is not None:
            return self.budget.warmup
        return self.budget.due(len(self.parts), self.rank, self.total)[1]

    # -- what resumes those without stages ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values: steps, and of each weight its rank, the steps in which its ranks came, its scores."""
        held = {part.name: {"born": part.ages("A"), "score": part.score.tolist()} for part in self.parts}
        return {"steps": self.steps, "weights": held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give a fresh adapter these ranks; its tensors can be loaded then. ConfigError where it has other weights."""
        if state["weights"].keys() != {part.name for part in self.parts}:
            raise ConfigError(f"this adapter grows in {len(self.parts)} weights, others than those of the state")
        for part in self.parts:
            told = state["weights"][part.name]
            part.restore(told["born"], torch.tensor(told["score"]))
        self.steps = int(state["steps"])


def growable(name: str, delta: Delta, first: int, reserve: int, exact: bool) -> Growable:
    """ConfigError for a method that cannot grow."""
    if any(is_dtensor(param) for param in delta.parameters()):
        raise ModelError(f"'{name}' is sharded; its rank cannot grow")
    added = delta.exact and delta.mode == "add"
    if not {"A", "B"} <= delta._parameters.keys() or not (added or (isinstance(delta, FactorPair) and not exact)):
        raise ConfigError(
            f"budget='increlora' lets ranks grow, which '{delta.name}' at '{name}' cannot; use 'adalora' (the paper's "
            "form), lora or sora, or dora with fallow.IncreLoRA(score='gates')"
        )
    if getattr(delta.o, "offset", 0):
        raise ConfigError(f"'{name}' has taken its start out of the weight, which cannot grow; leave start= out")
    if first > delta.o.rank:
        raise ConfigError(f"first={first} is above the rank of {delta.o.rank} that '{name}' can have; give less")
    if hasattr(delta, "stage"):
        return Staged(name, delta, first, reserve, exact)
    return Resized(name, delta, first, exact)


def chosen(scores: Sequence[float], room: Sequence[int], top: int, step: int, left: int) -> dict[int, int]:
    """How many ranks each of the `top` best weights with room gets, `left` of them in all at most."""
    best = sorted((i for i, free in enumerate(room) if free > 0), key=lambda i: -scores[i])[:top]
    given: dict[int, int] = {}
    for i in best:
        given[i] = min(step, room[i], left - sum(given.values()))
    return {i: count for i, count in given.items() if count > 0}


def growing(model: nn.Module) -> Growing:
    """What lets a model's adapter grow. ConfigError where nothing does."""
    for each in attached(model):
        if isinstance(each, Growing):
            return each
    raise ConfigError(f"no adapter of {type(model).__name__} grows; attach it with budget='increlora'")
