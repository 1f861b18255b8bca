"""Every basis with every inner rule, residual and way of carrying moments, on every shape, against plain rules."""

from __future__ import annotations

import itertools

import pytest
import torch
from plain_rules import PlainRule
from torch import nn

from fallow.core.errors import ConfigError
from fallow.optim.bases import BASES
from fallow.optim.inner import INNER
from fallow.optim.lowrank import LowRank
from fallow.optim.residuals import RESIDUALS

SHAPES = [(6, 11), (11, 6), (7, 7), (1, 9), (2, 3)]
OPTIONS = {
    "polar": {"method": "svd"}, "sgdm": {"nesterov": True}, "sign": {"share": 0.5}, "sgd": {"share": 0.5},
    "warm": {"oversampling": 2}, "block": {"order": "ascending"},
}  # fmt: skip


def part(name: str) -> dict:
    return {"name": name, **OPTIONS.get(name, {})}


def dense_basis(optimizer: LowRank, param: nn.Parameter) -> torch.Tensor | None:
    """P (d, r); of entries (d n, k), of blocks all or nothing."""
    (site,) = [site for site in optimizer.sites() if site.param is param]
    basis = site.group["basis"]
    if basis.name == "entries":
        return torch.eye(site.d * site.n, dtype=torch.float64)[:, site.state["index"].long()]
    if basis.name == "two-sided":
        return torch.kron(*basis._pair(site))
    if basis.whole:
        return torch.eye(site.d, dtype=torch.float64) if site.state["active"] else None
    return basis.matrix(site).clone()


def make(shape, basis, inner, residual, moments, rank=2):
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for _ in range(2)]
    rank = {"block": 0.5, "entries": 5}.get(basis, rank)
    return params, LowRank(
        params, 1e-2, rank, basis=part(basis), inner=part(inner), residual=part(residual), refresh_every=2,
        scale=0.5, moments=moments, weight_decay=0.1, betas=(0.9, 0.99),
    )  # fmt: skip


POSSIBLE, REFUSED = [], []
for names in itertools.product(BASES, INNER, RESIDUALS, ("keep", "rotate", "reset")):
    try:
        make((6, 11), *names)
        POSSIBLE.append(names)
    except ConfigError:
        REFUSED.append(names)


def test_what_is_refused_is_what_the_mathematics_forbids():
    for basis, inner, residual, moments in REFUSED:
        assert (
            (basis == "gaussian" and (residual not in ("drop", "apollo") or moments == "rotate"))
            or (basis in ("entries", "block", "two-sided") and residual in ("fira", "apollo"))
            or (basis == "block" and residual in ("feedback", "momentum"))
            or (basis in ("entries", "two-sided") and inner == "adafactor" and moments == "rotate")
            or (basis == "block" and moments == "rotate")
            or (basis == "entries" and inner == "polar")
        ), (basis, inner, residual, moments)
    assert len(POSSIBLE) > 700


def check(names: tuple[str, str, str, str], shape: tuple[int, int], zero_first: bool = False) -> None:
    basis, inner, residual, moments = names
    params, own = make(shape, *names)
    flip = shape[0] >= shape[1]
    plains = [
        PlainRule(part(inner), part(residual), shape, scale=0.5, moments=moments, betas=(0.9, 0.99)) for _ in params
    ]
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
            if zero_first and not step:
                param.grad.zero_()
        own.step()
        assert all(param.isfinite().all() for param in params)
        if own.sites()[0].rank is None or zero_first:
            continue  # plain, or with states that start later
        for param, old, plain in zip(params, before, plains, strict=True):
            p = dense_basis(own, param)
            if p is None or (basis == "block" and moments == "reset" and step % 2 == 0):
                plain.s.clear()
                plain.k = 0
            grad = param.grad.mT if flip else param.grad
            if p is None and residual == "drop":
                change = torch.zeros_like(grad)
            else:
                change = plain.change(grad, p, anew=step == 2)
            wanted = (1 - 1e-3) * old - 1e-2 * (change.mT if flip else change)
            torch.testing.assert_close(param.detach(), wanted, rtol=1e-7, atol=1e-7, msg=f"{names} {shape} {step}")


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("basis", BASES)
def test_every_combination_does_what_the_plain_rules_do(basis, residual):
    some = [names for names in POSSIBLE if names[0] == basis and names[2] == residual]
    for at, names in enumerate(some):
        for shape in (SHAPES[at % 3], SHAPES[(at + 1) % 3]):
            # plain_rules knows R of two sides as a vector; half of the first one is zero but for rounding
            matrices = basis == "two-sided" and names[1] in ("adafactor", "polar", "lion")
            if names[1] != "adamw8bit" and not matrices:  # adamw8bit is adamw in float64
                check(names, shape)


@pytest.mark.parametrize("basis", BASES)
def test_every_basis_survives_tiny_matrices_and_a_first_gradient_of_zero(basis):
    for names in (names for names in POSSIBLE if names[0] == basis and names[3] == "reset"):
        for shape in SHAPES[3:]:
            check(names, shape)
        check(names, (6, 11), zero_first=True)
