"""GarmentNet: what goes in and out, and that what is saved is what is read."""

from __future__ import annotations

import json

import pytest
import torch

from fallow.analysis.features import GarmentNet

GARMENTS = ["hat", "scarf", "glove"]
FAMILIES = ["photo", "sketch"]


@pytest.fixture
def net() -> GarmentNet:
    """A net whose batch norms have statistics of their own, as after training."""
    torch.manual_seed(0)
    net = GarmentNet(garments=3, families=2)
    for _ in range(3):
        net(torch.rand(16, 3, 32, 32))
    return net.eval()


def test_pictures_become_garment_logits_family_logits_and_64_features(net):
    garment, family = net(torch.rand(5, 3, 32, 32))
    assert garment.shape == (5, 3)
    assert family.shape == (5, 2)
    assert net.features(torch.rand(5, 3, 32, 32)).shape == (5, 64)


def test_garment_logits_are_a_linear_reading_of_the_features(net):
    pictures = torch.rand(4, 3, 32, 32)
    features = net.features(pictures)
    assert torch.allclose(net.garment_logits(pictures), features @ net.garment.weight.T + net.garment.bias, atol=1e-6)
    assert not features.requires_grad
    assert features.min() >= 0


def test_features_do_not_depend_on_how_pictures_are_batched(net):
    pictures = torch.rand(7, 3, 32, 32)
    assert torch.allclose(net.features(pictures, batch=3), net.features(pictures, batch=7), atol=1e-6)
    assert torch.allclose(net.garment_logits(pictures, batch=2), net(pictures)[0], atol=1e-6)


def test_what_is_read_is_what_was_saved_in_eval_mode_with_its_names(net, tmp_path):
    net.save_pretrained(tmp_path / "new" / "net", GARMENTS, FAMILIES)
    read = GarmentNet.from_pretrained(tmp_path / "new" / "net")
    pictures = torch.rand(4, 3, 32, 32)
    assert torch.equal(read.features(pictures), net.features(pictures))
    assert torch.equal(read(pictures)[1], net(pictures)[1])
    assert (read.garment_names, read.family_names) == (GARMENTS, FAMILIES)
    assert not any(module.training for module in read.modules())


def test_a_net_of_another_number_of_garments_is_refused(net, tmp_path):
    net.save_pretrained(tmp_path, GARMENTS, FAMILIES)
    (tmp_path / "config.json").write_text(json.dumps({"garments": [*GARMENTS, "sock"], "families": FAMILIES}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        GarmentNet.from_pretrained(tmp_path)
