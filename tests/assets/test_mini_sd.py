"""The shipped text-to-image model: it loads as any Stable Diffusion does, and draws what it is asked for."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import AutoTokenizer

from fallow import assets
from fallow.analysis.features import GarmentNet
from fallow.analysis.images import alignment, to_tensor

GARMENTS = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker"]


def asked(garment: str) -> str:
    return f"a photo of {'' if garment == 'trousers' else 'a '}{garment}"


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(assets.MINI_SD)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts, seed=0, steps=25, guidance=3.0):
    return pipeline(
        prompts, num_inference_steps=steps, guidance_scale=guidance, generator=torch.Generator().manual_seed(seed)
    ).images


def test_diffusers_loads_it_unchanged_in_float32_and_in_bfloat16(pipeline):
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert [part.dtype for part in parts] == [torch.float32] * 3
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == 32
    half = StableDiffusionPipeline.from_pretrained(assets.MINI_SD, torch_dtype=torch.bfloat16)
    assert half.unet.dtype == half.text_encoder.dtype == torch.bfloat16


def test_it_is_at_most_12_megabytes_on_disk_and_needs_no_pickle():
    files = [file for file in assets.MINI_SD.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt", ".md", ".png", ""}


def test_words_of_garments_styles_and_shades_are_one_token_and_any_text_has_tokens():
    tokenizer = AutoTokenizer.from_pretrained(assets.MINI_SD / "tokenizer")
    assert tokenizer.model_max_length == 32
    words = ["sandal", "bag", "ankle", "boot", *assets.STYLES, "style", "dark", "grey", "light", "sks"]
    assert [len(tokenizer(word).input_ids) - 2 for word in words] == [1] * len(words)
    assert tokenizer.tokenize("t-shirt") == ["t</w>", "-</w>", "shirt</w>"]
    assert tokenizer.unk_token_id not in tokenizer("zèbre, 123!").input_ids[1:-1]


def test_at_least_four_of_five_pictures_are_recognised_as_the_garment_asked_for(pipeline):
    net = GarmentNet.from_pretrained(assets.GARMENT_NET)
    wanted = [garment for _ in range(6) for garment in GARMENTS]
    pictures = to_tensor(draw(pipeline, [asked(garment) for garment in wanted]), 32)
    labels = torch.tensor([net.garment_names.index(garment) for garment in wanted])
    assert alignment(net, pictures, labels)["recognised"] >= 0.8


def test_it_draws_grey_photographs_on_black_light_ones_lighter_than_dark_ones(pipeline):
    light, dark = (
        to_tensor(draw(pipeline, [f"a photo of a {shade} {garment}" for garment in ("coat", "dress", "shirt")] * 2), 32)
        for shade in ("light", "dark")
    )
    for pictures in (light, dark):
        assert (pictures - pictures.mean(1, keepdim=True)).abs().mean() < 0.02  # grey
        assert pictures[:, :, :4, :2].mean() < 0.1  # a corner
    assert light.mean() > dark.mean() + 0.1


def test_the_same_seed_draws_the_same_picture_and_another_seed_another(pipeline):
    first, again, other = (draw(pipeline, asked("coat"), seed, steps=4)[0] for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_its_card_tells_figures_that_pass_what_it_was_made_to_pass():
    figures = json.loads((assets.MINI_SD / "figures.json").read_text())
    assert figures["garment net, accuracy on the 10,000 test images"] >= 0.9
    assert figures["recognised of 500 sampled images"] >= 0.85
    floor, sampled = figures["Frechet distance, 500 real"], figures["Frechet distance, 500 sampled"]
    assert 0 < floor < sampled
    assert floor < figures["Frechet distance, 500 real through the autoencoder"]
    card = (assets.MINI_SD / "README.md").read_text()
    for name in figures:
        assert f"| {name} | " in card
    assert "Zalando SE" in (assets.MINI_SD / "LICENSE-fashion-mnist").read_text()
