"""SHiRA: sparse high-rank adapters; train 1-2 % of the entries of each matrix, chosen once, layer by layer.

"Sparse High Rank Adapters", arXiv 2406.13175 (and "Rapid Switching and Multi-Adapter Fusion", arXiv 2407.16712).

    y = (W + S) x,   S = scatter(index, s),   s = 0 at first,   dL/ds = (dL/dW).flat[index]       W (n, m), s (K,)

s is the float32 master and W.flat[index] = round(w0 + s) after every step, so nothing is added to the model and nothing
drifts in bfloat16. K entries in each layer, exactly: `density` * n * m, or r * (n + m), the count of a LoRA of rank r.

    rand     K positions at random, a seed of its own for each layer
    wm       the K largest |W|                     `task`=t takes ranks tK .. (t+1)K-1: a series without overlap
    grad     the K largest |G|, G = dL/dW summed over calibration batches
    snip     the K largest |W * G|, the paper's recommendation
    struct   every f-th row (i mod f == offset) and the main diagonal; K follows from f

Ties go to the lowest flat index. Convolutions count as (C_out, C_in * kh * kw). Against PEFT's version: no clone of the
weight per forward, a seed per layer, all five masks, any layer type, restoring by copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fallow.core.errors import ConfigError, SelectionError, nearest
from fallow.core.probe import Aggregate, Loss, gradients
from fallow.core.select import (
    Amount,
    Patterns,
    Selection,
    Selector,
    Target,
    choose,
    eligible,
    index_dtype,
    magnitude,
    matrix_shape,
)
from fallow.core.sharded import part_of
from fallow.selection.peft_shira import read_peft_shira, write_peft_shira
from fallow.selection.random import random
from fallow.selection.rules import Rule
from fallow.selection.selective import Selective

Mask = Literal["struct", "rand", "wm", "grad", "snip"]


def matrices(target: Target) -> bool:
    """Linear, Conv and fused projections: what SHiRA adapts unless `include` names something else."""
    return target.weight.ndim >= 2 and not any(isinstance(owner, nn.Embedding) for owner in target.owners)


def wm(task: int = 0) -> Selector:
    """The largest weights, or the `task`-th set of K in the order of magnitude."""
    return lambda targets, amount: choose(targets, magnitude, amount, largest=True, skip=task)


def by_gradient(grads: dict[str, Tensor], times_weight: bool) -> Selector:
    """The largest |G| ("grad") or |W * G| ("snip"); `grads` as of `core.probe.gradients`."""

    def score(target: Target) -> Tensor:
        grad = grads[target.name].to(target.weight.device).abs()
        value = magnitude(target) * grad if times_weight else grad
        if not value.any():
            warnings.warn(
                f"every score of '{target.name}' is zero: no calibration batch reaches it"
                f"{', or its weights are zero' if times_weight else ''}; its first entries are trained. Exclude it, "
                "or give mask='wm' or 'rand'",
                stacklevel=2,
            )
        return value

    return lambda targets, amount: choose(targets, score, amount, largest=True)


def struct(every: int | None = None, offset: int = 0, diagonal: bool = True, columns: bool = False) -> Selector:
    """Rows (or columns) i with i mod f == offset, and the main diagonal; f = `every`, or from the amount's density."""

    def select(targets: Sequence[Target], amount: Amount) -> Selection:
        return Selection(
            {t.name: struct_index(t, every or spacing(t, amount, diagonal), offset, diagonal, columns) for t in targets}
        )

    return select


def spacing(target: Target, amount: Amount, diagonal: bool) -> int:
    """f ≈ 1 / (density - 1 / max(n, m)): what is left of the density after the diagonal, in whole rows."""
    density = amount.of_layer(target) / target.numel
    left = density - (1 / max(matrix_shape(target.weight)) if diagonal else 0)
    if left <= 0:
        raise SelectionError(
            f"{amount} of '{target.name}' {tuple(target.weight.shape)} is used up by its diagonal; raise it above "
            f"{1 / max(matrix_shape(target.weight)):.3g} of the entries, or give diagonal=False or every="
        )
    return max(1, round(1 / left))


