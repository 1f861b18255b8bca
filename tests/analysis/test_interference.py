"""SHiRA's diagnostics against dense products, and its check 4."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fallow
from fallow.analysis.interference import interference
from fallow.core.sparse import Entry, SparseDelta


def adapter(change: Tensor, store: str = "delta") -> SparseDelta:
    index = change.reshape(-1).nonzero().view(-1).int()
    values = change.reshape(-1)[index.long()]
    return SparseDelta({"w": Entry(index, values, tuple(change.shape), "float32", "")}, store, {})


@pytest.mark.parametrize("shape", [(30, 20), (8, 3, 3, 3)])
def test_figures_equal_those_of_the_dense_products(shape):
    one, other = (torch.randn(shape) * (torch.rand(shape) < density) for density in (0.1, 0.3))
    found = interference(adapter(one), adapter(other))["w"]
    product = one.flatten(1).double().T @ other.flatten(1).double()
    assert found.awom == pytest.approx(float(product.norm()), rel=1e-6)
    assert found.awor == pytest.approx(1 - float((product != 0).sum()) / product.shape[0] ** 2)
    assert found.shared == int(((one != 0) & (other != 0)).sum())


def test_structs_of_different_rows_do_not_interfere_and_dense_changes_do_wholly():
    def trained(offset: int) -> SparseDelta:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 24), nn.Tanh())
        optimizer = fallow.SHiRA(model, "struct", every=6, offset=offset, diagonal=False, lr=0.1)
        model(torch.randn(5, 24)).square().sum().backward()
        optimizer.step()
        return optimizer.delta()

    found = interference(trained(0), trained(1))["0.weight"]
    assert (found.awom, found.awor, found.shared) == (0.0, 1.0, 0)
    full = interference(adapter(torch.randn(10, 10)), adapter(torch.randn(10, 10)))["w"]
    assert full.awor == 0.0
    assert full.shared == 100


def test_adapters_of_different_bases_or_with_values_are_refused():
    with pytest.raises(fallow.AdapterError, match="give two adapters of one base"):
        interference(adapter(torch.ones(3, 3)), adapter(torch.ones(4, 3)))
    with pytest.raises(fallow.AdapterError, match="stored as value and delta"):
        interference(adapter(torch.ones(3, 3), "value"), adapter(torch.ones(3, 3)))
