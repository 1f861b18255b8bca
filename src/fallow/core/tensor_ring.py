"""Tensor rings: large matrices as traces of products of small cores.

    T[(i_1 .. i_D), (j_1 .. j_D)] = trace(A_1[i_1, j_1] A_2[i_2, j_2] .. A_D[i_D, j_D])    A_d (I_d, J_d, R, R)

The first index is the most significant, as in a plain reshape. With R = 1 it is the Kronecker product of the cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

PUBLISHED = {(320, 3): (4, 8, 10)}  # TLoRA's table where it is not the smallest sum; its other rows are


def balanced(n: int, order: int) -> tuple[int, ...]:
    """At most `order` factors of n in ascending order with the smallest sum, without ones; (n,) for a prime."""
    return PUBLISHED.get((n, order)) or tuple(f for f in _ascending(n, order, 1) if f > 1) or (1,)


@lru_cache(maxsize=65536)
def _ascending(n: int, order: int, least: int) -> tuple[int, ...]:
    """`order` factors of n, none below `least`, with the smallest sum; () where there are none."""
    if order == 1:
        return (n,) if n >= least else ()
    splits = ((d, *_ascending(n // d, order - 1, d)) for d in range(least, int(n ** (1 / order)) + 2) if n % d == 0)
    return min((s for s in splits if len(s) == order), key=lambda s: (sum(s), s), default=())


def ring_apply(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """x T (..., J) of x (..., I): core by core at R = 1, 2 I J_d for each row and core in place of 2 I J.

    Above that T is formed. The open bonds would make x R² times as wide on its way, and on one CPU core at 768 to 2048
    wide that took 2 to 5 times as long at R = 2, and more at R = 3.
    """
    if cores[0].shape[2] > 1:
        return x @ ring_matrix(cores)
    h = x.reshape(-1, x.shape[-1])
    for core in cores:  # each takes the first index away and puts its own at the end
        h = (h.unflatten(1, (core.shape[0], -1)).mT @ core[:, :, 0, 0]).flatten(1)
    return h.view(*x.shape[:-1], -1)


def ring_matrix(cores: Sequence[Tensor]) -> Tensor:
    """T (I, J)."""
    if len(cores) == 1:
        return torch.einsum("ijaa->ij", cores[0])
    first, *inner, last = cores
    t = first.permute(2, 3, 0, 1)
    for core in inner:
        t = torch.einsum("abij,klbc->acikjl", t, core).flatten(4, 5).flatten(2, 3)
    return torch.einsum("abij,klba->ikjl", t, last).flatten(2, 3).flatten(0, 1)


def ring_rows(cores: Sequence[Tensor]) -> Tensor:
    """B_1[o_1] .. B_D[o_D] for all rows (o_1 .. o_D): (O, R, R) of cores B_d (O_d, R, R)."""
    first, *rest = cores
    for core in rest:
        first = (first.unsqueeze(1) @ core).flatten(0, 1)
    return first
