"""What processes that train together tell each other: means, weights, and whether they chose alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fallow.core.distributed import average_gradients, broadcast, check_alike, digest, rank
from fallow.core.errors import ModelError
from ranks import run_ranks


def exchange() -> dict[str, Any]:
    """All checks of this file in one pair of processes; rank r has gradients r + 1."""
    found: dict[str, Any] = {}
    me = rank()
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((3,), (2, 2), (4,), (5,), (0,))]
    params.append(nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    params[0].grad = torch.full((3,), me + 1.0)
    params[1].grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t() * (me + 1)  # not contiguous
    params[2].grad = torch.full((4,), 6.0) if me else None
    params[5].grad = torch.full((2,), 1e-12 * (me + 1), dtype=torch.float64)
    place = params[0].grad.data_ptr()
    average_gradients(params, bucket=20)
    found["same memory"] = params[0].grad.data_ptr() == place
    found["means"] = [None if param.grad is None else param.grad.clone() for param in params]
    average_gradients(params)
    found["again"] = [None if param.grad is None else param.grad for param in params]

    weights = [torch.full((2, 3), float(me)).t(), torch.full((4,), me, dtype=torch.bfloat16)]
    broadcast(weights)
    found["broadcast"] = [weight.float().clone() for weight in weights]

    check_alike({"a": digest(torch.arange(3)), "b": digest(torch.arange(4))})
    try:
        check_alike({"a": digest(torch.arange(3)), "b": digest(torch.arange(4) + me), "c": "x"})
    except ModelError as error:
        found["error"] = str(error)
    return found


def test_ranks_exchange_means_weights_and_choices():
    one, other = run_ranks(exchange)
    for found in (one, other):
        assert found["same memory"]
        first, second, third, fourth, empty, double = found["means"]
        assert torch.equal(first, torch.full((3,), 1.5))
        assert torch.equal(second, torch.tensor([[1.5, 4.5], [3.0, 6.0]]))
        assert torch.equal(third, torch.full((4,), 3.0)), "a rank without a gradient counts as zero"
        assert fourth is None, "no rank has a gradient"
        assert empty is None
        assert torch.equal(double, torch.full((2,), 1.5e-12, dtype=torch.float64))
        for mean, again in zip(found["means"], found["again"], strict=True):
            assert mean is again is None or torch.equal(mean, again)
        assert all(not bool(weight.any()) for weight in found["broadcast"])
        assert "rank 1 trains other entries than rank 0: 'b' differs (and 0 more)" in found["error"]


def test_a_lone_process_changes_nothing():
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([1.0, 2.0])
    average_gradients([param])
    broadcast([param])
    check_alike({"a": "x"})
    assert param.grad.tolist() == [1.0, 2.0]


def test_a_digest_tells_values_and_types_apart():
    values = torch.arange(4)
    assert digest(values) == digest(values.clone())
    assert digest(values) != digest(values + 1)
    assert digest(values) != digest(values.int())
    assert digest(values, values) != digest(values)
