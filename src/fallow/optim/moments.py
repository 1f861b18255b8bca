"""How the states of an optimizer are kept: read as tensors to compute with, written back in their own form.

fp32    the tensor itself (float64 for a float64 parameter)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fallow.optim.site import Site

FORMS = ("fp32",)


def begin(site: Site, shapes: Mapping[str, Sequence[int]]) -> None:
    """Make the states of a site, all zero."""
    for key, shape in shapes.items():
        site.state[key] = torch.zeros(tuple(shape), dtype=site.work, device=site.param.device)


def read(site: Site, key: str) -> Tensor:
    """The state as a tensor of the dtype that is computed in; the kept one itself, where it is kept so."""
    return site.state[key]


def write(site: Site, key: str, value: Tensor) -> None:
    """Keep what `read` gave and the step has changed."""
    held = site.state[key]
    if held is not value:
        held.copy_(value)


def zero(site: Site, keys: Sequence[str]) -> None:
    """Start these states anew."""
    for key in keys:
        site.state[key].zero_()


def states(site: Site) -> dict[str, Any]:
    return site.state
