"""EMA: a moving average of what is trained, which draws better pictures than the last step does.

    average += (1 - decay_t) * (values - average),   decay_t = min(decay, (1 + t) / (10 + t))

Only trained values are averaged (for the selective methods the chosen entries), so it costs 4 bytes for each of them.
The warm-up of the decay lets short runs profit too; it is that of the EMA in diffusers with `use_ema_warmup` off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor


class Averaged(Protocol):
    """What can be averaged: `masters()` gives its trained values by name, `put(values)` sets them, exactly."""

    def masters(self) -> dict[str, Tensor]: ...
    def put(self, values: dict[str, Tensor]) -> None: ...


class MovingAverage:
    """The average of `trained`'s values from now on."""

    def __init__(self, trained: Averaged, decay: float) -> None:
        self.trained, self.decay, self.updates = trained, decay, 0
        self.values = {name: value.clone() for name, value in trained.masters().items()}

    def weight(self) -> float:
        """1 - decay of the next update."""
        return 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present values, after a step."""
        weight = self.weight()
        for name, value in self.trained.masters().items():
            self.values[name].lerp_(value, weight)
        self.updates += 1

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within the block the model has the averaged values; afterwards its own, bit for bit."""
        own = {name: value.clone() for name, value in self.trained.masters().items()}
        self.trained.put(self.values)
        try:
            yield
        finally:
            self.trained.put(own)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"updates": self.updates, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.updates = state["updates"]
        for name, value in state["values"].items():
            self.values[name].copy_(value)
