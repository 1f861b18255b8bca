"""Layers take a sample without a batch, and a batch without samples, as torch's own do: every method."""

from __future__ import annotations

import pytest
import torch
from one_layer import OneLayer
from torch import nn

from fallow import catalogue

OPTIONS = {
    "petalface": {"rank": 2, "branch_dropout": 0.0},
    "pego": {"rank": 1, "group": 2},
    "randlora": {"rank": 2},
    "smora": {"rank": 4, "active": 2},
    "loca": {"components": 9},
    "nola": {"rank": 2, "num_basis": 7},
    "bone": {"rank": 3},
    "svfit": {},
    "loldu": {},
}
METHODS = [
    card.slug
    for card in catalogue.methods()
    if card.ready and card.idea == "delta" and card.slug not in ("peft", "wara-spatial")  # which needs a grid of tokens
]
LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (6,)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (6, 7, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_sample_alone_gives_what_it_gives_in_a_batch_of_one(method: str, kind: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    context = {"quality": torch.tensor(0.7)}
    model = OneLayer(make().to(dtype), method, context=context, **OPTIONS.get(method, {"rank": 2}))
    model.delta.randomize()
    model.eval()
    x = torch.randn(shape, dtype=dtype)
    alone, batch = x.clone().requires_grad_(), x[None].clone().requires_grad_()
    trained = [param for param in model.delta.all_parameters() if param.requires_grad]
    got = torch.autograd.grad(model(alone).square().sum(), [alone, *trained], allow_unused=True)
    want = torch.autograd.grad(model(batch).square().sum(), [batch, *trained], allow_unused=True)
    assert torch.equal(model(alone), model(batch)[0])
    assert torch.equal(got[0], want[0][0])
    assert all((g is None and w is None) or torch.equal(g, w) for g, w in zip(got[1:], want[1:], strict=True))
    assert any(g is not None and g.abs().sum() > 0 for g in got[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_without_samples_gives_none_and_gradients_of_zero(method: str, kind: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make().to(dtype)
    model = OneLayer(layer, method, context={"quality": torch.tensor(0.7)}, **OPTIONS.get(method, {"rank": 2}))
    model.delta.randomize()
    x = torch.zeros(0, *shape, dtype=dtype, requires_grad=True)
    y = model(x)
    assert y.shape == layer(x).shape
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in model.delta.all_parameters())
