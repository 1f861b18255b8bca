"""LoRA-GGPO and LoRA-MGPO: gradients at slightly perturbed weights, to prefer flat regions, with one backward pass.

"LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation Optimization", arXiv
2502.14538 v1, and what became of it, "LoRA-MGPO: ... via Momentum-Guided Perturbation Optimization", v2 to v4.

    ggpo   W' + E,  E normal, std_i = sigma / sqrt(in) sqrt(|W'_i|² + beta |G_i|²) in row i
           G = s (dB A + B dA) of the last step's gradients, 0 at first. beta = 0, ramp="cosine": Flat-LoRA
    mgpo   theta + e of theta = (A, B) of all layers,  e = sign rho m / |m| / g,  m the optimizer's momentum
           g <- beta g + (1 - beta) |gradient|, starting at the first norm; nothing at the first step
           space="weight": E = sign rho d / |d| / g in each layer, d = s (m_B A + B m_A)

    ggpo = fallow.GGPO(model, optimizer)     # that is all; call model.train() and model.eval() as ever

The optimizer moves the unperturbed values; the frozen weights are never touched, A and B are put back bit for bit.

Departures: norms are those before clipping, once per step; 1 / g is capped at `cap` times what it was at first (the
official code: at 10, in whatever units); the gradient of layers below sees the noise (one public version hides it).
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fallow.core.delta import number, one_of
from fallow.core.errors import ConfigError
from fallow.optim.allora import check_holds, innermost
from fallow.optim.momentum import Ahead, momentum_of, no_momentum
from fallow.optim.observing import Observed, when_gradients_are_there
from fallow.optim.pairs import find_pairs, refuse_started, row_norms_squared
from fallow.optim.perturbed import Displaced, Layer, layers_of
from fallow.optim.row_noise import Combine, Ramp, RowNoise

Mode = Literal["ggpo", "mgpo"]
Space = Literal["param", "weight"]
EVERYTHING = ""  # the name of the one norm of mode="mgpo", space="param"


class GGPO:
    """Perturbs the LoRA layers of `model`, ours or PEFT's, in training, at the steps of `optimizer`, any of torch's.

    `mode`: see the module. ggpo: `sigma`; `beta` 0.01 unless given; `ramp`: "cosine" lets sigma rise from 0 over
    `total_steps`; `combine`: "variance" as above, or "kohya", std_i = (sigma |W'_i| + beta |G_i|²) / sqrt(out). mgpo:
    `rho`, 0.05 in the paper for language understanding and 0.01 for generation; `beta` 0.9 unless given; `space`,
    `sign`, `cap`. The paper's sign is +1, its code's -1, which looks ahead along the coming step; measured, -1 is the
    better. `scaler`: a GradScaler, if there is one: its scale is divided out of the norms. Without an optimizer
    `bind(optimizer)` starts, which `fallow.Callback(ggpo)` calls for a Trainer. In several processes each perturbs by
    its own noise or norms, which are then those after clipping.

    ConfigError where there is no LoRA, or one has a start that is subtracted (ggpo), or a value cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any = None,
        *,
        mode: Mode = "ggpo",
        sigma: float = 0.03,
        rho: float = 0.05,
        beta: float | None = None,
        ramp: Ramp = None,
        total_steps: int | None = None,
        combine: Combine = "variance",
        space: Space = "param",
        sign: Literal[-1, 1] = -1,
        cap: float = 10.0,
        scaler: torch.amp.GradScaler | None = None,
        seed: int = 0,
    ) -> None:
        one_of("mode", mode, get_args(Mode))
        one_of("space", space, get_args(Space))
        one_of("sign", sign, (-1, 1))
        number("rho", rho)
        number("cap", cap, least=1.0)
        beta = (0.01 if mode == "ggpo" else 0.9) if beta is None else beta
        number("beta", beta, most=1.0 if mode == "mgpo" else math.inf)
        self.model, self.mode = model, mode
        self.noise = RowNoise(sigma, beta, ramp, total_steps, combine, seed)
        self.ahead = Ahead(rho, sign, beta, cap)
        self.pairs = find_pairs(model, "GGPO")
        if mode == "ggpo":
            refuse_started(self.pairs, "GGPO")
        self.inside = mode == "mgpo" and space == "param"
        self.layers = layers_of(self.pairs, self._noise if mode == "ggpo" else self._along, readers=self.inside)
        self.optimizer: torch.optim.Optimizer | None = None
        self.hooks: list[Any] = []
        self.steps = 0
        self.gradients, self.displaced = Observed(self.layers, self._measure, scaler), Displaced()
        if optimizer is not None:
            self.bind(optimizer)

    def bind(self, optimizer: Any, steps: int = 0) -> GGPO:
        """Follow this optimizer, which has made so many steps. ConfigError where it lacks a factor."""
        if self.optimizer is not None:
            raise ConfigError("this GGPO follows an optimizer already; call release() first, or make another")
        optimizer = innermost(optimizer)
        check_holds(optimizer, self.pairs, "GGPO")
        self.optimizer, self.steps = optimizer, steps
        self.hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_post_hook(self._saved),
            optimizer.register_load_state_dict_pre_hook(self._loading),
            *self.gradients.hooks(),
        ]
        if self.inside:
            self.hooks.append(self.model.register_forward_pre_hook(self._forward))
            self.hooks.append(self.model.register_state_dict_pre_hook(lambda *_: self.displaced.restore()))
        else:
            self.hooks += [layer.module.register_forward_hook(layer, with_kwargs=True) for layer in self.layers]
        return self

    def release(self) -> None:
        """Perturb no more."""
        self.displaced.restore()
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.optimizer = [], None

    # -- at the steps of the optimizer --------------------------------------------------------------------------------

    def _measure(self, layer: Layer) -> Tensor | None:
        """The squared norms of a layer's gradient: of the rows of G, of all G, or of dA and dB."""
        if self.inside:
            grads = [param.grad for param in layer.parameters() if param.grad is not None]
            return torch.stack([grad.float().square().sum() for grad in grads]).sum() if grads else None
        if (moved := layer.movement(lambda param: param.grad)) is None:
            return None
        rows = row_norms_squared(*moved)
        return rows if self.mode == "ggpo" else rows.sum()

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        return when_gradients_are_there(args, kwargs, self._complete)

    def _complete(self) -> None:
        self.displaced.restore()
        self.gradients.complete()

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.steps += 1
        seen = self.gradients.seen
        if self.mode == "ggpo":
            self.noise.rows = seen
        elif seen:
            squares = {EVERYTHING: torch.stack(list(seen.values())).sum()} if self.inside else seen
            self.ahead.follow(squares)
        self.gradients.clear()
        self._begin()

    def _begin(self) -> None:
        for layer in self.layers:
            layer.drawn = layer.thin = None

    # -- perturbing ---------------------------------------------------------------------------------------------------

    def _noise(self, layer: Layer, x: Tensor) -> Tensor | None:
        return self.noise.change(layer, x, self.steps)

    def _along(self, layer: Layer, x: Tensor) -> Tensor | None:
        if layer.thin is None and self.ahead.knows(layer.name):
            moved = layer.movement(self._momentum)
            if moved is None:
                raise no_momentum(self._bound)
            v, u = moved
            layer.thin = u * self.ahead.factor(layer.name, row_norms_squared(v, u).sum().sqrt()), v
        return layer.low_rank(x)

    @property
    def _bound(self) -> torch.optim.Optimizer:
        assert self.optimizer is not None
        return self.optimizer

    def _momentum(self, param: Tensor) -> Tensor | None:
        return momentum_of(self._bound, param)

    def _forward(self, module: nn.Module, args: Any) -> None:
        if not module.training:
            self.displaced.restore()
        elif not self.displaced.kept and self.ahead.knows(EVERYTHING):
            params = [param for layer in self.layers for param in layer.parameters()]
            found = [(param, m) for param in params if (m := self._momentum(param)) is not None]
            if not found:
                raise no_momentum(self._bound)
            lengths = torch.stack([torch.linalg.vector_norm(m.float()) for _, m in found])
            factor = self.ahead.factor(EVERYTHING, torch.linalg.vector_norm(lengths))
            self.displaced.move((param, factor * m) for param, m in found)

    # -- resuming: all that is to be known goes with the optimizer's state --------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers; `optimizer.state_dict()` holds it under "ggpo"."""
        return {"steps": self.steps, "rows": self.noise.rows, "norms": self.ahead.norms, "first": self.ahead.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; `optimizer.load_state_dict` does so."""
        self.displaced.restore()
        places = {layer.name: layer.pairs[0].a.device for layer in self.layers}
        first = self.pairs[0].a.device
        self.steps = state["steps"]
        for owner, key in ((self.noise, "rows"), (self.ahead, "norms"), (self.ahead, "first")):
            setattr(owner, key, {name: value.to(places.get(name, first)) for name, value in state[key].items()})
        self._begin()

    def resume(self, steps: int) -> None:
        """After so many steps; norms come with the optimizer's state."""
        self.steps = steps

    def _saved(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        state["ggpo"] = self.state_dict()

    def _loading(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        if "ggpo" in state:
            self.load_state_dict(state["ggpo"])
