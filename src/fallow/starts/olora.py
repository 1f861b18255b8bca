"""OLoRA: the adapter starts with the first columns of the weight's QR decomposition, B orthonormal.

"OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775.

    W = Q R      B0 = Q[:, :r] (out, r)      A0 = R[:r] (r, in)

and W - s B0 A0 stays frozen. The first r columns of Q follow from the first r columns of W alone, and R[:r] is Q[:,
:r]ᵀ W, so a decomposition of (out, r) and one product are all it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fallow.core.delta import Site
from fallow.core.starting import Pair, Start


@dataclass(frozen=True)
class OLoRA(Start):
    name: ClassVar[str] = "olora"

    def pair(self, site: Site, rank: int, scale: float) -> Pair:
        weight = site.weight()
        q = torch.linalg.qr(weight[:, :rank])[0]
        return Pair(q, q.T @ weight)
