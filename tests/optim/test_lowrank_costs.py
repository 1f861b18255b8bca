"""What a step costs: states by formulas, no matrix of a weight's size, no wait for the device; and compiling it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps import drawn, state_bytes, take
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fallow
from fallow.core.errors import ConfigError
from fallow.optim.bases import BASES
from fallow.optim.lowrank import LowRank
from fallow.optim.residuals import RESIDUALS

R, D, N = 16, 64, 96
FORMULAS: dict[str, tuple[dict[str, Any], float]] = {
    "GaLore": ({}, 4 * R * (D + 2 * N)),
    "QGaLore": ({}, 2 * R * N * (1 + 4 / 256) + R * D / 2 + R * D / 64 + 2 * 4),
    "Fira": ({}, 4 * (R * (D + 2 * N) + 1)),
    "FRUGAL": ({"rank": 0.25, "basis": "coordinates", "side": "left"}, 4 * (2 * R * N + R)),
    "DCTAdamW": ({}, 4 * (2 * R * N + R)),
    "Trion": ({}, 4 * (D * N + R)),
    "APOLLO": ({}, 4 * (2 * R * N + 1)),
    "APOLLOMini": ({"rank": 1}, 4 * (2 * N + 1)),
    "LowRank": ({"inner": "adafactor"}, 4 * (R * D + R + N)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_states_of_a_named_optimizer_are_as_large_as_its_formula(name):
    options, formula = FORMULAS[name]
    for shape in ((D, N), (N, D)):
        param = nn.Parameter(torch.zeros(shape))
        side = {"side": "right"} if "side" in options and shape[0] == N else {}
        own = getattr(fallow, name)([param], 1e-3, **{"rank": R, **options, **side})
        take(own, param, drawn(shape, 1))
        assert state_bytes(own, param) == pytest.approx(formula, abs=0)


class Waits(TorchDispatchMode):
    """Counts what would wait for an accelerator: reading a number, or the places of what is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_wait_is_seen():
    with Waits() as waits:
        torch.ones(1).item()
    assert waits.seen


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("basis", BASES)
def test_a_step_between_refreshes_never_waits_for_the_device(basis, residual):
    params = [nn.Parameter(torch.zeros(D, N)) for _ in range(2)] + [nn.Parameter(torch.zeros(D))]
    for inner in ("adamw", "adafactor", "lion", "sgdm"):
        try:
            own = LowRank(params, 1e-3, 0.25, basis=basis, residual=residual, inner=inner, refresh_every=50)
        except ConfigError:
            continue
        for step in range(2):
            for param in params:
                param.grad = torch.randn_like(param)
            with Waits() as waits:
                own.step()
            assert not step or not waits.seen


@pytest.mark.parametrize("residual", ["drop", "fira", "sgd", "apollo", "feedback", "momentum"])
@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256)], ids=str)
def test_a_step_makes_no_matrix_of_the_weights_size(shape, residual, peak_bytes):
    param = nn.Parameter(torch.zeros(shape))
    own = LowRank([param], 1e-3, 8, residual=residual, basis="gaussian" if residual == "apollo" else "warm")
    take(own, param, drawn(shape, 1))
    param.grad = drawn(shape, 1)[0]
    assert peak_bytes(own.step) < 0.25 * param.nbytes


@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256)], ids=str)
@pytest.mark.parametrize("basis", ["warm", "rsvd", "random", "coordinates"])
def test_choosing_a_basis_makes_no_copy_of_a_large_gradient(shape, basis, peak_bytes, monkeypatch):
    monkeypatch.setattr("fallow.optim.updating.TOGETHER", {"cpu": 1})  # as if they were larger
    params = [nn.Parameter(torch.zeros(shape)) for _ in range(2)]
    own = LowRank(params, 1e-3, 8, basis=basis, refresh_every=1)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(shape)
        own.step()
    assert peak_bytes(own.step) < 0.3 * params[0].nbytes


def test_a_compiled_step_takes_the_same_steps():
    def trained(compiled: bool, **options: Any) -> list[torch.Tensor]:
        params = [nn.Parameter(torch.zeros(24, 40))]
        own = LowRank(params, 1e-2, 4, **options)
        step = torch.compile(own.step, backend="eager") if compiled else own.step
        for at in range(3):
            for param in params:
                param.grad = drawn(tuple(param.shape), 1, seed=at)[0]
            step()
        return [param.detach() for param in params]

    for one, other in zip(trained(True, residual="fira"), trained(False, residual="fira"), strict=True):
        torch.testing.assert_close(one, other)
