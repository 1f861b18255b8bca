"""Beside PEFT's own code for EVA and CorDA, where the two are to agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fallow.core.probe import probe

peft = pytest.importorskip("peft")


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0] * (0.7 ** torch.arange(24.0))
    return [torch.randn(1, 40, 24, generator=generator) @ basis.T + 0.4 for _ in range(6)]


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 12))


def test_covariances_are_those_of_pefts_corda() -> None:
    from peft.tuners.lora.corda import calib_cov_distribution

    model, data = network(), sequences()
    corda = peft.tuners.lora.config.CordaConfig()
    config = peft.LoraConfig(target_modules=["0", "2"], init_lora_weights="corda", corda_config=corda)
    calib_cov_distribution(model, config, lambda: [model(x) for x in data], None, None)
    for options in ({}, {"scale_by": "sample"}):
        batches = data if not options else [torch.cat(data[:4]), torch.cat(data[4:])]
        stats = probe(model, batches, "input_covariance", **options)
        for name in ("0", "2"):
            theirs = model.get_submodule(name).covariance_matrix
            assert torch.allclose(stats[name].covariance, theirs, rtol=1e-5, atol=1e-6)


def test_components_are_those_of_pefts_eva() -> None:
    from peft.utils.incremental_pca import IncrementalPCA

    data = sequences()
    theirs = IncrementalPCA(n_components=8, copy=True, lowrank=True, lowrank_seed=42)
    for x in data:
        theirs.partial_fit(x[0])
    ours = probe(network(), data, "activation", components=8, tolerance=1.0)["0"].activation
    assert ours.tokens == 240
    assert torch.allclose((ours.directions * theirs.components_.float()).sum(1).abs(), torch.ones(8), atol=1e-3)
    assert torch.allclose(ours.singular, theirs.singular_values_.float(), rtol=1e-3)
    assert torch.allclose(ours.ratios, theirs.explained_variance_ratio_.float(), atol=1e-4)
    assert torch.allclose(ours.mean, theirs.mean_.float(), atol=1e-6)
