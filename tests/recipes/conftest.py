"""A whole Stable Diffusion pipeline with random weights, saved to disk; small enough that a picture costs a blink."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fallow.analysis.judges import Aligned

SIDE = 32  # pixels; latents are 4x8x8
TOKENS = 16  # of a prompt, begin and end included


def tiny_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer of single bytes without any merge: every text has a tokenization."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n")


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a StableDiffusionPipeline of about 0.2 M random weights: 32x32 pictures, prompts of 16 tokens.

    Shared by the whole session: tests must not write into it.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("tiny-sd")
    tiny_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=TOKENS, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=SIDE,
            mid_block_add_attention=False,
        )  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=SIDE // 4, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16, attention_head_dim=4, norm_num_groups=8,
        )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the directory of a tiny pipeline of a kind of `tiny_families.KINDS`, written once in a session."""
    import tiny_families
    from transformers import CLIPTokenizer

    place = tmp_path_factory.mktemp("families")
    tiny_tokenizer(place / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(place / "tokenizer", model_max_length=TOKENS)
    written: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in written:
            written[kind] = tiny_families.save(kind, tokenizer, place / kind)
        return written[kind]

    return folder


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder of three animated pictures of noise of five 32x32 frames, with captions beside them."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(3):
        random = np.random.default_rng(number)
        first, *others = [Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(5)]
        first.save(folder / f"{number}.png", save_all=True, append_images=others)
        (folder / f"{number}.txt").write_text(f"a flag {number}")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of six 32x32 pictures of noise with captions in a metadata.jsonl, two to a caption."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"a bag {number // 2}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def page() -> None:
    """Asked for by tests of a run that look at its page; the others go without."""


@pytest.fixture
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write no page, which is most of the time of a run of three steps, unless the test asks for `page`."""
    if "page" not in request.fixturenames:
        from fallow.recipes import compare, text_to_image

        monkeypatch.setattr(text_to_image, "write_run_report", lambda folder: folder / "report.html")
        monkeypatch.setattr(compare, "write_run_report", lambda folder: folder / "report.html")


class Greyness:
    """A judge: features are the mean colours of each quarter, alignment is the mean brightness."""

    name = "greyness"

    def features(self, pictures):
        quarters = [np.array(p, dtype=np.float32).reshape(2, 16, 2, 16, 3).mean((1, 3)).ravel() / 255 for p in pictures]
        return torch.from_numpy(np.stack(quarters))

    def alignment(self, pictures, captions):
        return Aligned(float(np.mean([np.array(picture).mean() / 255 for picture in pictures])), 0.5, len(captions))


@pytest.fixture
def grey_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations judge by colours, which costs nothing."""
    from fallow.recipes import evaluate

    monkeypatch.setattr(evaluate, "make_judge", lambda *a, **k: Greyness())
