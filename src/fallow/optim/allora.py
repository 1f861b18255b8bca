"""ALLoRA: rows of a LoRA that are still small get larger gradients; no dropout, no scale.

"ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", arXiv 2410.09692. W' = W + B A; G (out, in) the gradient of
B A, never formed. Row i of G counts

    c_i = 1 / sqrt(|(B A)_i| + 1 / eta²)        dA = Bᵀ diag(c) G      dB = diag(c) G Aᵀ      dx = (W + B A)ᵀ dy

so eta times while the row is zero, and less as it grows. c comes from A and B as they are at each backward pass and
has no gradient; |(B A)_i|² is B_i (A Aᵀ) B_iᵀ, so nothing of the size of W is formed.

    optimizer = torch.optim.SGD(...)
    allora = fallow.ALLoRA(model, optimizer, eta=2.0)

`where`: "grad" is the paper. Adam and its like divide by the size of the gradient, which takes most of a gain away
again: measured, they train as without it. "update" (ours) scales what the optimizer makes of the gradients: the update
of B by c_i row by row, that of A by the mean of c; any optimizer, any of its decay included.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fallow.core.delta import number, one_of
from fallow.core.errors import ConfigError
from fallow.optim.pairs import Pair, Stack, find_pairs, refuse_started, stacked
from fallow.optim.row_scaling import Gain, row_gains, scale_backward

Where = Literal["grad", "update"]
By = Literal["rows", "outputs"]
NORMALISING = ("adam", "lion", "adafactor", "rmsprop", "prodigy", "schedulefree", "muon", "lowrank")


class ALLoRA:
    """Scales the training of the LoRAs of `model`, ours or PEFT's, for as long as it is not released.

    `eta`: the gain of a row that is zero; the paper tries eta² of 1, 2 and 4. `by`: "rows", or "outputs", the paper's
    output-dependent variant ALLoRA-OD: 1 / sqrt(|y| + 1 / eta²) of every token, "grad" alone. `optimizer`: any;
    without one `bind(optimizer)` starts, which `fallow.Callback(allora)` calls for a Trainer. Other modules that share
    an adapted weight under another shape, such as an output layer tied to an embedding, add their gradients unscaled.

    ConfigError where there is no LoRA, or one has a start that is subtracted, or another scale than 1 (give alpha =
    rank), or an impossible value.
    """

    def __init__(
        self, model: nn.Module, optimizer: Any = None, *, eta: float = 2.0, where: Where = "grad", by: By = "rows"
    ) -> None:
        number("eta", eta, open_below=True)
        one_of("where", where, get_args(Where))
        one_of("by", by, get_args(By) if where == "grad" else ("rows",))
        self.pairs = find_pairs(model, "ALLoRA")
        refuse_started(self.pairs, "ALLoRA")
        for pair in self.pairs:
            _check(pair, by)
        self.eta, self.where, self.by = float(eta), where, by
        self.optimizer: torch.optim.Optimizer | None = None
        self.hooks: list[Any] = []
        self.before: list[tuple[Stack, Tensor, Tensor]] = []
        if optimizer is not None:
            self.bind(optimizer)

    def bind(self, optimizer: Any, steps: int = 0) -> ALLoRA:
        """Scale from now on. ConfigError where the optimizer lacks a factor. Warns where it would undo the scaling."""
        if self.optimizer is not None:
            raise ConfigError("this ALLoRA follows an optimizer already; call release() first, or make another")
        optimizer = innermost(optimizer)
        check_holds(optimizer, self.pairs, "ALLoRA")
        self.optimizer = optimizer
        if self.where == "update":
            hooks = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
            self.hooks = [add(hook) for add, hook in zip(hooks, (self._before, self._after), strict=True)]
            return self
        name = type(optimizer).__name__
        if any(kind in name.lower() for kind in NORMALISING):
            warnings.warn(
                f"ALLoRA(where='grad') does next to nothing under {name}, which divides by the size of the gradient; "
                "give where='update', or an optimizer such as SGD",
                stacklevel=2,
            )
        self.hooks = [scale_backward(pair, Gain(self.eta, self.by == "outputs")) for pair in self.pairs]
        return self

    def release(self) -> None:
        """Scale no more; the factors stay as they are."""
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.optimizer = [], None

    def resume(self, steps: int) -> None:
        """Nothing is to be known: the gains follow from the factors."""

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.before = [(stack, *stack.factors()) for stack in stacked(self.pairs)]

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for stack, a, b in self.before:
            c = row_gains(a, b, self.eta)
            for_a, for_b = stack.factors()
            for_a = a + c.mean(1).view(-1, 1, 1) * (for_a - a)
            for_b = b + c.unsqueeze(2) * (for_b - b)
            params = [pair.a for pair in stack.pairs] + [pair.b for pair in stack.pairs]
            values = [v.view(p.shape) for p, v in zip(params, [*for_a, *for_b], strict=True)]
            torch._foreach_copy_(params, values)  # type: ignore[arg-type]
        self.before = []


def _check(pair: Pair, by: By) -> None:
    if pair.scale() != 1.0:
        raise ConfigError(f"ALLoRA has no scale, and '{pair.name}' has one of {pair.scale():g}; give alpha = rank")
    if pair.view.kind == "parameter" and not hasattr(pair.parts[0], "delta_weight"):
        raise ConfigError(f"ALLoRA cannot reach '{pair.name}', whose module reads PEFT's factors itself; leave it out")
    if by == "outputs" and pair.view.kind in ("parameter", "embedding"):
        raise ConfigError(f"by='outputs' needs what a layer adds to its output, which '{pair.name}' does not tell")


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """Without the wrapper of Accelerate's."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def check_holds(optimizer: torch.optim.Optimizer, pairs: list[Pair], rule: str) -> None:
    """ConfigError where the optimizer lacks a factor."""
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for pair in pairs:
        if id(pair.a) not in held or id(pair.b) not in held:
            raise ConfigError(
                f"the optimizer of {rule} lacks a factor of '{pair.name}'; make it over all that is trained"
            )
