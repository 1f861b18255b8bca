"""Parts of a pipeline that wait in main memory while the steps do not need them, and come back for drawings.

resting = Resting([pipeline.vae, pipeline.text_encoder], torch.device("cuda"))
resting.leave()
with resting.present():
    ...                     # draw
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

MAIN = torch.device("cpu")


class Resting:
    """The parts, and the device that they work on; on the CPU nothing ever moves."""

    def __init__(self, parts: Sequence[nn.Module], device: torch.device) -> None:
        self.parts = list(parts) if device != MAIN else []
        self.device = device

    def leave(self) -> None:
        """Move them to main memory."""
        self._move(MAIN)

    @contextmanager
    def present(self) -> Iterator[None]:
        """Within the block they are on the device."""
        self._move(self.device)
        try:
            yield
        finally:
            self._move(MAIN)

    def _move(self, device: torch.device) -> None:
        for part in self.parts:
            part.to(device)
