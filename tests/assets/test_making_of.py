"""What the scripts that made the shipped model and pictures are built of: captions, shades, styles, the tokenizer."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def scripts():
    """The modules `garments` and `pretrain_mini_sd` of scripts/."""
    folder = str(Path(__file__).parents[2] / "scripts")
    sys.path.insert(0, folder)
    try:
        import garments
        import pretrain_mini_sd
    finally:
        sys.path.remove(folder)
    return garments, pretrain_mini_sd


@pytest.mark.parametrize(
    ("label", "shade", "text"),
    [
        (4, 0, "a photo of a dark coat"),
        (4, None, "a photo of a coat"),
        (1, 1, "a photo of grey trousers"),
        (1, None, "a photo of trousers"),
        (9, None, "a photo of an ankle boot"),
        (9, 2, "a photo of a light ankle boot"),
    ],
)
def test_captions_have_the_right_article(scripts, label, shade, text):
    garments, _ = scripts
    assert garments.caption(label, shade) == text


def test_idx_files_are_read_and_padded_to_32_pixels(scripts, tmp_path):
    garments, _ = scripts
    image = bytes(range(256)) * 3 + bytes(16)  # 784
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(struct.pack(">4i", 2051, 1, 28, 28) + image))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">2i", 2049, 1) + bytes([7])))
    images, labels = garments.load(tmp_path, "t10k")
    assert images.shape == (1, 1, 32, 32)
    assert images[0, 0, 2, 2:6].tolist() == [0, 1, 2, 3]
    assert images[0, 0, :2].sum() == images[0, 0, :, 30:].sum() == 0
    assert labels.tolist() == [7]
    with pytest.raises(SystemExit, match="dataset-fashion-mnist"):
        garments.load(tmp_path, "train")


def test_shade_is_that_of_the_garment_whatever_its_size(scripts):
    garments, _ = scripts
    images = torch.zeros(4, 1, 32, 32, dtype=torch.uint8)
    images[0, :, 4:28, 4:28], images[1, :, 15:17, 15:17], images[2, :, :, :16] = 100, 240, 150
    assert garments.shade(images[:3]).tolist() == [0, 2, 1]
    assert garments.shade(images[3:]).tolist() == [0]  # nothing there: no division by zero


def test_a_garment_looks_different_in_each_style_and_stays_in_range(scripts):
    garments, _ = scripts
    x = torch.zeros(2, 1, 32, 32)
    x[0, :, 6:26, 8:24], x[1, :, 6:26, 8:24] = 0.3, 0.9
    drawn = {name: garments.in_style(x, name) for name in garments.SHIPPED}
    for name, pictures in drawn.items():
        assert pictures.shape == (2, 3, 32, 32)
        assert 0 <= pictures.min() <= pictures.max() <= 1
        contrast = (pictures[:, :, 6:26, 8:24].mean((2, 3)) - pictures[:, :, :, :4].mean((2, 3))).abs().amax(1)
        texture = pictures.std((2, 3)).amax(1)
        assert (torch.maximum(contrast, texture) > 0.1).all(), name  # dark garments are seen, too
    names = list(drawn)
    for one, other in zip(names, names[1:] + names[:1], strict=True):
        assert (drawn[one] - drawn[other]).abs().mean() > 0.1


def test_random_styles_are_the_same_for_the_same_seed_and_four_in_nine_are_photographs(scripts):
    garments, _ = scripts
    x = torch.rand(600, 1, 32, 32)
    one, family = garments.in_random_style(x, torch.Generator().manual_seed(5))
    two, _ = garments.in_random_style(x, torch.Generator().manual_seed(5))
    assert torch.equal(one, two)
    assert family.unique().tolist() == list(range(6))
    assert (family == 0).float().mean() == pytest.approx(4 / 9, abs=0.06)
    assert torch.equal(one[family == 0], x[family == 0].expand(-1, 3, -1, -1))


def test_each_word_is_one_token_and_every_caption_fits(scripts, tmp_path):
    garments, pretrain = scripts
    tokenizer = pretrain.make_tokenizer(tmp_path)
    assert all(len(tokenizer(word).input_ids) == 3 for word in pretrain.WORDS if "-" not in word)
    table = pretrain.prompt_table(tokenizer)
    assert table.shape == (10, 4, 4, pretrain.TOKENS)
    assert tokenizer.decode(table[4, 0, 1], skip_special_tokens=True).split() == [
        "a",
        "picture",
        "of",
        "a",
        "dark",
        "coat",
    ]
    assert tokenizer.decode(table[1, 3, 2], skip_special_tokens=True).split() == ["trousers"]
    for style in garments.SHIPPED:
        assert tokenizer.tokenize(f"{style} style, a photo")[:3] == [f"{style.lower()}</w>", "style</w>", ",</w>"]


def test_the_moving_average_follows_the_parameters_and_is_put_in_their_place(scripts):
    _, pretrain = scripts
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 1.0)
    ema = pretrain.Ema([layer], decay=0.5)
    torch.nn.init.constant_(layer.weight, 3.0)
    ema.update()  # warm-up: decay 2 / 11
    ema.copy_to_live()
    assert layer.weight.item() == pytest.approx(1 * 2 / 11 + 3 * 9 / 11)


def test_the_parts_are_as_large_as_the_card_says(scripts, tmp_path):
    _, pretrain = scripts
    parts = (pretrain.make_unet(), pretrain.make_vae(), pretrain.make_text_model(pretrain.make_tokenizer(tmp_path)))
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [3_152_644, 520_687, 152_704]
