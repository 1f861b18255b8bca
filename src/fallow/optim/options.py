"""The options of a group of a low-rank optimizer: which parts there are, and which values are possible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fallow.core.errors import ConfigError
from fallow.optim.bases import BASES
from fallow.optim.bases.basis import Basis
from fallow.optim.inner import INNER
from fallow.optim.inner.rule import Inner
from fallow.optim.moments import BASIS_FORMS, FORMS
from fallow.optim.parts import make_part, number, one_of
from fallow.optim.refresh import MOMENTS
from fallow.optim.residuals import RESIDUALS
from fallow.optim.residuals.residual import Residual
from fallow.optim.site import SIDES
from fallow.optim.writing import ROUNDINGS

PARTS: dict[str, tuple[Mapping[str, Any], type]] = {
    "basis": (BASES, Basis), "inner": (INNER, Inner), "residual": (RESIDUALS, Residual),
    "plain_inner": (INNER, Inner),
}  # fmt: skip


def with_parts(group: dict[str, Any]) -> None:
    """Make the parts that a group names."""
    for key, (table, kind) in PARTS.items():
        if group[key] is not None or key != "plain_inner":
            group[key] = make_part(key, group[key], table, kind)


def check_options(options: Mapping[str, Any]) -> None:
    """ConfigError where an option of a group cannot be, or does not go with another."""
    made = dict(options)
    with_parts(made)
    if not isinstance(made["lr"], Tensor):
        number("lr", made["lr"], 0)
    betas = made["betas"]
    if not (isinstance(betas, tuple | list) and len(betas) == 2):
        raise ConfigError(f"betas={betas!r} must be two numbers from 0 to below 1, like (0.9, 0.999)")
    for beta in betas:
        number("betas", beta, 0, 1)
    for key in ("eps", "weight_decay", "scale", "plain_scale", "seed"):
        number(key, made[key], 0)
    number("refresh_every", made["refresh_every"], 1)
    if not isinstance(made["refresh_every"], int):
        raise ConfigError(f"refresh_every={made['refresh_every']!r} must be a whole number of steps, 1 or more")
    if made["lazy"] is not None:
        number("lazy", made["lazy"], 0, 1 + 1e-12, closed=False)
    one_of("side", made["side"], SIDES)
    one_of("moments", made["moments"], MOMENTS)
    one_of("eps_mode", made["eps_mode"], ("torch", "galore"))
    one_of("state_dtype", made["state_dtype"], FORMS)
    one_of("products", made["products"], ("fp32", "bf16"))
    one_of("rounding", made["rounding"], ROUNDINGS)
    if made["largest_side"] is not None:
        number("largest_side", made["largest_side"], 1)
    if made["basis_dtype"] is not None:
        one_of("basis_dtype", made["basis_dtype"], BASIS_FORMS)
    if made["rank"] is not None:
        _check_combination(made)


def check_mode(mode: Any, accumulate: Any, max_norm: Any) -> None:
    """ConfigError where an update in the backward pass cannot be so."""
    one_of("mode", mode, ("step", "in_backward"))
    number("accumulate", accumulate, 1)
    if not isinstance(accumulate, int):
        raise ConfigError(f"accumulate={accumulate!r} must be a whole number of backward passes, 1 or more")
    if max_norm is not None:
        number("max_norm", max_norm, 0, closed=False)
    if mode == "step" and (accumulate != 1 or max_norm is not None):
        raise ConfigError(
            "accumulate and max_norm are for mode='in_backward'; otherwise gradients add up and are clipped as usual"
        )


def _check_combination(made: Mapping[str, Any]) -> None:
    rank, basis, inner, residual = made["rank"], made["basis"], made["inner"], made["residual"]
    number("rank", rank, 0, 1 + 1e-12 if isinstance(rank, float) else float("inf"))
    if not rank and not residual.moves_alone:
        raise ConfigError(f"rank={rank} leaves nothing to residual='{residual.name}'; give a rank of at least 1")
    if basis.whole and not isinstance(rank, float):
        raise ConfigError(f"rank={rank} of basis='{basis.name}' must be the share of matrices with states, like 0.25")
    residual.check(basis)
    inner.check(len(basis.seen(1, 2, 2)) > 1)
    if made["moments"] == "rotate" and not (basis.orthonormal and not basis.whole):
        raise ConfigError(f"moments='rotate' needs two bases to compare, which '{basis.name}' is not; take 'reset'")
    if made["moments"] == "rotate" and not (basis.sided or all(inner.turns(key) for key in inner.powers)):
        raise ConfigError(
            f"moments='rotate': those of inner='{inner.name}' lie along one side, '{basis.name}' does not; take 'reset'"
        )
    if made["lazy"] is not None and not (basis.orthonormal and basis.follows):
        raise ConfigError(f"lazy={made['lazy']} waits for a space that stays, and '{basis.name}' is drawn by chance")
    if made["stagger"] and basis.whole:
        raise ConfigError("stagger=True: a block changes for the whole group at once; leave it out")
