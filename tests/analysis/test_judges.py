"""Judges: the class that a caption asks for, and what is said where it cannot be told."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    ViTImageProcessor,
)

from fallow.analysis.features import GarmentNet
from fallow.analysis.judges import GarmentJudge, ModelJudge, class_in
from fallow.core.errors import ModelError

GARMENTS = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


@pytest.fixture(scope="module")
def net_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judge") / "garment-net"
    GarmentNet().eval().save_pretrained(
        folder, GARMENTS, ["photo", "duotone", "outline", "halftone", "relief", "mosaic"]
    )
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of the real class with random weights, its processor beside it."""
    folder = tmp_path_factory.mktemp("clip")
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8,
        },
        projection_dim=12,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def pictures(count: int, size: int = 40) -> list[Image.Image]:
    rng = torch.Generator().manual_seed(3)
    return [
        Image.fromarray(torch.randint(0, 256, (size, size, 3), generator=rng, dtype=torch.uint8).numpy())
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("caption", "garment"),
    [
        ("a photo of a dark t-shirt", "t-shirt"),
        ("a photo of a shirt", "shirt"),
        ("Blueprint style, A T Shirt", "t-shirt"),
        ("two tshirts", "t-shirt"),
        ("a photo of an ankle boot", "ankle boot"),
        ("ankle-boots, bronze", "ankle boot"),
        ("dresses in a row", "dress"),
        ("one trouser leg", "trousers"),
        ("trousers", "trousers"),
        ("a shirt under a pullover", "pullover"),  # the longest
        ("a dress, not a shirt", "dress"),  # as long: the first
        ("a baggage belt", None),
        ("a red car", None),
        ("", None),
    ],
)
def test_the_class_in_a_caption_is_the_longest_name_as_a_whole_word(caption, garment):
    found = class_in(caption, GARMENTS)
    assert (None if found is None else GARMENTS[found]) == garment


def test_captions_without_a_class_leave_alignment_out_and_say_so(net_folder):
    told = GarmentJudge(net_folder).alignment(pictures(2), ["a red car", "a house"])
    assert told.value is None
    assert told.recognised is None
    assert "no caption names a class" in told.reason
    assert "a red car" in told.reason
    assert "ankle boot" in told.reason


def test_captions_of_which_some_name_a_class_are_judged_on_those_and_it_is_said(net_folder):
    judge = GarmentJudge(net_folder)
    three = pictures(3)
    told = judge.alignment(three, ["a coat", "a red car", "a bag"])
    alone = judge.alignment([three[0], three[2]], ["a coat", "a bag"])
    assert told.judged == 2
    assert told.value == alone.value
    assert "1 of 3 captions" in told.reason
    assert alone.reason is None


def test_clip_alignment_is_a_hundred_times_the_cosine_of_the_embeddings(clip_folder):
    judge = ModelJudge(clip=clip_folder, batch=2)
    three, captions = pictures(3), ["a b", "c d e", "f"]
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    cosines = []
    with torch.no_grad():
        for picture, caption in zip(three, captions, strict=True):  # one at a time: no padding, no batch
            output = model(**processor(text=[caption], images=[picture], return_tensors="pt", padding=True))
            cosines.append((output.image_embeds * output.text_embeds).sum().item())
    told = judge.alignment(three, captions)
    assert told.value == pytest.approx(max(0.0, 100 * sum(cosines) / 3), abs=1e-3)
    assert told.judged == 3
    assert judge.features(three).shape == (3, 12)


def test_a_vision_folder_gives_the_features_and_without_clip_alignment_is_left_out(tmp_path):
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    ).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    judge = ModelJudge(vision=tmp_path)
    features = judge.features(pictures(3))
    assert features.shape == (3, 16)
    assert not torch.allclose(features[0], features[1])
    assert judge.alignment(pictures(1), ["a"]).value is None
    assert "clip=PATH" in judge.alignment(pictures(1), ["a"]).reason


def test_wrong_paths_are_refused_by_name(tmp_path, clip_folder):
    with pytest.raises(ModelError, match="needs vision=PATH, clip=PATH"):
        ModelJudge()
    with pytest.raises(ModelError, match=r"clip=.*nowhere does not exist"):
        ModelJudge(clip=tmp_path / "nowhere")
    with pytest.raises(ModelError, match="is no transformers CLIP folder"):
        ModelJudge(clip=tmp_path)
    with pytest.raises(ModelError, match="is no transformers vision model"):
        ModelJudge(vision=tmp_path)
    with pytest.raises(ModelError, match="garment net in"):
        GarmentJudge(tmp_path)
    (tmp_path / "inception.pth").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="Inception"):
        ModelJudge(vision=tmp_path / "inception.pth")
