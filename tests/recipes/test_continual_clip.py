"""CLIP as a classifier of texts: its loss against loops over pictures and classes, and its tasks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fallow.core.errors import ConfigError, ModelError
from fallow.recipes.continual import ContinualConfig, continual
from fallow.recipes.continual_clip import TextClassifier, contrastive_loss
from fallow.recipes.continual_tasks import TaskSequence


def in_loops(features: Tensor, texts: Tensor, labels: Tensor, scale: float, earlier: int) -> float:
    by_picture = 0.0
    for picture, label in zip(features, labels.tolist(), strict=True):
        among = {c: math.exp(scale * float(picture @ texts[c])) for c in range(earlier, len(texts))}
        by_picture -= math.log(among[label] / sum(among.values())) / len(features)
    by_text = 0.0
    for c, text in enumerate(texts):
        among = [math.exp(scale * float(text @ picture)) for picture in features]
        for value, label in zip(among, labels.tolist(), strict=True):
            if label == c:
                by_text -= math.log(value / sum(among)) / len(texts)
    return by_picture + by_text


@pytest.mark.parametrize("earlier", [0, 2])
def test_the_loss_is_that_of_loops_with_repeated_classes_and_classes_without_a_picture(earlier: int) -> None:
    features = torch.nn.functional.normalize(torch.randn(6, 8), dim=1).requires_grad_()
    texts = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    labels = torch.tensor([2, 4, 2, 2, 4, 2])  # 3 has no picture, 2 has four
    found = contrastive_loss(features, texts, labels, 7.0, earlier)
    assert float(found.detach()) == pytest.approx(in_loops(features.detach(), texts, labels, 7.0, earlier), rel=1e-5)
    found.backward()
    assert torch.isfinite(features.grad).all()


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A CLIP of random weights, pictures of 16 x 16, with what it needs to read pictures and texts."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    (tmp_path / "words").mkdir()
    letters = sorted(ByteLevel.alphabet())  # single bytes, without any merge: every text has a tokenization
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "words" / "vocab.json").write_text(json.dumps({token: at for at, token in enumerate(tokens)}))
    (tmp_path / "words" / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "words", model_max_length=32)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**shared, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "pad_token_id": 0}
    vision = {**shared, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


CLASSES = ["cat", "dog", "bird", "fish"]


def test_texts_take_the_place_of_a_classifier_and_unseen_classes_are_judged_by_theirs(clip: Path) -> None:
    model = TextClassifier(str(clip), CLASSES)
    pixels = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        logits = model.logits(pixels)
        wanted = model.network.logit_scale.exp() * model.pictures(pixels) @ model.texts().T
    assert logits.shape == (3, 4)
    torch.testing.assert_close(logits, wanted)
    assert model.texts().norm(dim=1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    single = model.texts([2])
    torch.testing.assert_close(single, model.texts()[2:3])


def test_texts_of_the_task_have_gradients_those_of_earlier_ones_are_as_they_were_at_its_start(clip: Path) -> None:
    torch.manual_seed(0)
    model = TextClassifier(str(clip), CLASSES)
    tasks = TaskSequence(model.network, rank=2)
    tasks.start_task("two", steps=10)
    from fallow.core.held_deltas import held_adapter

    for one in held_adapter(model.network, "task").deltas:
        one.delta.randomize()
    model.remember_texts()
    before = model.known.clone()
    pixels, labels = torch.rand(4, 3, 16, 16), torch.tensor([2, 3, 2, 2])
    loss = model.loss(pixels, labels, classes=[2, 3], seen=[0, 1])
    loss.backward()
    grads = {name: p.grad for name, p in model.network.named_parameters() if p.requires_grad}
    assert any("text_model" in name and grad is not None and grad.abs().sum() > 0 for name, grad in grads.items())
    assert any("vision_model" in name and grad is not None and grad.abs().sum() > 0 for name, grad in grads.items())
    assert torch.equal(model.known, before)
    wanted = contrastive_loss(
        model.pictures(pixels), model.texts(), torch.tensor([2, 3, 2, 2]), model.network.logit_scale.exp(), 2
    )
    torch.testing.assert_close(loss, wanted)
    frozen = TextClassifier(str(clip), CLASSES, adapts_text=False)
    TaskSequence(frozen.network, targets=r"vision_model\..*(q_proj|v_proj)", rank=2).start_task("one", steps=10)
    frozen.loss(pixels, labels, classes=[2, 3]).backward()
    assert all("vision_model" in n for n, p in frozen.network.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("text", [True, False])
def test_a_job_learns_tasks_of_new_classes_by_their_texts(clip: Path, tmp_path: Path, text: bool) -> None:
    for task, names in (("animals", ("cat", "dog")), ("sea", ("fish", "whale"))):
        for number, name in enumerate(names):
            (tmp_path / "data" / task / name).mkdir(parents=True)
            for at in range(8):
                pixels = np.random.default_rng(9 * number + at).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / task / name / f"{at}.png")
    config = ContinualConfig(
        data=str(tmp_path / "data"), model=str(clip), methods=["codyra:2"], steps=2, lrs=[1e-2], seeds=[0], text=text,
        batch_size=4, device="cpu", output=tmp_path / "job",
    )  # fmt: skip
    (method,) = json.loads((continual(config) / "results.json").read_text())["methods"]
    (run,) = method["runs"]
    assert run["failed"] == ""
    encoders = {name.partition(".")[0] for name in run["ranks"][0]}
    assert encoders == ({"vision_model", "text_model"} if text else {"vision_model"})
    parts = {name.rpartition(".")[2] for name in run["ranks"][0]}
    assert parts == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert np.array(run["matrix"]).shape == (3, 2)


def test_a_template_without_a_place_and_a_folder_without_a_model_are_refused(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no place for the class"):
        TextClassifier(str(clip), CLASSES, template="a photo")
    with pytest.raises(ModelError, match="is no CLIP that can be loaded"):
        TextClassifier(str(tmp_path / "words"), CLASSES)
