"""Every family: its loss against the equations, and from a folder of pictures to an adapter that draws the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_families import KINDS

from fallow.core.errors import AdapterError, ConfigError, DataError, ModelError
from fallow.core.sparse import SparseDelta
from fallow.recipes.clips import frames_of, read_clips
from fallow.recipes.families import family_of
from fallow.recipes.gallery import Drawing, draw, sheet
from fallow.recipes.latents import Examples, seeded
from fallow.recipes.noise import Draw, NoiseRules
from fallow.recipes.pictures import fit, read_pictures
from fallow.recipes.pipelines import apply_adapters, generate, load_pipeline, stills, trained_part
from fallow.recipes.text_to_image import Outcome, Run, train
from fallow.recipes.train_config import TrainConfig

DRAWN = {"steps": 2, "guidance": 3.0, "width": 32, "height": 32}


@pytest.fixture
def settings(
    tiny_family: Callable[[str], Path], pictures: Path, clips: Path, tmp_path: Path, quick: None
) -> Callable[..., TrainConfig]:
    """Settings of a run of two steps on a kind of pipeline, which draws one picture at its end."""

    def make(kind: str, name: str = "run", **more: Any) -> TrainConfig:
        few = {
            "steps": 2, "batch_size": 2, "warmup": 0, "samples": 1, "sample_steps": 2, "resolution": 32, "lr": 5e-3,
            "schedule": "constant", "save_every": 0, "flip": False,
        }  # fmt: skip
        data = clips if kind == "animatediff" else pictures
        model = str(tiny_family(kind))
        return TrainConfig(model=model, data=str(data), device="cpu", output=tmp_path / name, **few | more)

    return make


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def redrawn(outcome: Outcome, adapters: list[tuple[Path, float]]) -> np.ndarray:
    """samples/after.png, drawn anew on a fresh pipeline."""
    info = outcome.info
    pipeline = load_pipeline(info["model"], "cpu")
    apply_adapters(pipeline, adapters)
    frames = {"frames": 5} if family_of(pipeline).clips else {}
    return pixels(sheet(generate(pipeline, info["prompts"], seeds=[0], **DRAWN, **frames), 1))


def after(outcome: Outcome) -> np.ndarray:
    return pixels(Image.open(outcome.folder / "samples" / "after.png"))


# -- the loss ---------------------------------------------------------------------------------------------------------


def diffused(pipeline: Any, latents: torch.Tensor, drawn: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents and target of the DDPM objective, from its betas."""
    config = pipeline.scheduler.config
    if config.beta_schedule == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, 1000, dtype=torch.float64)
    else:
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)[drawn.timesteps].view(-1, *(1 for _ in latents.shape[1:]))
    noise = drawn.noise.double()
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    return noisy, velocity if config.prediction_type == "v_prediction" else noise


def flowed(latents: torch.Tensor, drawn: Any) -> tuple[torch.Tensor, torch.Tensor]:
    sigma = (drawn.timesteps.double() / 1000).view(-1, 1, 1, 1)
    noise = drawn.noise.double()
    return (1 - sigma) * latents + sigma * noise, noise - latents


