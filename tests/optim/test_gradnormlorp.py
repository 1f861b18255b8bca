"""GradNormLoRP: DoRA's factors under projected updates, and weights kept as lengths and directions."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fallow
from fallow.core.errors import ConfigError
from fallow.optim.gradnormlorp import GradNormLoRP


def adapted(rank: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6))
    fallow.attach(model, "dora", rank=rank, alpha=2 * rank)
    return model


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def some_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 12, generator=generator)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def one_matrix(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def test_factors_are_projected_and_hold_as_many_numbers_as_the_formula_says() -> None:
    model = adapted()
    optimizer = GradNormLoRP(trained(model), lr=1e-2, rank=2, refresh_every=10)
    some_steps(model, optimizer, 3)
    for name, param in trained(model):
        held = sum(value.numel() for value in optimizer.state[param].values() if isinstance(value, Tensor))
        expected = 2 * param.numel() if "magnitude" in name else 2 * min(param.shape) + 2 * 2 * max(param.shape)
        assert held == expected, name


def test_updates_between_refreshes_have_the_rank_of_the_projection() -> None:
    model = adapted()
    optimizer = GradNormLoRP(trained(model), lr=1e-2, rank=2, refresh_every=50)
    some_steps(model, optimizer, 2)
    before = {name: param.detach().clone() for name, param in trained(model)}
    some_steps(model, optimizer, 5, seed=2)
    for name, param in trained(model):
        if param.ndim == 2:
            singular = torch.linalg.svdvals((param - before[name]).double())
            assert singular[2] < 1e-5 * singular[0], name


def test_the_first_basis_of_a_factor_waits_for_its_first_gradient() -> None:
    """B is zero at the start, so A has none on the first step."""
    model = adapted()
    optimizer = GradNormLoRP(trained(model), lr=1e-2, rank=2, refresh_every=500)
    first = next(param for name, param in trained(model) if name.endswith("A"))
    some_steps(model, optimizer, 1)
    assert not optimizer.state[first]["chosen"]
    some_steps(model, optimizer, 1)
    assert optimizer.state[first]["chosen"]
    basis = optimizer.state[first]["basis"]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(2), atol=1e-5, rtol=0)


def test_a_factor_no_longer_than_the_rank_takes_adamw() -> None:
    model, peer = adapted(4), adapted(4)
    ours = GradNormLoRP(trained(model), lr=1e-3, rank=4, eps=1e-8)
    theirs = torch.optim.AdamW([param for _, param in trained(peer)], lr=1e-3, weight_decay=0.0)
    some_steps(model, ours, 4)
    some_steps(peer, theirs, 4)
    for (_, one), (_, other) in zip(trained(model), trained(peer), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


# -- weights as lengths and directions --------------------------------------------------------------------------------


def reference(w: Tensor, d: Tensor, basis: Tensor, left: bool, lr: float, scale: float, eps: float) -> Tensor:
    """A first step from the equations, in float64; w, d (out, in)."""
    g = w.norm(dim=1, keepdim=True)
    u = w / g
    radial = (d * u).sum(1, keepdim=True)
    t = d - radial * u
    r = basis.mT @ t if left else t @ basis
    n = r / (r.abs() + eps)
    back = basis @ n if left else n @ basis.mT
    moved = u - lr * scale * back / g
    return (g - lr * radial / (radial.abs() + eps)) * moved / moved.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_a_normalised_step_follows_the_equations(shape: tuple[int, int]) -> None:
    param = one_matrix(shape, dtype=torch.float64)
    before = param.detach().clone()
    optimizer = GradNormLoRP([param], lr=1e-2, rank=2, scale=0.5, normalized=True, eps=1e-12)
    param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradient = param.grad.clone()
    optimizer.step()
    basis = optimizer.state[param]["basis"]
    expected = reference(before, gradient, basis, shape[0] < shape[1], 1e-2, 0.5, 1e-12)
    torch.testing.assert_close(param.detach(), expected, atol=1e-12, rtol=0)


def test_a_gradient_along_the_weight_changes_lengths_alone() -> None:
    param = one_matrix((6, 9))
    start = param.detach().clone()
    optimizer = GradNormLoRP([param], lr=1e-2, rank=2, normalized=True)
    lengths = [start.norm(dim=1)]
    for _ in range(6):
        param.grad = -param.detach() / param.detach().norm(dim=1, keepdim=True)
        optimizer.step()
        lengths.append(param.detach().norm(dim=1))
    assert all(bool((after > before).all()) for before, after in pairwise(lengths))
    directions = param.detach() / param.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(directions, start / start.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_a_gradient_across_the_weight_keeps_the_lengths(shape: tuple[int, int]) -> None:
    param = one_matrix(shape)
    start = param.detach().norm(dim=1)
    optimizer = GradNormLoRP([param], lr=1e-3, rank=3, normalized=True)
    for seed in range(10, 15):
        free = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        unit = param.detach() / param.detach().norm(dim=1, keepdim=True)
        param.grad = free - (free * unit).sum(1, keepdim=True) * unit
        before = param.detach().clone()
        optimizer.step()
        assert not torch.equal(before, param.detach())
    torch.testing.assert_close(param.detach().norm(dim=1), start, atol=1e-5, rtol=0)


def test_rows_of_zeros_and_zero_biases_stay_finite_and_learn() -> None:
    param = nn.Parameter(torch.zeros(4, 7))
    param.data[1:] = one_matrix((3, 7)).data
    bias = nn.Parameter(torch.zeros(4))
    optimizer = GradNormLoRP([param, bias], lr=1e-2, rank=2, normalized=True)
    for seed in range(5):
        for tensor in (param, bias):
            tensor.grad = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    assert bool(torch.isfinite(param).all())
    assert bool(torch.isfinite(bias).all())
    assert float(param[0].detach().norm()) > 0


def test_a_normalised_run_resumes_bit_for_bit() -> None:
    param = one_matrix((8, 5))
    optimizer = GradNormLoRP([param], lr=1e-2, rank=2, refresh_every=3, normalized=True)

    def go(param: nn.Parameter, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
            optimizer.step()

    go(param, optimizer, range(4))
    other = nn.Parameter(param.detach().clone())
    resumed = GradNormLoRP([other], lr=1e-2, rank=2, refresh_every=3, normalized=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go(param, optimizer, range(4, 9))
    go(other, resumed, range(4, 9))
    assert torch.equal(param, other)


def test_a_residual_beside_normalised_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="normalized=True"):
        GradNormLoRP([one_matrix((4, 4))], normalized=True, residual="fira")
    with pytest.raises(ConfigError, match="leave residual out of the groups"):
        GradNormLoRP([{"params": [one_matrix((4, 4))], "residual": "fira"}], normalized=True)


def test_sharded_weights_are_refused_where_lengths_are_kept() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = nn.Parameter(distribute_tensor(torch.ones(4, 6), init_device_mesh("cpu", (1,)), [Shard(0)]))
        with pytest.raises(ConfigError, match="do not shard these weights"):
            GradNormLoRP([("weight", sharded)], normalized=True)
    finally:
        dist.destroy_process_group()
