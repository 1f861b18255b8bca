"""Every option of training changes a run as it should, and goes on bit for bit where a run is stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from fallow.core.errors import ConfigError, DataError
from fallow.core.files import read_tensors
from fallow.recipes import text_to_image
from fallow.recipes.latents import Examples, seeded
from fallow.recipes.losses import LossRules
from fallow.recipes.pictures import Reading, fit, read_pictures
from fallow.recipes.pipelines import load_pipeline
from fallow.recipes.settings import make_config
from fallow.recipes.text_to_image import train
from fallow.recipes.train_config import TrainConfig


@pytest.fixture
def settings(tiny_sd: Path, pictures: Path, tmp_path: Path, quick: None) -> Callable[..., TrainConfig]:
    def make(name: str = "run", **more: Any) -> TrainConfig:
        few = {"steps": 2, "batch_size": 2, "warmup": 0, "samples": 0, "log_every": 2, "method": "full", "lr": 1e-4}
        return TrainConfig(model=str(tiny_sd), data=str(pictures), device="cpu", output=tmp_path / name, **few | more)

    return make


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "adapter" / "adapter_model.safetensors")[0]


def add_masks(pictures: Path) -> None:
    half = np.zeros((32, 32), dtype=np.uint8)
    half[:, :16] = 255
    for file in list(pictures.glob("*.png"))[:5]:
        Image.fromarray(half).save(file.with_suffix(".mask.png"))


PLAIN_LOSSES: dict[str, list[float]] = {}  # of the run that every option is compared with, made once
EVERYTHING = {
    "shuffle_caption": True, "keep_tokens": 1, "tag_dropout": 0.2, "trigger_phrase": "sks", "wildcards": True,
    "loss": "huber", "masks": True, "normalize_masked_loss": True, "multires_noise_iterations": 3,
    "ip_noise_gamma": 0.1, "timestep_min": 100, "timestep_max": 900, "debiased_estimation": True,
    "validation_share": 0.2, "validation_every": 2, "validation_draws": 1, "keep_best": True,
    "lr_blocks": {"mid_block": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy", "schedule-free"])
def test_a_run_with_every_option_is_stopped_and_resumed_bit_for_bit(settings, tmp_path, pictures, optimizer):
    add_masks(pictures)
    with (pictures / "metadata.jsonl").open("r+") as file:
        told = file.read().replace("a bag", "a bag, {red|blue}, on grass\\n")
        file.seek(0)
        file.write(told)
    more = EVERYTHING | {"optimizer": optimizer, "method": "sara", "steps": 5, "log_every": 1}
    if optimizer == "prodigy":
        more |= {"lr_blocks": {}, "lr": None}
    whole = train(settings("whole", **more))
    with pytest.raises(KeyboardInterrupt):
        train(
            settings("parts", **more),
            after_step=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 3 else None,
        )
    parts = train(TrainConfig(resume=tmp_path / "parts"))
    assert losses(parts.folder) == losses(whole.folder)
    one, two = saved(whole.folder), saved(parts.folder)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    measured = [(e["step"], e["validation_loss"]) for e in lines(whole.folder) if e.get("event") == "validation"]
    assert measured == [
        (e["step"], e["validation_loss"]) for e in lines(parts.folder) if e.get("event") == "validation"
    ]
    assert [step for step, _ in measured] == [0, 2, 4, 5]
    assert whole.info["validation"] == parts.info["validation"]
    step, loss = min(measured, key=lambda pair: pair[1])
    assert whole.info["validation"]["best"] == {"step": step, "loss": loss}


@pytest.mark.parametrize(
    "option",
    [
        {"loss": "huber"}, {"loss": "smooth-l1"}, {"loss": "l1"}, {"loss": "huber", "huber_schedule": "constant"},
        {"loss": "huber", "huber_delta": 0.5}, {"debiased_estimation": True}, {"multires_noise_iterations": 4},
        {"ip_noise_gamma": 0.5}, {"timestep_min": 900}, {"timestep_max": 100}, {"caption_prefix": "photo of"},
        {"caption_suffix": "in style"}, {"trigger_phrase": "sks"}, {"shuffle_caption": True}, {"tag_dropout": 1.0},
        {"prediction": "v_prediction", "zero_terminal_snr": True},
    ],
    ids=lambda option: ",".join(f"{key}={value}" for key, value in option.items()),
)  # fmt: skip
def test_every_option_reaches_the_first_loss(settings, pictures, option):
    """Of a run of one step, so that what differs is the loss itself and no step before it."""
    (pictures / "metadata.jsonl").unlink()
    for file in pictures.glob("*.png"):
        file.with_suffix(".txt").write_text("a, b, c, d, e")
    base = {"prediction": option["prediction"]} if "prediction" in option else {}
    if str(base) not in PLAIN_LOSSES:
        PLAIN_LOSSES[str(base)] = losses(train(settings("plain", steps=1, **base)).folder)
    assert losses(train(settings("changed", steps=1, **option)).folder) != PLAIN_LOSSES[str(base)]


def test_masks_reach_the_loss_and_a_mask_that_is_all_white_changes_nothing(settings, pictures):
    plain = losses(train(settings("plain", steps=1, flip=False)).folder)
    for file in list(pictures.glob("*.png")):
        Image.new("L", (32, 32), 255).save(file.with_suffix(".mask.png"))
    assert losses(train(settings("white", steps=1, flip=False, masks=True)).folder) == pytest.approx(plain)
    for file in list(pictures.glob("*.mask.png")):
        half = np.zeros((32, 32), dtype=np.uint8)
        half[:16] = 255
        Image.fromarray(half).save(file)
    (half,) = losses(train(settings("half", steps=1, flip=False, masks=True)).folder)
    (normal,) = losses(train(settings("normal", steps=1, flip=False, masks=True, normalize_masked_loss=True)).folder)
    assert normal == pytest.approx(2 * half, rel=1e-5)
    assert half < plain[0]
    (both,) = losses(train(settings("both", steps=1, flip=False, masks=True, unmasked_weight=0.5)).folder)
    assert both == pytest.approx(half / 2 + plain[0] / 2, rel=1e-5)  # half at 1, half at 0.5


def test_a_mask_lies_on_its_picture_in_the_batch_mirrored_or_not(tiny_sd, pictures):
    for file in list(pictures.glob("*.png")):
        half = np.zeros((32, 32), dtype=np.uint8)
        half[:, :8] = 255
        Image.fromarray(half).save(file.with_suffix(".mask.png"))
    read = read_pictures(pictures, how=Reading(masks=True))
    examples = Examples(load_pipeline(str(tiny_sd), device="cpu"), read, fit(read, 32), flip=True)
    batch = examples.batch([0, 1, 2, 3] * 4, seeded(1))
    assert batch.mask is not None
    left = batch.mask[:, 0, 0, 0] == 1
    chance = seeded(1)
    mirrored = torch.randint(0, 2, (16,), generator=chance).bool()
    assert torch.equal(left, ~mirrored)
    assert set(left.tolist()) == {True, False}
    assert next(iter(batch.parts(3))).mask.shape == (3, 1, 8, 8)


def test_several_folders_are_trained_on_with_their_repeats(settings, pictures, tmp_path):
    more = tmp_path / "more" / "3_a vase"
    more.mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(more / "vase.png")
    outcome = train(settings(concepts=[f"{tmp_path / 'more'}:2"], steps=1))
    assert outcome.info["pictures"] == 7
    told = read_tensors(outcome.adapter / "adapter_model.safetensors")[1]
    assert json.loads(told["ss_dataset_dirs"])["3_a vase"] == {"n_repeats": 6, "img_count": 1}
    assert told["ss_num_train_images"] == "12"


def test_the_validation_loss_is_that_of_the_held_out_pictures_and_takes_no_chance(settings, pictures):
    outcome = train(settings(steps=3, validation=pictures, validation_every=1, lr=1e-12, ema=True))
    found = [e["validation_loss"] for e in lines(outcome.folder) if "validation_loss" in e]
    assert len(found) == 4
    assert found == pytest.approx([found[0]] * 4, rel=1e-4)
    assert len(losses(outcome.folder)) == 3


def test_a_share_is_held_out_and_not_trained_on(settings, pictures):
    outcome = train(settings(steps=1, validation_share=0.34))
    assert outcome.info["pictures"] == 4
    assert read_tensors(outcome.adapter / "adapter_model.safetensors")[1]["ss_num_validation_images"] == "2"
    with pytest.raises(ConfigError, match=r"validation_share=0\.99 of 6 pictures leaves none to train on"):
        train(settings("other", validation_share=0.99))


def test_the_best_adapter_is_kept(settings):
    outcome = train(settings(steps=2, validation_share=0.34, validation_every=1, keep_best=True, lr=1e-4))
    best = outcome.info["validation"]["best"]["step"]
    if best:
        told = json.loads(read_tensors(outcome.folder / "best" / "adapter_model.safetensors")[1]["fallow"])
        assert told["metadata"]["steps"] == best
    else:
        assert not (outcome.folder / "best").exists()


def test_zero_terminal_snr_reaches_training_and_drawings(settings, monkeypatch):
    seen: list[Any] = []
    real = text_to_image.Run.draw_samples
    monkeypatch.setattr(text_to_image.Run, "draw_samples", lambda run, name: (seen.append(run), real(run, name))[1])
    train(settings(steps=1, samples=1, sample_steps=2, prediction="v_prediction", zero_terminal_snr=True))
    run = seen[0]
    assert isinstance(run.pipeline.scheduler, DDIMScheduler)
    assert run.pipeline.scheduler.config.timestep_spacing == "trailing"
    for scheduler in (run.pipeline.scheduler, run.objective.scheduler):
        assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(0.0, abs=1e-8)
        assert float(scheduler.alphas_cumprod[0]) == pytest.approx(1 - 0.00085, rel=1e-4)
    with pytest.raises(ConfigError, match="predicts the noise"):
        train(settings("other", zero_terminal_snr=True))


def test_captions_that_are_drawn_are_encoded_as_they_are_drawn(tiny_sd, pictures):
    from fallow.recipes.captions import CaptionRules

    pipeline = load_pipeline(str(tiny_sd), device="cpu")
    read = read_pictures(pictures)
    rules = CaptionRules(trigger="sks", wildcards=True)
    examples = Examples(pipeline, read, fit(read, 32), flip=False, rules=rules)
    assert len(examples.captions["text"]) == 1  # only the empty one is kept
    batch = examples.batch([0, 5], seeded(1))
    wanted = Examples(pipeline, [read[0], read[5]], fit(read, 32)[:2], flip=False, rules=rules).encode_now(
        ["sks, a bag 0", "sks, a bag 2"]
    )
    assert torch.equal(batch.conditions["text"], wanted["text"])
    dropped = examples.batch([0, 5], seeded(1), caption_dropout=1.0)
    torch.testing.assert_close(dropped.conditions["text"][0], examples.captions["text"][0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_tokens": 2}, "keep_tokens=2 keeps tags where they are; give shuffle_caption or tag_dropout too"),
        ({"unmasked_weight": 0.1}, r"unmasked_weight=0\.1 is for masks; give masks or alpha_mask too"),
        ({"timestep_min": 10, "timestep_max": 10}, "leave no timestep to train"),
        ({"min_snr": 5.0, "debiased_estimation": True}, "both weight the loss by its noise"),
        ({"keep_best": True}, "keep_best needs a loss to go by"),
        ({"validation": ".", "validation_share": 0.1}, "leave one out"),
        ({"optimizer": "schedule-free", "ema": True}, "averages by itself; leave ema out"),
        ({"optimizer": "schedule-free", "schedule": "cosine"}, "in place of schedule=cosine; leave schedule out"),
        ({"lr_blocks": {"mid_block": 0}}, "must be above 0; to train no such weight, exclude it"),
        ({"lr_blocks": {"(": 1.0}}, "is no regular expression"),
        ({"metadata": {"autor": "me"}}, r"metadata has no field 'autor' \(did you mean 'author'\?\)"),
    ],
)
def test_what_does_not_go_together_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        make_config(TrainConfig, options)


def test_rules_that_are_left_out_are_the_plain_ones():
    config = TrainConfig()
    assert config.loss_rules == LossRules()
    assert not config.caption_rules.random
    assert config.rule.plain
    assert TrainConfig(optimizer="schedule-free").schedule == "constant"
    assert TrainConfig(lr_blocks={"down_blocks": {"0": 0.5}}).lr_blocks == {"down_blocks.0": 0.5}


def test_masks_that_are_nowhere_are_refused_before_anything_is_made(settings, tmp_path):
    with pytest.raises(DataError, match="holds no mask"):
        train(settings(masks=True))
    assert not (tmp_path / "run").exists()
