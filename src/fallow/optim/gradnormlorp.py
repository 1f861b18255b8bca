"""GradNormLoRP: weight-normalised weights whose directions move in a subspace of their gradients.

"Gradient Weight-normalized Low-rank Projection for Efficient LLM Training", arXiv 2412.19616 (AAAI 2025).

    model = get_peft_model(model, fallow.DoRAConfig(rank=8, alpha=16))              # W = m o (W0 + s B A) / ||.||
    optimizer = fallow.GradNormLoRP([p for p in model.parameters() if p.requires_grad])

The paper's method is DoRA's weight with GaLore's update of the factors: A (r, in) and B (out, r) are each projected on
`rank` directions, fewer than r, of their gradient's short side; magnitudes and all else take AdamW. The first basis
waits for a gradient that is not zero, which A has from the second step on (the official code keeps an arbitrary one for
500 steps). The paper's text projects on both sides (basis="two-sided"), its code, as here, on one.

`normalized=True` is the form without an adapter, for all weights. The official class keeps a copy of every weight,
loses the learned lengths and omits the tangential part; here W alone is kept:

    g_i = ||W_i||    u_i = W_i / g_i    D = dL/dW    grad g_i = <D_i, u_i>    T_i = D_i - grad g_i u_i
    P of T, N = inner(Pᵀ T), n_g = Adam(grad g)      W_i <- (g_i - lr n_gi) normalise(W_i - lr scale (P N)_i)

over the rows i of W (out, in). A row of zeros has no direction: it moves as GaLore's, lengths left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.errors import ConfigError
from fallow.core.sharded import is_dtensor
from fallow.optim import refresh
from fallow.optim.lowrank import LowRank
from fallow.optim.residuals.residual import Move
from fallow.optim.site import Site
from fallow.optim.writing import move_weight

NOISE = 1e-6  # of ||D_i||: a part below it is rounding, of which Adam would make a whole step


class GradNormLoRP(LowRank):
    """A LowRank with GaLore's residual and bases of the Gram matrix; see there for the arguments.

    `rank`: of the projection, below that of the factors (a factor whose short side is no longer takes AdamW plainly).
    `normalized`: keep the weights of projected matrices as lengths and directions, for training without
    an adapter; groups have no residual of their own then, and weights sharded by FSDP2 are refused.
    Defaults: the paper's for GLUE, but for `rank`, where its scripts use three. ConfigError as LowRank.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 3e-5,
        rank: int | float | None = 4,
        *,
        normalized: bool = False,
        basis: Any = "gram",
        refresh_every: int = 500,
        scale: float = 4.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        **options: Any,
    ) -> None:
        if normalized and (set(options) & {"residual", "mode"}):
            raise ConfigError("normalized=True has its own way to move a weight; leave residual and mode out")
        self.normalized = normalized
        super().__init__(
            params, lr, rank, basis=basis, refresh_every=refresh_every, scale=scale, betas=betas, eps=eps, **options
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As LowRank's; with normalized=True ConfigError for a group's own residual and for sharded weights."""
        if self.normalized:
            if "residual" in param_group:
                raise ConfigError("normalized=True has its own way to move a weight; leave residual out of the groups")
            listed = _listed(param_group["params"])
            param_group = {**param_group, "params": listed}
            held = [one[1] if isinstance(one, tuple) else one for one in listed]
            if any(is_dtensor(param) for param in held):
                raise ConfigError(
                    "normalized=True needs whole rows and bases on one process; do not shard these weights"
                )
        super().add_param_group(param_group)

    def _begin(self, site: Site) -> None:
        super()._begin(site)
        if self.normalized and site.rank is not None:
            for key in ("length_m", "length_v"):
                site.state[key] = torch.zeros(site.param.shape[0], dtype=site.work, device=site.param.device)

    def _update_projected(self, sites: Sequence[Site], group: dict[str, Any], choosing: set[int]) -> None:
        if not self.normalized:
            super()._update_projected(sites, group, choosing)
            return
        parts = [_split(site) for site in sites]
        due = [
            (site, part.tangent)
            for site, part in zip(sites, parts, strict=True)
            if site.index in choosing and bool(part.tangent.any())  # a gradient along the weight alone has no space
        ]
        if due:
            refresh.refresh([site for site, _ in due], [one for _, one in due], group, group["steps"])
        inside = [group["basis"].project(site, part.tangent) for site, part in zip(sites, parts, strict=True)]
        for site in sites:
            site.state["age"] += 1
        directions = group["inner"].directions(sites, inside, group)
        for site, part, direction in zip(sites, parts, directions, strict=True):
            _move(site, part, direction, group)


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


@dataclass
class _Parts:
    """`weight`, `tangent` (d, n): the matrix and T. `length`, `radial`: g and its gradient, beside the rows of W."""

    weight: Tensor
    tangent: Tensor
    length: Tensor
    radial: Tensor


def _split(site: Site) -> _Parts:
    along = 0 if site.flipped else 1  # the dimension within a row of W (out, in)
    weight, gradient = site.weight().to(site.work), site.gradient()
    length = weight.norm(dim=along, keepdim=True)
    unit = weight / torch.where(length > 0, length, 1.0)
    radial = (gradient * unit).sum(along, keepdim=True)
    tangent = torch.addcmul(gradient, radial, unit, value=-1)
    rounding = NOISE * gradient.norm(dim=along, keepdim=True)
    tangent.masked_fill_(tangent.norm(dim=along, keepdim=True) <= rounding, 0.0)
    return _Parts(weight, tangent, length, radial.masked_fill(radial.abs() <= rounding, 0.0))


def _move(site: Site, part: _Parts, direction: Tensor, group: Mapping[str, Any]) -> None:
    lr, (beta1, beta2), age, state = group["lr"], group["betas"], site.state["age"], site.state
    along, weight, start = 0 if site.flipped else 1, part.weight, part.length.flatten()
    if group["weight_decay"]:
        weight.mul_(1 - lr * group["weight_decay"])
        start = start * (1 - lr * group["weight_decay"])
    group["basis"].subtract(site, weight, direction.mul_(lr * group["scale"]))
    gradient = part.radial.flatten()
    m, v = state["length_m"].lerp_(gradient, 1 - beta1), state["length_v"]
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    length = start - lr * (m / (1 - beta1**age)) / ((v / (1 - beta2**age)).sqrt() + group["eps"])
    now = weight.norm(dim=along)
    factor = torch.where((start > 0) & (now > 0), length / torch.where(now > 0, now, 1.0), 1.0)
    weight.mul_(factor.unsqueeze(along))
    if weight.dtype != site.param.dtype:
        move_weight(site, Move(dense=site.weight() - weight), 1.0, 0.0)
