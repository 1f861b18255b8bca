"""The Hugging Face Trainer's side of the selective optimizers, of what follows an optimizer (LISA, GGPO), and of
whatever is attached to a model by `schedule.attach`.

Kept apart from `schedule.py` because importing transformers takes a second that a bare training loop need not pay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from fallow.core import schedule
from fallow.core.errors import ConfigError


class Callback(TrainerCallback):
    """`Trainer(..., optimizers=(optimizer, None), callbacks=[fallow.Callback(optimizer)])`.

    `target`: a selective optimizer (SaRA, SHiRA, ...), what follows an optimizer (LISA, GGPO), or a model to which
    schedules are attached.

    The Trainer clips and clears the gradients of `model.parameters()`, which the compact ones are not among. For a
    selective optimizer this callback therefore clips the compact gradients to the Trainer's `max_grad_norm` and clears
    them after each step, so a step that the loss scaler skipped leaves nothing behind. In either case it tells how
    many steps the run has, so that moments given as shares of the run are known. For a model it advances the attached
    schedules. What follows an optimizer is bound to the Trainer's once that is made, and told how many steps were made
    before.
    """

    def __init__(self, target: Any) -> None:
        follows = hasattr(target, "bind") and hasattr(target, "resume")
        if not isinstance(target, nn.Module) and not hasattr(target, "trainable") and not follows:
            raise ConfigError(
                f"Callback({type(target).__name__}) needs a selective optimizer such as SaRA, a LISA, a GGPO, or "
                "a model"
            )
        self.target: Any = target
        self.follows = follows and not isinstance(target, nn.Module)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.follows:
            if self.target.optimizer is None:
                self.target.bind(kwargs["optimizer"], state.global_step)
            else:
                self.target.resume(state.global_step)
        elif isinstance(self.target, nn.Module):
            schedule.resolve(self.target, state.max_steps)
            schedule.resume(self.target, state.global_step)
        else:
            self.target.schedule.resolve(state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        selective = not self.follows and not isinstance(self.target, nn.Module)
        if selective and args.max_grad_norm and args.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.target.trainable(), args.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.target, nn.Module):
            schedule.step(self.target)
        elif not self.follows:
            self.target.zero_grad()