def struct_index(target: Target, every: int, offset: int, diagonal: bool, columns: bool) -> Tensor:
    """Sorted flat indices; SelectionError where no row (or column) has this offset: the diagonal alone is left."""
    n, m = matrix_shape(target.weight)
    if offset >= min(every, m if columns else n):
        raise SelectionError(
            f"offset={offset} takes no {'column' if columns else 'row'} of '{target.name}' "
            f"{tuple(target.weight.shape)}, of which one in {every} is trained; give offset < "
            f"{min(every, m if columns else n)}, or every="
        )
    i, j = torch.arange(n).view(n, 1), torch.arange(m).view(1, m)
    mask = ((j if columns else i) % every == offset).expand(n, m)
    if diagonal:
        mask = mask | (i == j)
    if (part := part_of(target.weight)) is not None:
        mask = part.cut(mask.reshape(target.weight.shape))
    return mask.reshape(-1).nonzero().view(-1).to(target.weight.device, index_dtype(target.numel))


class SHiRA(Selective):
    """Trains a fixed sparse mask of each matrix of a model.

    Args:
        model: the network; by default every matrix and convolution is adapted, biases, norms and embeddings are not.
        mask: "snip", "grad", "wm", "rand" or "struct"; by default "snip" where `batches` are given, else "rand".
        density: the share of each layer's entries (paper: 0.01 for language, 0.02 for images, the default).
        r: instead, r * (n + m) entries per layer. Small layers may hold fewer: then exclude them or use density.
        batches, loss: calibration for "snip" and "grad": 8 to 64 batches, and `loss(model, batch)`, by default
            `model(**batch).loss`. aggregate: "sum" takes |sum of gradients|, "mean_abs" the mean of |gradients|.
        lr: 5e-4 (paper: 1e-4 with cosine decay for images, 5e-4 for language; range 1e-4 to 1e-3).
        weight_decay: on s, so towards the base.
        task: number of the set in a series without overlap ("wm"). every, offset, diagonal, columns: of "struct".
        include, exclude: regular expressions on parameter names. seed: of "rand".

    Raises SelectionError, ConfigError, DataError or ModelError, before the model is touched.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Mask | None = None,
        density: float | None = None,
        r: int | None = None,
        lr: float = 5e-4,
        *,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
        aggregate: Aggregate = "sum",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        include: Patterns = None,
        exclude: Patterns = None,
        task: int = 0,
        every: int | None = None,
        offset: int = 0,
        diagonal: bool = True,
        columns: bool = False,
        rule: Rule | None = None,
        row_chunk: int | str | None = None,
        in_backward: bool = False,
        state_bits: Literal[8, 32] = 32,
        seed: int = 0,
    ) -> None:
        mask = mask or ("rand" if batches is None else "snip")
        if mask not in get_args(Mask):
            raise ConfigError(f"mask={mask!r} does not exist{nearest(str(mask), get_args(Mask))}")
        if mask in ("grad", "snip") and batches is None:
            raise ConfigError(f"mask={mask!r} chooses by gradients; give batches= (8 to 64), or mask='wm' or 'rand'")
        if density is None and r is None:
            density = 0.02
        check_options(mask, every, offset, diagonal, columns, task)
        if mask in ("grad", "snip"):
            targets = eligible(model, include, exclude, keep=matrices)
            for target in targets:
                Amount(density=density, r=r).of_layer(target)  # refuse an impossible r before the calibration runs
            selector = by_gradient(gradients(model, targets, batches or (), loss, aggregate), mask == "snip")
        else:
            made: dict[str, Callable[[], Selector]] = {
                "rand": lambda: random(seed),
                "wm": lambda: wm(task),
                "struct": lambda: struct(every, offset, diagonal, columns),
            }
            selector = made[mask]()
        super().__init__(
            model, selector, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, density=density, r=r,
            include=include, exclude=exclude, keep=matrices, form="delta", rule=rule,
            row_chunk=row_chunk, in_backward=in_backward, state_bits=state_bits,
            metadata={"method": "shira", "mask": mask, "seed": seed, "task": task, "every": every, "offset": offset},
        )  # fmt: skip

    from_peft = staticmethod(read_peft_shira)
    to_peft = staticmethod(write_peft_shira)


def check_options(mask: str, every: int | None, offset: int, diagonal: bool, columns: bool, task: int) -> None:
    """ConfigError on values outside their range, and on an option that this mask would ignore."""
    if task < 0 or (task and mask != "wm"):
        raise ConfigError(f"task={task} must be 0 or more, and 0 unless mask='wm'; mask is {mask!r}")
    if mask != "struct" and (every is not None or offset or not diagonal or columns):
        raise ConfigError(f"every, offset, diagonal and columns belong to mask='struct'; mask is {mask!r}")
    if every is not None and every < 1:
        raise ConfigError(f"every={every} must be at least 1: every f-th row is trained")
    if offset < 0 or (every is not None and offset >= every):
        raise ConfigError(f"offset={offset} must be from 0 to every - 1")
