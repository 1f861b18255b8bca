"""LISA: all weights are trained, a few blocks at a time.

"LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning", arXiv 2403.17919.

    every `interval` steps:  freeze all blocks;  draw `active` of them and train these
    always:                  embeddings, head and normalisations outside of blocks

    optimizer = torch.optim.AdamW(model.parameters())
    lisa = fallow.LISA(model, optimizer)                    # that is all: it counts the steps of the optimizer

Frozen blocks have no gradient and no state, so gradients and states take (|E| + |H| + active |block|) in place of the
whole model. The set is drawn from the seed and the number of the interval: the same on all ranks and after a resume.

Departures from the official code, whose callback freezes blocks but keeps the states of all that were ever drawn: the
default `state="drop"` forgets them, as the paper's experiments did. It draws from a generator of its own, by weights if
given, and can train every block once before any a second time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fallow.core.delta import one_of, whole
from fallow.core.errors import ConfigError, ModelError
from fallow.optim.blocks import Blocks, Side, find_blocks, outside
from fallow.optim.sampling import Drawing, Order

State = Literal["drop", "keep", "offload"]


class LISA:
    """Freezes and frees the blocks of `model` as `optimizer`, any of torch's kind, makes its steps.

    Make the optimizer first, over all parameters. Without one, `bind(optimizer)` starts; `fallow.Callback(lisa)` calls
    it for a Trainer. `active`: blocks at a time, or `budget`: as many as have so many parameters together. `interval`:
    in optimizer steps. `blocks`: see `fallow.optim.blocks`. `weights`: how likely each is, None for alike. `order`:
    "random", or "cyclic", no block twice before all once. `state`: what becomes of a frozen block's: "drop", "keep",
    or "offload" to host memory until it is drawn again. `train_embeddings`, `train_norms`, `train_head`: what is
    trained always. `warmup`: steps at the start of an interval over which the rate rises, since a block without
    moments starts with full steps. With DDP give find_unused_parameters=True. Reentrant checkpointing passes no
    gradient to a block whose input has none (train_embeddings=False): take use_reentrant=False.

    ConfigError, ModelError for what cannot be; nothing is frozen then.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any = None,
        *,
        active: int = 2,
        interval: int = 20,
        blocks: Blocks = "auto",
        budget: int | None = None,
        weights: Sequence[float] | None = None,
        order: Order = "random",
        state: State = "drop",
        train_embeddings: bool = True,
        train_norms: bool = True,
        train_head: bool = True,
        warmup: int = 0,
        seed: int = 0,
    ) -> None:
        one_of("state", state, get_args(State))
        whole("interval", interval)
        whole("warmup", warmup, least=0, most=interval)
        self.model, self.interval, self.state, self.warmup = model, interval, state, warmup
        self.blocks = find_blocks(model, blocks)
        sizes = [sum(p.numel() for p in block.parameters()) for block in self.blocks.values()]
        self.drawing = Drawing(list(self.blocks), sizes, active, budget, weights, order, seed)
        flags: dict[Side, bool] = {"embeddings": train_embeddings, "norms": train_norms, "head": train_head}
        self.resting = [p for p, sides in outside(model, self.blocks).items() if not any(flags[s] for s in sides)]
        self.steps, self.active, self.rates = 0, list(self.blocks), list[Any]()
        self.optimizer: torch.optim.Optimizer | None = None
        self.hooks: list[Any] = []
        self.trained: dict[str, list[nn.Parameter]] = {}
        self.away: dict[Tensor, list[str]] = {}
        if optimizer is not None:
            self.bind(optimizer)

    def bind(self, optimizer: Any, steps: int = 0) -> LISA:
        """Follow this optimizer from now on, which has made so many steps. ConfigError where it lacks parameters of a
        block.
        """
        whole("steps", steps, least=0)
        if self.optimizer is not None:
            raise ConfigError("this LISA follows an optimizer already; call release() first, or make another")
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner  # of Accelerate's wrapper
        self._check(optimizer)
        self.optimizer = optimizer
        self.trained = {n: [p for p in b.parameters() if p.requires_grad] for n, b in self.blocks.items()}
        self.resting = [param for param in self.resting if param.requires_grad]
        self._freeze(self.resting)
        self.hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_post_hook(self._saved),
            optimizer.register_load_state_dict_pre_hook(self._loading),
            optimizer.register_load_state_dict_post_hook(self._loaded),
        ]
        self.resume(steps)
        return self

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        held = {id(param) for group in optimizer.param_groups for param in group["params"]}
        for name, block in self.blocks.items():
            params = list(block.parameters())
            if not any(param.requires_grad for param in params):
                raise ConfigError(
                    f"the block '{name}' is frozen already; free what is to be trained before LISA is made"
                )
            if any(param.requires_grad and id(param) not in held for param in params):
                raise ConfigError(
                    f"the optimizer lacks parameters of '{name}', so drawing that block would train nothing; make it "
                    "over all parameters of the model, before anything is frozen"
                )
        wrapped = isinstance(self.model, nn.parallel.DistributedDataParallel)
        if wrapped and not self.model.find_unused_parameters:
            raise ConfigError("LISA leaves blocks without gradients; give DDP find_unused_parameters=True")

    def release(self) -> None:
        """Follow no optimizer any more, and let everything be trained that was at first."""
        for hook in self.hooks:
            hook.remove()
        self._activate(param for params in (self.resting, *self.trained.values()) for param in params)
        self.active, self.hooks, self.optimizer = list(self.blocks), [], None

    # -- at the steps of the optimizer --------------------------------------------------------------------------------

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not any(map(callable, (*args, *kwargs.values()))):  # a closure makes the gradients later
            for name in self.active:
                if all(param.grad is None for param in self.trained[name]):
                    raise ModelError(
                        f"the active block '{name}' has no gradient; under reentrant checkpointing give "
                        "use_reentrant=False or call model.enable_input_require_grads(), and leave blocks that the "
                        "loss does not reach out of blocks="
                    )
        self.rates = [group["lr"] for group in optimizer.param_groups]
        share = (self.steps % self.interval + 1) / (self.warmup + 1)
        if share < 1:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * share

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
        self.steps += 1
        if self.steps % self.interval == 0:
            self._switch(self.drawing.draw(self.steps // self.interval))

    def _switch(self, names: Sequence[str]) -> None:
        self.active = list(names)
        self._activate(param for name in names for param in self.trained[name])
        self._freeze(param for name, params in self.trained.items() if name not in names for param in params)

    def _activate(self, params: Iterable[nn.Parameter]) -> None:
        for param in params:
            param.requires_grad_(True)
            state = self._state(param)
            for key in self.away.pop(param, ()):
                state[key] = state[key].to(param.device, non_blocking=True)

    def _freeze(self, params: Iterable[nn.Parameter]) -> None:
        for param in params:
            param.requires_grad_(False)
            param.grad = None
            state = self._state(param)
            if self.state == "drop":
                state.clear()
                self.optimizer.state.pop(param, None)  # type: ignore[union-attr]
            elif self.state == "offload" and param not in self.away:
                keys = [k for k, value in state.items() if isinstance(value, Tensor) and value.device.type != "cpu"]
                state.update({key: state[key].to("cpu") for key in keys})
                if keys:
                    self.away[param] = keys

    def _state(self, param: nn.Parameter) -> dict[str, Any]:
        held: dict[Any, Any] = {} if self.optimizer is None else self.optimizer.state
        found: dict[str, Any] = held.get(param, {})
        return found

    # -- resuming: all that is to be known goes with the optimizer's state --------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The steps made and the blocks in training; plain values. `optimizer.state_dict()` holds it under "lisa"."""
        return {"steps": self.steps, "active": list(self.active)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; `optimizer.load_state_dict` does so. ConfigError for other blocks."""
        whole("steps", state.get("steps"), least=0)
        if unknown := [name for name in state["active"] if name not in self.blocks]:
            raise ConfigError(f"the saved LISA trained '{unknown[0]}', which is no block of this model")
        self.steps = state["steps"]
        if self.optimizer is not None:
            self._switch(state["active"])

    def resume(self, steps: int) -> None:
        """Go on after so many optimizer steps, with the blocks that are then due."""
        self.load_state_dict({"steps": steps, "active": self.drawing.draw(steps // self.interval)})

    def _saved(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        state["lisa"] = self.state_dict()

    def _loading(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        if "lisa" in state:
            self.load_state_dict(state["lisa"])

    def _loaded(self, optimizer: torch.optim.Optimizer) -> None:
        """What came for frozen blocks goes the way of the others'."""
        self.away.clear()
        self._switch(self.active)
