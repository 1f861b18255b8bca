"""Fira's norm-growth limiter (arXiv 2410.01623): an update may grow by a factor in norm from step to step, not more."""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.optim.site import Site

GUARD = 1e-8  # the paper's, beneath norms
NONE = 1e-30  # a norm below this is that of a gradient of zero


def limited(norm: Tensor, last: Tensor, limit: float) -> Tensor:
    """0-dim factor that keeps `norm` at most `limit` times the `last` one, which becomes what the norm then is.

    A last norm of zero says nothing about the next, which is then free: the official code lets it grow from 1e-8.
    No wait for the device.
    """
    bound = limit * (last + GUARD)
    factor = torch.where((last < NONE) | (norm <= bound), 1.0, bound / norm.clamp_min(NONE)).to(norm.dtype)
    last.copy_(norm * factor)
    return factor


def norms(site: Site, matrix: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The norms of (r, n) over its first dimension, (n,), or over both, 0-dim and of all ranks together."""
    if len(dims) == 1 or site.part is None:
        return torch.linalg.vector_norm(matrix, dim=dims)
    return site.total(matrix.square().sum()).sqrt()
