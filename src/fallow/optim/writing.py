"""Writing a move into a weight: in place, without a matrix of the weight's size where the move needs none.

W <- (1 - lr wd) W - lr ( P lift + source o along + dense )
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fallow.optim.residuals.residual import Move
from fallow.optim.site import Site


def move_weight(site: Site, weight: Tensor, move: Move, lr: Any, decay: float) -> None:
    """Move W (d, n) of float32 or float64; the tensors of the move may be overwritten."""
    if decay:
        weight.mul_(1 - lr * decay)
    if move.lift is not None:
        site.group["basis"].subtract(site, weight, move.lift.mul_(lr))
    if move.along is not None:
        assert move.source is not None
        weight.addcmul_(move.source, move.along * lr, value=-1)
    if move.dense is not None:
        weight.sub_(move.dense.mul_(lr))
