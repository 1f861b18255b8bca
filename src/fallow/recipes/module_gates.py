"""Gates and factors of a module search, and one step of each: the relaxed form of DiffoRA's choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fallow.budgets.diffora import DiffoRARanks, Scope
from fallow.core.delta import Delta, number, one_of, whole
from fallow.core.distributed import broadcast, mean
from fallow.core.errors import ConfigError, TrainingError
from fallow.core.probing.batches import Loss, loss_of
from fallow.deltas.diffora import DiffoRA


@dataclass(kw_only=True)
class Search:
    """How the search goes. ConfigError, by name, for what cannot be.

    `steps`, `warmup`: all, and those of the factors alone; None for a fifth. `lr`, `decay`: of the factors (AdamW).
    `lr_gates`, `betas`, `decay_gates`: of the logits (Adam). `gate`: "softmax" of a layer's modules, or "sigmoid".
    `mean_one`: gates times the number of modules in a layer, so that their mean is 1. `temperature`: of softmax, from
    and to. `order`: "first", or "second", which looks one step of the factors ahead. `score`: what modules are compared
    by, "gate", "effective", the gate times the size of the change, or "change", that size alone, which needs no gates.
    `settled`: stop once the choice has been the same for so many steps; 0 for never.
    """

    steps: int = 200
    warmup: int | None = None
    lr: float = 5e-3
    decay: float = 0.0
    lr_gates: float = 3e-3
    betas: tuple[float, float] = (0.5, 0.999)
    decay_gates: float = 1e-3
    gate: Literal["softmax", "sigmoid"] = "softmax"
    mean_one: bool = False
    temperature: tuple[float, float] = (1.0, 0.3)
    order: Literal["first", "second"] = "first"
    score: Literal["gate", "effective", "change"] = "gate"
    settled: int = 0

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        self.warmup = self.steps // 5 if self.warmup is None else self.warmup
        whole("warmup", self.warmup, 0)
        if self.warmup >= self.steps:
            raise ConfigError(f"warmup={self.warmup} of steps={self.steps} leaves none for the gates; give fewer")
        for name in ("lr", "lr_gates"):
            number(name, getattr(self, name), open_below=True)
        for name in ("decay", "decay_gates"):
            number(name, getattr(self, name))
        for value in self.temperature:
            number("temperature", value, open_below=True)
        one_of("gate", self.gate, ("softmax", "sigmoid"))
        one_of("order", self.order, ("first", "second"))
        one_of("score", self.score, ("gate", "effective", "change"))
        one_of("mean_one", self.mean_one, (False, True))
        whole("settled", self.settled, 0)


class Relaxed:
    """One search: logits `a` (a vector for each layer), the factors of all Deltas, an optimizer of each."""

    def __init__(
        self,
        model: nn.Module,
        deltas: Mapping[str, Delta],
        told: Search,
        rows: dict[str, list[str]],
        loss: Loss | None,
    ) -> None:
        self.model, self.told, self.rows, self.loss = model, told, rows, loss
        self.deltas: dict[str, DiffoRA] = {n: d for n, d in deltas.items() if isinstance(d, DiffoRA)}
        device = next(iter(self.deltas.values())).A.device
        self.logits = {row: torch.zeros(len(names), device=device).requires_grad_() for row, names in rows.items()}
        self.factors = [param for delta in self.deltas.values() for param in delta.parameters()]
        broadcast(self.factors)  # drawn in each process
        self.of_gates = torch.optim.Adam(
            list(self.logits.values()), lr=told.lr_gates, betas=told.betas, weight_decay=told.decay_gates
        )
        self.of_factors = torch.optim.AdamW(self.factors, lr=told.lr, weight_decay=told.decay)
        self.steps = 0

    def run(
        self, train: Iterator[Any], validation: Iterator[Any], choice: Callable[[dict[str, float]], list[str]]
    ) -> None:
        """All steps, or until the choice stays."""
        last: list[str] = []
        same = 0
        for step in range(self.told.steps):
            batch = next(train)
            if step >= (self.told.warmup or 0):
                self.move_gates(next(validation), batch)
            self.move_factors(batch)
            self.steps = step + 1
            if self.told.settled and step >= (self.told.warmup or 0):
                now = choice(self.scores())
                same = same + 1 if now == last else 1
                last = now
                if same >= self.told.settled:
                    return

    def temperature(self) -> float:
        first, last = self.told.temperature
        return first + (last - first) * self.steps / max(1, self.told.steps - 1)

    def gates(self) -> dict[str, Tensor]:
        """gamma of each module, a scalar, differentiable in the logits."""
        found: dict[str, Tensor] = {}
        for row, names in self.rows.items():
            a = self.logits[row]
            gamma = torch.sigmoid(a) if self.told.gate == "sigmoid" else torch.softmax(a / self.temperature(), 0)
            found.update(zip(names, gamma.unbind(), strict=True))
        return found

    def loss_at(self, batch: Any, gates: dict[str, Tensor]) -> Tensor:
        """The loss of a batch with these gates. TrainingError where it is no number."""
        for names in self.rows.values():
            for name in names:
                times = len(names) if self.told.mean_one else 1
                self.deltas[name].__dict__["coefficient"] = gates[name] * times
        value = loss_of(self.model, batch, self.loss)
        if not bool(torch.isfinite(value.detach())):
            raise TrainingError(
                f"the loss is {float(value.detach())} at step {self.steps + 1}; lower lr={self.told.lr}"
            )
        return value

    def move_factors(self, batch: Any) -> None:
        """One step of theta by a training batch; the gates stay."""
        value = self.loss_at(batch, {name: gate.detach() for name, gate in self.gates().items()})
        self._set(self.factors, torch.autograd.grad(value, self.factors))
        self.of_factors.step()

    def move_gates(self, validation: Any, train: Any) -> None:
        """One step of a by a validation batch; the factors stay."""
        logits = list(self.logits.values())
        if self.told.order == "second":
            grads = self.ahead(validation, train)
        else:
            grads = torch.autograd.grad(self.loss_at(validation, self.gates()), logits)
        self._set(logits, grads)
        self.of_gates.step()

    def ahead(self, validation: Any, train: Any) -> tuple[Tensor, ...]:
        """The gradient of L_validation(theta - lr grad L_train, a) in a, its second part by a central difference."""
        logits, rate = list(self.logits.values()), self.told.lr
        before = [param.detach().clone() for param in self.factors]
        step = torch.autograd.grad(self.loss_at(train, self.gates()), self.factors)
        self._put(before, step, -rate)
        found = torch.autograd.grad(self.loss_at(validation, self.gates()), [*logits, *self.factors])
        direct, towards = found[: len(logits)], found[len(logits) :]
        size = 1e-2 / (torch.stack([part.norm() for part in towards]).norm() + 1e-12)
        sides = []
        for sign in (1.0, -1.0):
            self._put(before, towards, sign * size)
            sides.append(torch.autograd.grad(self.loss_at(train, self.gates()), logits))
        self._put(before, towards, 0.0)
        return tuple(g - rate * (up - down) / (2 * size) for g, up, down in zip(direct, *sides, strict=True))

    @torch.no_grad()
    def _put(self, values: list[Tensor], along: Iterable[Tensor], times: float | Tensor) -> None:
        for param, value, part in zip(self.factors, values, along, strict=True):
            param.copy_(value + times * part)

    @staticmethod
    def _set(params: list[Any], grads: Iterable[Tensor]) -> None:
        for param, grad in zip(params, grads, strict=True):
            param.grad = mean(grad.detach().clone())

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """What modules are compared by; gates of rows of other lengths as shares of what equal ones would have."""
        gates, kind = self.gates(), self.told.score
        names = [name for held in self.rows.values() for name in held]
        times = {name: len(held) if self.told.gate == "softmax" else 1 for held in self.rows.values() for name in held}
        gamma = torch.stack([gates[name] * times[name] for name in names])
        if kind != "gate":
            size = torch.stack([self.deltas[name].size().to(gamma) for name in names])
            gamma = size if kind == "change" else gamma * size
        return dict(zip(names, gamma.tolist(), strict=True))

    @torch.no_grad()
    def found(self, share: float, scope: Scope) -> DiffoRARanks:
        gates = {name: float(gate) for name, gate in self.gates().items()}
        entropy = []
        for names in self.rows.values():
            shares = torch.tensor([gates[name] for name in names]).double()
            shares = shares / shares.sum()
            entropy.append(float(torch.special.entr(shares).sum()) / math.log(len(names)) if len(names) > 1 else 1.0)
        shapes = {name: delta.view.shape for name, delta in self.deltas.items()}
        rows = {name: row for row, names in self.rows.items() for name in names}
        made = DiffoRARanks(self.scores(), shapes, gates, rows, share, scope, self.steps, sum(entropy) / len(entropy))
        made.chosen  # noqa: B018  # refuses gates that have not moved
        return made