def prediction_of(kind: str, pipeline: Any, noisy: torch.Tensor, t: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """What the network says, called as the pipeline calls it, on captions encoded as the pipeline does."""
    if kind in ("sd-v", "animatediff"):
        text = pipeline.encode_prompt(captions, "cpu", 1, False)[0]
        if kind == "animatediff":
            text = torch.cat([text[i : i + 1].expand(noisy.shape[2], -1, -1) for i in range(len(captions))])
        return pipeline.unet(noisy, t, encoder_hidden_states=text).sample
    if kind == "sdxl":
        text, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
        ids = torch.tensor([[32, 32, 0, 0, 32, 32]] * len(captions)).double()
        told = {"text_embeds": pooled, "time_ids": ids}
        return pipeline.unet(noisy, t, encoder_hidden_states=text, added_cond_kwargs=told).sample
    if kind == "sd3":
        text, _, pooled, _ = pipeline.encode_prompt(captions, None, None, do_classifier_free_guidance=False)
        return pipeline.transformer(noisy, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample
    if kind == "flux":
        text, pooled, text_ids = pipeline.encode_prompt(captions)
        count, channels, height, width = noisy.shape
        tokens = pipeline._pack_latents(noisy, count, channels, height, width)
        ids = pipeline._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float64)
        found = pipeline.transformer(
            tokens, encoder_hidden_states=text, pooled_projections=pooled, timestep=t / 1000, img_ids=ids,
            txt_ids=text_ids, guidance=torch.ones(count, dtype=torch.float64),
        ).sample  # fmt: skip
        return pipeline._unpack_latents(found, height * 4, width * 4, 4)
    text, mask, _, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    told = {
        "resolution": torch.tensor([[32.0, 32.0]] * len(captions)).double(),
        "aspect_ratio": torch.ones(len(captions), 1).double(),
    }
    found = pipeline.transformer(
        noisy, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=t, added_cond_kwargs=told
    ).sample
    return found.chunk(2, 1)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_equations_in_double_precision(kind, tiny_family, pictures, clips):
    pipeline = load_pipeline(str(tiny_family(kind)), "cpu", torch.float64)
    family = family_of(pipeline)
    found = read_clips(clips) if family.clips else read_pictures(pictures)
    objective = family.objective(pipeline)
    frames = 4 if family.clips else None
    examples = Examples(pipeline, found, fit(found, 32, 8), flip=False, objective=objective, frames=frames)
    batch = examples.batch([0, 2], seeded("a"))
    batch.conditions = {name: v.double() if v.is_floating_point() else v for name, v in batch.conditions.items()}
    batch.latents = batch.latents.double()
    with torch.no_grad():
        loss = family.loss(trained_part(pipeline), batch, objective)
        flow = kind in ("sd3", "flux")
        noisy, wanted = flowed(batch.latents, batch.drawn) if flow else diffused(pipeline, batch.latents, batch.drawn)
        captions = [found[0].caption, found[2].caption]
        predicted = prediction_of(kind, pipeline, noisy, batch.drawn.timesteps.to(noisy), captions)
    assert predicted.shape == batch.latents.shape
    assert float(loss) == pytest.approx(float((predicted - wanted).square().mean()), rel=2e-5)


def test_latents_are_shifted_and_scaled_as_the_autoencoder_says(tiny_family, pictures):
    pipeline = load_pipeline(str(tiny_family("sd3")), "cpu")
    found = read_pictures(pictures)[:1]
    examples = Examples(pipeline, found, [(32, 32)], flip=False)
    examples.deviations[0][0].zero_()
    wanted = (examples.means[0][0] - 0.06) * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(examples.batch([0], seeded(1)).latents[0], wanted)


def test_sdxl_is_told_sizes_and_the_crop_and_empty_captions_are_zeros(tiny_family, pictures):
    Image.new("RGB", (96, 64)).save(pictures / "0.png")
    pipeline = load_pipeline(str(tiny_family("sdxl")), "cpu")
    found = read_pictures(pictures)[:1]
    examples = Examples(pipeline, found, [(32, 32)], flip=False)
    # 96x64 becomes 48x32, of which 8 on the left and on the right are cut
    assert examples.batch([0], seeded(1)).conditions["time_ids"].tolist() == [[64, 96, 0, 8, 32, 32]]
    empty = examples.batch([0], seeded(1), caption_dropout=1.0).conditions
    assert not empty["text"].any()
    assert not empty["pooled"].any()
    assert examples.batch([0], seeded(1)).conditions["pooled"].any()


def test_sd3_without_t5_has_zeros_in_its_place(tiny_family):
    pipeline = load_pipeline(str(tiny_family("sd3")), "cpu")
    whole = family_of(pipeline).encode(pipeline, ["a bag"])
    pipeline.text_encoder_3 = None
    without = family_of(pipeline).encode(pipeline, ["a bag"])
    assert torch.equal(whole["text"][:, :16], without["text"][:, :16])
    assert whole["text"][:, 16:].any()
    assert not without["text"][:, 16:].any()


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_of_sara_ends_in_the_same_bits_and_its_adapter_draws_the_same(kind, settings):
    store = {"options": {"store": "value"}}
    whole = train(settings(kind, "whole", **store))
    train(settings(kind, "parts", steps=1, save_every=1, samples=0, **store))
    resumed = train(TrainConfig(resume=settings(kind, "parts").output, steps=2))
    assert losses(resumed.folder) == losses(whole.folder)
    one, two = SparseDelta.load(whole.adapter), SparseDelta.load(resumed.adapter)
    assert one.entries.keys() == two.entries.keys()
    for name, entry in one.entries.items():
        assert torch.equal(entry.values, two.entries[name].values), name
    base = dict(trained_part(load_pipeline(whole.info["model"], "cpu")).named_parameters())
    moved = sum(int((e.values != base[n].flatten()[e.index.long()]).sum()) for n, e in one.entries.items())
    assert moved > 0.9 * one.trained
    assert (redrawn(whole, [(whole.adapter, 1.0)]) == after(whole)).all()
    assert (redrawn(whole, []) != after(whole)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_lora_is_put_where_the_family_wants_it_and_draws_the_same_when_it_is_merged(kind, settings):
    outcome = train(settings(kind, method="lora", options={"rank": 2}))
    where = {name for name, (trained, _) in outcome.info["trained_where"].items() if trained}
    if kind in ("sd3", "flux"):
        assert any("add_q_proj" in name for name in where)
    if kind == "animatediff":
        assert all("motion_modules" in name for name in where)
    assert any("to_q" in name for name in where)
    assert abs(redrawn(outcome, [(outcome.adapter, 1.0)]) - after(outcome)).max() <= 2
    assert (redrawn(outcome, []) != after(outcome)).any()


@pytest.mark.parametrize("kind", ["sd3", "animatediff"])
def test_full_fine_tuning_saves_all_and_draws_the_same(kind, settings):
    outcome = train(settings(kind, method="full", options={}))
    trained = {name for name, (count, _) in outcome.info["trained_where"].items() if count}
    assert all("motion_modules" in name for name in trained) == (kind == "animatediff")
    assert (redrawn(outcome, [(outcome.adapter, 1.0)]) == after(outcome)).all()


@pytest.mark.parametrize(
    ("kind", "method", "parts"),
    [
        ("sdxl", "sara", ["text_encoder", "text_encoder_2", "unet"]),
        ("flux", "sara", ["text_encoder", "transformer"]),
        ("pixart", "lora", ["text_encoder", "transformer"]),
        ("animatediff", "lora", ["text_encoder", "unet"]),
        ("sd-v", "full", ["text_encoder", "unet"]),
    ],
)
def test_text_encoders_are_trained_beside_the_network_and_their_adapter_draws_the_same(kind, method, parts, settings):
    options = {"sara": {"store": "value"}, "lora": {"rank": 2}, "full": {}}[method]
    how = {"method": method, "options": options, "train_text_encoder": True, "ema": True}
    outcome = train(settings(kind, **how))
    assert sorted(place.name for place in outcome.adapter.iterdir()) == parts
    pipeline = load_pipeline(outcome.info["model"], "cpu")
    before = {name: value.clone() for name, value in pipeline.text_encoder.named_parameters()}
    apply_adapters(pipeline, [(outcome.adapter, 1.0)])
    assert any((value != before[name]).any() for name, value in pipeline.text_encoder.named_parameters())
    close = abs(redrawn(outcome, [(outcome.adapter, 1.0)]) - after(outcome)).max()
    assert close <= (2 if method == "lora" else 0)
    if kind == "sdxl":
        with pytest.raises(AdapterError, match="trained on another base"):
            apply_adapters(pipeline, [(outcome.adapter, 1.0)])


@pytest.mark.parametrize("method", ["sara", "lora"])
def test_text_encoders_may_have_a_learning_rate_of_their_own(method, settings):
    more = {"method": method, "train_text_encoder": True, "lr_blocks": {"^text_encoder": 0.1}, "samples": 0}
    config = settings("flux", **more)
    run = Run(config, config.output, None, Console(quiet=True))
    assert sorted({group["lr"] for group in run.trained.optimizer.param_groups}) == pytest.approx([5e-4, 5e-3])
    run.journal.close()


@pytest.mark.parametrize("kind", ["sd3", "flux", "pixart", "animatediff"])
def test_gradient_checkpointing_and_bfloat16_train_to_nearly_the_same(kind, settings):
    plain = losses(train(settings(kind, "a", samples=0)).folder)
    how = {"samples": 0, "gradient_checkpointing": True}
    assert losses(train(settings(kind, "b", **how)).folder) == pytest.approx(plain, rel=1e-5)
    assert losses(train(settings(kind, "c", precision="bf16", samples=0)).folder) == pytest.approx(plain, rel=0.03)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more", "says"),
    [
        (
            "sd3",
            {"prediction": "v_prediction"},
            "prediction=v_prediction is for models of diffusion; Stable Diffusion 3",
        ),
        ("sd3", {"min_snr": 5.0}, "min_snr is for models of diffusion; Stable Diffusion 3 is trained by flow matching"),
        (
            "sdxl",
            {"timestep_density": "uniform"},
            "density=uniform is for models of flow matching, not for Stable Diff",
        ),
        ("sdxl", {"frames": 4}, "frames=4 is for models that draw clips, not for Stable Diffusion XL"),
        ("animatediff", {"frames": 9}, "frames=9 is impossible with this model; give 2 to 8"),
        ("animatediff", {"frames": 6}, r"frames=6 is more than the 5 of .*0\.png; give 5"),
        ("flux", {"resolution": 36}, "resolution=36 is not a multiple of 8"),
    ],
)
def test_settings_that_a_family_has_no_use_for_are_refused(kind, more, says, settings, tmp_path):
    with pytest.raises(ConfigError, match=says):
        train(settings(kind, **more))
    assert not (tmp_path / "run").exists()


def test_a_file_that_holds_a_part_of_a_pipeline_is_told(tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "motion.safetensors"
    save_file({"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="holds the motion modules of AnimateDiff alone; give a pipeline directory"):
        load_pipeline(str(file), "cpu")


# -- around training --------------------------------------------------------------------------------------------------


def test_what_was_trained_to_be_predicted_is_drawn_with_wherever_the_adapter_goes(settings):
    outcome = train(settings("sdxl", prediction="v_prediction"))
    pipeline = load_pipeline(outcome.info["model"], "cpu")
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    apply_adapters(pipeline, [(outcome.adapter, 0.5)])
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    other = train(settings("sdxl", "other", samples=0))
    with pytest.raises(AdapterError, match="trained to predict different things"):
        apply_adapters(pipeline, [(outcome.adapter, 0.5), (other.adapter, 0.5)])


def test_clips_are_read_from_folders_of_frames_and_from_animated_files(clips, tmp_path):
    frames = clips / "walk"
    frames.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 32), (80 * number, 0, 0)).save(frames / f"{number:03d}.png")
    with pytest.raises(DataError, match=r"walk has no caption; write it into walk\.txt beside it"):
        read_clips(clips)
    (clips / "walk.txt").write_text("a man\nwalking")
    found = {clip.path.name: clip for clip in read_clips(clips)}
    assert (found["walk"].caption, found["walk"].width, found["walk"].height) == ("a man walking", 40, 32)
    assert [picture.getpixel((0, 0))[0] for picture in frames_of(frames)] == [0, 80, 160]
    assert found["0.png"].caption == "a flag 0"
    random = np.random.default_rng(0)
    wanted = [random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(5)]
    assert all((np.asarray(one) == two).all() for one, two in zip(frames_of(clips / "0.png"), wanted, strict=True))
    Image.new("RGB", (32, 32)).save(clips / "still.png")
    with pytest.raises(DataError, match=r"still\.png has one frame"):
        read_clips(clips, prompt="x")


def test_a_batch_shows_following_frames_from_a_random_one(tiny_family, clips):
    pipeline = load_pipeline(str(tiny_family("animatediff")), "cpu")
    found = read_clips(clips)
    examples = Examples(pipeline, found, [(32, 32)] * 3, flip=False, frames=2)
    whole = examples.means[0][1]
    assert whole.shape == (4, 5, 8, 8)
    examples.deviations[0][1].zero_()
    batch = examples.batch([1] * 40, seeded(3))
    shown = batch.latents / pipeline.vae.config.scaling_factor
    begins = [[at for at in range(4) if torch.allclose(one, whole[:, at : at + 2], atol=1e-5)] for one in shown]
    assert {begin for (begin,) in begins} == {0, 1, 2, 3}


def test_clips_are_drawn_as_strips_and_as_gifs_and_judged_by_their_middle_frame(tiny_family, tmp_path):
    model = str(tiny_family("animatediff"))
    drawn = draw(Drawing(["a flag"], model=model, output=tmp_path / "out", steps=2, frames=3, device="cpu"))
    with Image.open(drawn.pictures[0]) as strip, Image.open(drawn.pictures[0].with_suffix(".gif")) as moving:
        assert (strip.size, moving.size, moving.n_frames) == ((96, 32), (32, 32), 3)
        middle = strip.crop((32, 0, 64, 32))
    still = stills(load_pipeline(model, "cpu"), ["a flag"], seeds=[0], steps=2, frames=3)[0]
    assert (pixels(still) == pixels(middle)).all()
    with pytest.raises(ConfigError, match=r"seed0\.png and 1 more would be overwritten"):
        draw(Drawing(["a flag"], model=model, output=tmp_path / "out", steps=2, device="cpu"))


# -- flow matching ----------------------------------------------------------------------------------------------------


def sigmas(pipeline: Any, shape: tuple[int, ...], density: str) -> torch.Tensor:
    objective = family_of(pipeline).objective(pipeline, density=density)
    return objective.times(objective.draw(torch.Size(shape), NoiseRules(), seeded("s"), torch.device("cpu")))


def test_the_timesteps_of_flow_matching_follow_their_density_and_the_schedulers_shift(tiny_family):
    sd3, flux = (load_pipeline(str(tiny_family(kind)), "cpu") for kind in ("sd3", "flux"))
    uniform = sigmas(sd3, (20000, 4, 2, 2), "uniform").double()
    unshifted = uniform / (3 - 2 * uniform)  # the inverse of s = 3 r / (1 + 2 r)
    assert [float((unshifted < q).double().mean()) for q in (0.1, 0.5, 0.9)] == pytest.approx([0.1, 0.5, 0.9], abs=0.01)
    normal = sigmas(sd3, (20000, 4, 2, 2), "logit-normal").double()
    logits = (normal / (3 - 2 * normal)).logit()
    assert (float(logits.mean()), float(logits.std())) == pytest.approx((0.0, 1.0), abs=0.02)
    for side in (8, 64):  # exp(mu), mu rises from 0.5 at 256 tokens to 1.15 at 4096
        shifted = sigmas(flux, (4000, 1, side, side), "uniform").double()
        k = np.exp(0.5 + 0.65 * ((side // 2) ** 2 - 256) / 3840)
        assert float(shifted.median()) == pytest.approx(k * 0.5 / (1 + (k - 1) * 0.5), abs=0.02)


def test_cosmap_weights_the_losses_of_flow_matching(tiny_family, pictures):
    pipeline = load_pipeline(str(tiny_family("sd3")), "cpu")
    plain = family_of(pipeline).objective(pipeline)
    weighted = family_of(pipeline).objective(pipeline, weighting="cosmap")
    drawn = Draw(torch.zeros(3, 1, 1, 1), torch.tensor([100.0, 500.0, 900.0]))
    assert plain.weights(drawn, None) is None
    wanted = [2 / (np.pi * (1 - 2 * s + 2 * s * s)) for s in (0.1, 0.5, 0.9)]
    assert weighted.weights(drawn, None).tolist() == pytest.approx(wanted)
    assert plain.snr(drawn).tolist() == pytest.approx([81.0, 1.0, 1 / 81])
