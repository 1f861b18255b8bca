"""Running a torch optimizer over hollow proxies: give a part of them their values, step, write back, take them away.

A rule that treats each tensor by itself (those of torch.optim but LBFGS) sees a bounded part of the proxies at a time,
so the values of the trained entries exist only `PART` at a time besides the weights that hold them. Any other rule may
look at all of its tensors together, or at any time (Prodigy's estimate of the step, schedule-free's counters and its
averages), so it gets masters that stay: 4 bytes an entry more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fallow.core.compact import Slot
from fallow.core.errors import ConfigError
from fallow.core.lion import Lion
from fallow.core.states8bit import AdamW8bit

PART = {"cpu": 1 << 20}  # entries that are materialised at once: what stays in a core's cache
PART_ON_ACCELERATOR = 1 << 22  # there launches cost more than memory
PER_TENSOR: set[type[torch.optim.Optimizer]] = {
    torch.optim.AdamW, torch.optim.Adam, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.SGD,
    torch.optim.RMSprop, torch.optim.Rprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.ASGD,
    torch.optim.Adafactor, AdamW8bit, Lion,
}  # fmt: skip


class Update:
    """The steps of one rule over the proxies of slots."""

    def __init__(self, rule: torch.optim.Optimizer) -> None:
        if isinstance(rule, torch.optim.LBFGS):
            raise ConfigError(
                "LBFGS evaluates the loss several times within a step, at values that must be in the weights by then; "
                "take AdamW or another rule of torch.optim"
            )
        self.rule = rule

    @property
    def per_tensor(self) -> bool:
        """Whether the rule gives each tensor the same update alone as together with the others."""
        return type(self.rule) in PER_TENSOR

    @property
    def heard(self) -> bool:
        """Whether somebody's hooks count the rule's steps."""
        own = self.rule._optimizer_step_pre_hooks or self.rule._optimizer_step_post_hooks
        return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)

    @torch.no_grad()
    def apply(self, slots: Sequence[Slot]) -> None:
        """One step of the rule on those of all its slots that have a gradient; their weights are written."""
        moving = [slot for slot in slots if slot.proxy.grad is not None]
        parts = [list(slots)] if not self.per_tensor else [moving] if self.heard else self._parts(moving)
        for part in parts:
            try:
                for slot in part:
                    slot.materialise()
                self._step(part)
                for slot in part:
                    slot.store()
            finally:
                for slot in part:
                    slot.release()

    def _step(self, part: Sequence[Slot]) -> None:
        """The rule's step with the groups narrowed to these slots; learning rates and counters stay the groups' own."""
        groups, wanted = self.rule.param_groups, {id(slot.proxy) for slot in part}
        every = [group["params"] for group in groups]
        if sum(map(len, every)) == len(wanted) or not self.per_tensor:
            self.rule.step()
            return
        try:
            narrowed = []
            for group, params in zip(groups, every, strict=True):
                group["params"] = [param for param in params if id(param) in wanted]
                if group["params"]:
                    narrowed.append(group)
            self.rule.param_groups = narrowed
            self.rule.step()
        finally:
            self.rule.param_groups = groups
            for group, params in zip(groups, every, strict=True):
                group["params"] = params

    @staticmethod
    def _parts(slots: Sequence[Slot]) -> Iterator[list[Slot]]:
        part: list[Slot] = []
        entries = 0
        for slot in slots:
            size = slot.proxy.numel()
            if part and entries + size > PART.get(slot.proxy.device.type, PART_ON_ACCELERATOR):
                yield part
                part, entries = [], 0
            part.append(slot)
            entries += size
        if part:
            yield part
