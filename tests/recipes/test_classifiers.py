"""Networks that name what a picture shows: how they are asked, taught, and found by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fallow.deltas  # noqa: F401  # makes the names of the methods known
from fallow.core.errors import ModelError
from fallow.recipes.classifiers import (
    Classifier,
    endless,
    fitting_ranks,
    make_classifier,
    own_side,
    teach,
    to_training,
)
from fallow.recipes.labelled import GARMENTS, held, styles

CLASSES = ["a", "b", "c"]


@pytest.mark.parametrize("model", ["mlp", "vit"])
def test_small_networks_learn_what_they_are_taught(model: str):
    torch.manual_seed(0)
    pixels = torch.rand(60, 1, 8, 8)
    labels = torch.arange(60) % 3
    pixels[torch.arange(60), 0, labels, 0] = 4.0
    data = held(pixels, labels)
    classifier = make_classifier(model, CLASSES, 8, 1)
    assert classifier.logits(pixels[:5]).shape == (5, 3)
    teach(classifier, data, 40, lr=1e-2, batch=20)
    assert classifier.accuracy(data) > 0.9
    assert not classifier.network.training


def test_the_loss_is_among_the_named_classes_alone():
    classifier = make_classifier("mlp", CLASSES, 8, 1)
    pixels, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 2, 2, 0])
    logits = classifier.logits(pixels)[:, [0, 2]]
    wanted = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1, 0]))
    found = classifier.loss(pixels, labels, [0, 2])
    torch.testing.assert_close(found, wanted)
    found.backward()
    head = classifier.network.classifier
    assert float(head.weight.grad[1].abs().sum()) == 0.0
    assert float(head.weight.grad[0].abs().sum()) > 0
    torch.testing.assert_close(
        classifier.loss(pixels, labels), nn.functional.cross_entropy(classifier.logits(pixels), labels)
    )


def test_garment_net_knows_the_shipped_garments_and_keeps_its_statistics():
    classifier = make_classifier("garment-net", list(GARMENTS), 32, 3)
    (group,) = styles(["bronze"], seed=0)
    assert classifier.accuracy(group.test) > 0.5
    before = classifier.network.body[0][1].running_mean.clone()
    to_training(classifier.network)
    classifier.logits(torch.rand(8, 3, 32, 32))
    assert torch.equal(classifier.network.body[0][1].running_mean, before)
    assert not classifier.fresh_head
    fresh = make_classifier("garment-net", list(GARMENTS[:8]), 32, 3)
    assert fresh.fresh_head
    assert fresh.logits(torch.rand(1, 3, 32, 32)).shape == (1, 8)
    assert fresh.head_parameters == ["classifier.weight", "classifier.bias"]


def test_classifiers_of_transformers_come_from_a_folder_with_their_sizes_and_a_new_head_where_classes_differ(
    tiny_vit, tmp_path: Path
):
    from transformers import ViTImageProcessor

    network = tiny_vit()
    network.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5] * 3
    ).save_pretrained(tmp_path / "vit")
    names = [network.config.id2label[at] for at in range(5)]
    same = make_classifier(str(tmp_path / "vit"), names, 8, 1)
    assert (same.side, same.channels, same.head, same.fresh_head) == (16, 3, "classifier", False)
    assert [own_side(str(tmp_path / name)) for name in ("vit", "none")] == [16, 32]
    assert same.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    pixels = torch.rand(2, 3, 16, 16)
    network.eval()
    same.network.eval()
    with torch.no_grad():
        wanted = network((pixels - torch.tensor([0.1, 0.2, 0.3]).view(-1, 1, 1)) / 0.5).logits
        torch.testing.assert_close(same.logits(pixels), wanted)
        assert same.logits(torch.rand(2, 1, 8, 8)).shape == (2, 5)  # grey and small: enlarged, in three channels
    other = make_classifier(str(tmp_path / "vit"), CLASSES, 8, 1)
    assert other.fresh_head
    assert other.logits(pixels).shape == (2, 3)
    with pytest.raises(ModelError, match="is no image classifier that can be loaded"):
        make_classifier(str(tmp_path / "none"), CLASSES, 8, 1)
    with pytest.raises(ModelError, match="a side that 4 divides, not 10"):
        make_classifier("vit", CLASSES, 10, 1)


def test_a_clip_is_classified_by_its_projected_features(tmp_path: Path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**shared, "image_size": 16, "patch_size": 8}
    whole = CLIPModel(
        CLIPConfig(text_config={**shared, "vocab_size": 9}, vision_config=vision, projection_dim=8)
    ).eval()
    whole.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "clip")
    found = make_classifier(str(tmp_path / "clip"), CLASSES, 8, 1)
    found.network.eval()
    assert (found.side, found.channels, found.fresh_head) == (16, 3, True)
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        features = whole.get_image_features(pixel_values=found.prepared(pixels))
        features = getattr(features, "pooler_output", features)
        torch.testing.assert_close(found.logits(pixels), found.network.classifier(features))
    assert any(name.endswith("q_proj") for name, _ in found.network.named_modules())


def test_batches_are_full_and_each_round_holds_every_picture_once():
    stream = endless(held(torch.zeros(7, 1, 1, 1), torch.zeros(7).long()), 3, seed=0)
    drawn = torch.cat([next(stream) for _ in range(7)])
    assert len(drawn) == 21
    for round_ in drawn.split(7):
        assert sorted(round_.tolist()) == list(range(7))
    assert not torch.equal(drawn[:7], drawn[7:14])


def test_layers_too_small_for_a_rank_get_the_most_they_have():
    network = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 3))
    assert fitting_ranks(network, "lora", "all-linear", None, 8) == {"1": {"rank": 3}}
    assert fitting_ranks(network, "pego", "all-linear", None, 4, modules=6) == {"0": {"rank": 3}, "1": {"rank": 1}}
    assert fitting_ranks(network, "lora", "all-linear", ["1"], 8) == {}


def test_a_classifier_copies_to_another_device():
    classifier = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), "1", 2, 1, [0.5], [0.5]).to(
        torch.device("cpu")
    )
    assert classifier.device == torch.device("cpu")
    torch.testing.assert_close(classifier.prepared(torch.ones(1, 1, 2, 2)), torch.ones(1, 1, 2, 2))
