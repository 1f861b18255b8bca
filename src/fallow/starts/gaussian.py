"""Gaussian: A is drawn with a deviation of 1 / r whatever the layer's width, B is zero.

PEFT's `init_lora_weights="gaussian"`, from the LoRA of diffusers. Narrow layers start with smaller rows than LoRA's +-1
/ sqrt(in), wide ones with larger. An embedding starts in the same way here; PEFT leaves it at its default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fallow.core.delta import Site
from fallow.core.starting import Pair, Start


@dataclass(frozen=True)
class Gaussian(Start):
    name: ClassVar[str] = "gaussian"

    def pair(self, site: Site, rank: int, scale: float) -> Pair:
        return Pair(None, torch.randn(rank, site.shape[1], dtype=site.dtype) / rank)
