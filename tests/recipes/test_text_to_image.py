"""Training from a folder of pictures to an adapter and a page, and everything that can go wrong on the way."""

from __future__ import annotations

import io
import json
import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fallow.core.errors import ConfigError, DataError, ModelError, SelectionError, TrainingError
from fallow.core.files import read_tensors
from fallow.recipes import noise, text_to_image
from fallow.recipes.checkpoints import checkpoints
from fallow.recipes.latents import Examples, seeded
from fallow.recipes.pictures import fit, read_pictures
from fallow.recipes.pipelines import load_pipeline
from fallow.recipes.settings import make_config, to_toml
from fallow.recipes.text_to_image import rate_at, train
from fallow.recipes.train_config import TrainConfig


@pytest.fixture
def settings(tiny_sd: Path, pictures: Path, tmp_path: Path, quick: None) -> Callable[..., TrainConfig]:
    """Settings of a short run without drawings; `name` is its directory."""

    def make(name: str = "run", **more: Any) -> TrainConfig:
        few = {"steps": 3, "batch_size": 2, "warmup": 0, "samples": 0, "log_every": 2, "sample_steps": 2}
        return TrainConfig(model=str(tiny_sd), data=str(pictures), device="cpu", output=tmp_path / name, **few | more)

    return make


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "adapter" / "adapter_model.safetensors")[0]


# -- what a run makes -------------------------------------------------------------------------------------------------


def test_a_run_makes_its_directory_and_says_what_it_did(settings, tmp_path, page):
    outcome = train(settings(samples=3, sample_every=2, save_every=2, steps=4), command="fallow train --data things")
    folder = tmp_path / "run"
    assert (outcome.folder, outcome.adapter, outcome.report) == (folder, folder / "adapter", folder / "report.html")
    for name in ("config.toml", "run.json", "metrics.jsonl", "report.html", "samples/before.png", "samples/after.png",
                 "samples/examples.png", "samples/step-000002.png", "adapter/adapter_config.json",
                 "adapter/adapter_model.safetensors", "adapter/README.md"):  # fmt: skip
        assert (folder / name).is_file(), name
    assert not (folder / "samples" / "step-000004.png").exists()  # that is after.png
    assert list((folder / "tensorboard").glob("events.*"))
    assert [place.name for place in checkpoints(folder)] == ["step-000002", "step-000004"]
    info = json.loads((folder / "run.json").read_text())
    assert info == outcome.info
    assert (info["status"], info["steps"], info["method"], info["error"]) == ("finished", 4, "sara", None)
    assert info["command"] == "fallow train --data things"
    assert info["trained_parameters"] == round(0.05 * info["total_parameters"])
    assert sum(trained for trained, _ in info["trained_where"].values()) == info["trained_parameters"]
    assert info["prompts"] == ["a bag 0", "a bag 1", "a bag 2"]
    assert info["adapter_bytes"] == sum(file.stat().st_size for file in (folder / "adapter").iterdir())
    assert info["seconds_per_step"] == pytest.approx(info["seconds"] / 4)
    assert 1e8 < info["peak_memory_bytes"] < 1e11
    assert [line["step"] for line in metrics(folder) if "loss" in line] == [1, 2, 3, 4]
    assert [line["event"] for line in metrics(folder) if "event" in line] == ["reselect"]
    page = (folder / "report.html").read_text()
    assert "fallow train --data things" in page
    assert "data:image/png;base64" in page


def test_examples_keep_their_proportions(settings, pictures):
    for file in pictures.glob("*.png"):
        wide = Image.new("RGB", (96, 32), "white")
        wide.paste("black", (32, 0, 64, 32))  # a square in the middle
        wide.save(file)
    outcome = train(settings(samples=1, sample_steps=1))
    with Image.open(outcome.folder / "samples" / "examples.png") as shown:
        assert np.asarray(shown.convert("L")).max() == 0


def test_the_adapter_is_small(settings):
    info = train(settings()).info
    described = 150 * len(info["trained_where"])  # name, shape and fingerprint of each weight; nothing at full size
    assert info["adapter_bytes"] < 6 * info["trained_parameters"] + 3 * described


def test_only_the_drawings_change_nothing_of_the_training(settings):
    with_drawings = train(settings("a", samples=2, sample_every=1))
    without = train(settings("b"))
    assert losses(with_drawings.folder) == losses(without.folder)


def test_the_resolved_config_runs_the_same_again(settings, tmp_path):
    first = train(settings(options={"fraction": 0.1}, min_snr=5, flip=False))
    read = make_config(TrainConfig, tomllib.loads((first.folder / "config.toml").read_text()))
    assert read == settings(options={"fraction": 0.1}, min_snr=5, flip=False).model_copy(update={"output": None})
    again = train(read.model_copy(update={"output": tmp_path / "again"}))
    assert losses(again.folder) == losses(first.folder)
    assert all(torch.equal(tensor, adapter(again.folder)[name]) for name, tensor in adapter(first.folder).items())


def test_another_seed_is_another_run(settings):
    assert losses(train(settings("a", seed=0)).folder) != losses(train(settings("b", seed=1)).folder)


def test_runs_are_named_by_method_and_data_and_numbered(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        outcome = train(settings().model_copy(update={"output": None, "method": "lora", "steps": 1}))
        assert outcome.folder == Path("runs") / f"lora-pictures-{number}"


def test_a_log_gets_plain_lines_and_no_bar(settings, tmp_path):
    with (tmp_path / "log").open("w") as file:
        train(settings(), console=Console(file=file, width=100))
    log = (tmp_path / "log").read_text()
    assert "sara: 10,032 of 200,644 parameters" in log
    assert "step 3 of 3: loss " in log
    assert "steps/s" in log
    assert "MB" in log
    assert "\x1b" not in log


def test_a_terminal_gets_a_bar_with_loss_speed_and_memory(settings):
    shown = io.StringIO()
    train(settings(steps=30, log_every=1), console=Console(file=shown, force_terminal=True, width=140))
    bar = [line for line in shown.getvalue().replace("\r", "\n").splitlines() if "training" in line][-1]
    for text in ("30/30", "loss ", "steps/s", "MB", "0:00:00"):
        assert text in bar, text


def test_training_folder_is_the_train_half_where_there_is_one(tmp_path):
    (tmp_path / "a" / "train").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    assert text_to_image.training_folder(str(tmp_path / "a")) == tmp_path / "a" / "train"
    assert text_to_image.training_folder(str(tmp_path / "b")) == tmp_path / "b"


# -- how it trains ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sara", "lora"])
def test_two_batches_of_four_accumulated_are_one_batch_of_eight(settings, method):
    one = train(settings("one", method=method, batch_size=8))
    two = train(settings("two", method=method, batch_size=4, accumulation=2))
    assert losses(two.folder) == pytest.approx(losses(one.folder), abs=1e-5)
    for name, tensor in adapter(one.folder).items():
        if tensor.is_floating_point():
            assert (tensor - adapter(two.folder)[name]).abs().max() < 1e-5, name


def test_pictures_keep_their_shapes_and_train_together(settings, pictures):
    for number in (0, 1, 2):
        Image.new("RGB", (48, 24), (number * 80, 10, 200)).save(pictures / f"{number}.png")
    shapes = {tuple(mean.shape) for mean in run_of(settings("kept")).examples.means[0]}
    assert shapes == {(4, 8, 8), (4, 6, 12)}
    shapes = {tuple(mean.shape) for mean in run_of(settings("square", bucket=False)).examples.means[0]}
    assert shapes == {(4, 8, 8)}
    assert len(losses(train(settings("trained", steps=4, accumulation=2)).folder)) == 4


def run_of(config: TrainConfig) -> text_to_image.Run:
    """A run before its first step."""
    return text_to_image.Run(config, config.output, None, Console(quiet=True))


def test_gradient_checkpointing_changes_nothing(settings):
    plain = train(settings("a", method="sara"))
    recomputed = train(settings("b", method="sara", gradient_checkpointing=True))
    assert losses(recomputed.folder) == pytest.approx(losses(plain.folder), abs=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_weights_to_nearly_the_same(settings, precision):
    plain = train(settings("a"))
    half = train(settings("b", precision=precision, options={"store": "value"}))
    assert losses(half.folder) == pytest.approx(losses(plain.folder), rel=0.02)
    assert losses(half.folder) != losses(plain.folder)
    kinds = {t.dtype for name, t in adapter(half.folder).items() if name.endswith(".value")}
    assert kinds == {torch.float32}


def test_the_gradient_is_clipped_and_its_norm_told_before_that(settings):
    free = train(settings("a", method="full", max_grad_norm=0, lr=1e-3))
    clipped = train(settings("b", method="full", max_grad_norm=1e-9, lr=1e-3, options={"eps": 1.0}))
    first = [metrics(run.folder)[0]["grad_norm"] for run in (free, clipped)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert first[0] > 1e-3
    assert metrics(clipped.folder)[2]["grad_norm"] == pytest.approx(metrics(clipped.folder)[2]["grad_norm"])
    moved = losses(free.folder)[2] - losses(clipped.folder)[2]
    assert abs(moved) > 1e-4


def test_the_average_is_what_is_saved(settings):
    """With a decay of 0.5 and three steps the warm-up of the decay decides: 1/10, 2/11, 3/12."""
    values: list[dict[str, torch.Tensor]] = []
    for steps in (1, 2, 3):
        run = train(settings(f"{steps}", method="full", steps=steps, schedule="constant", lr=1e-3))
        values.append(adapter(run.folder))
    averaged = adapter(train(settings("ema", method="full", schedule="constant", lr=1e-3, ema=True)).folder)
    name = "conv_in.weight"
    base = load_pipeline(settings().model, device="cpu").unet.conv_in.weight.detach()
    wanted = base
    for step, value in enumerate(values):
        decay = (1 + step) / (10 + step)
        wanted = decay * wanted + (1 - decay) * value[name]
    torch.testing.assert_close(averaged[name], wanted, rtol=0, atol=1e-6)
    assert (averaged[name] - values[-1][name]).abs().max() > 1e-5


def test_prediction_and_min_snr_and_offset_reach_the_loss(settings):
    plain = losses(train(settings("a")).folder)[0]
    for name, more in (("b", {"prediction": "v_prediction"}), ("c", {"min_snr": 1e-3}), ("d", {"noise_offset": 0.5})):
        outcome = train(settings(name, **more))
        assert abs(losses(outcome.folder)[0] - plain) > 1e-3, more
    assert train(settings("e", prediction="v_prediction")).info["prediction"] == "v_prediction"


def test_prior_preservation_adds_the_weighted_loss_on_the_class(settings, pictures):
    plain = losses(train(settings("a", steps=1)).folder)[0]
    one = losses(train(settings("b", steps=1, class_data=pictures, class_prompt="a bag")).folder)[0]
    three = losses(train(settings("c", steps=1, class_data=pictures, class_prompt="a bag", prior_weight=3)).folder)[0]
    assert one - plain > 0.1
    assert three - plain == pytest.approx(3 * (one - plain), rel=1e-4)


def test_pictures_of_the_class_are_drawn_by_the_base_once(settings):
    run = train(settings(class_prompt="a bag", class_images=3, steps=1))
    files = sorted((run.folder / "class-pictures").iterdir())
    assert [file.name for file in files] == [f"picture-{i:04d}.png" for i in range(3)]
    assert Image.open(files[0]).size == (32, 32)
    before = files[0].stat().st_mtime_ns
    train(TrainConfig(resume=run.folder, steps=2))
    assert files[0].stat().st_mtime_ns == before


def test_rates_rise_and_fall():
    assert [rate_at(step, 10, 4, "constant") for step in (0, 1, 3, 4, 9)] == pytest.approx([0.2, 0.4, 0.8, 1, 1])
    assert [rate_at(step, 12, 2, "linear") for step in (2, 7, 12)] == pytest.approx([1, 0.5, 0])
    cosine = [rate_at(step, 12, 2, "cosine") for step in (2, 4, 7, 12)]
    assert cosine == pytest.approx([1, 0.5 * (1 + math.cos(0.2 * math.pi)), 0.5, 0])


def test_the_warm_up_is_a_twentieth_of_the_run_and_at_most_100_steps(settings):
    warmups = [run_of(settings(f"{steps}", steps=steps, warmup=None)).warmup for steps in (10, 500, 9000)]
    assert warmups == [0, 25, 100]


def test_the_learning_rate_follows_its_schedule(settings):
    run = train(settings(steps=4, warmup=2, lr=0.3, schedule="linear", method="full"))
    assert [line["lr"] for line in metrics(run.folder)] == pytest.approx([0.1, 0.2, 0.3, 0.15])
    assert run.info["lr"] == 0.3


# -- what the network is shown ----------------------------------------------------------------------------------------


@pytest.fixture
def examples(tiny_sd: Path, pictures: Path) -> Callable[..., Examples]:
    pipeline = load_pipeline(str(tiny_sd), device="cpu")
    found = read_pictures(pictures)
    return lambda flip=False: Examples(pipeline, found, fit(found, 32, 8), flip=flip)


def test_captions_are_dropped_as_often_as_asked(examples):
    made = examples()
    none = made.batch([0] * 400, seeded(1), caption_dropout=0.0).conditions["text"]
    assert torch.equal(none, made.captions["text"][made.caption_of[0]].expand_as(none))
    some = made.batch([0] * 400, seeded(1), caption_dropout=0.25).conditions["text"]
    empty = (some == made.captions["text"][0]).flatten(1).all(1)
    assert 0.18 < float(empty.float().mean()) < 0.32
    assert bool(
        (made.batch([0, 1], seeded(1), caption_dropout=1.0).conditions["text"] == made.captions["text"][0]).all()
    )


def test_latents_are_drawn_anew_from_what_the_autoencoder_says(examples, tiny_sd, pictures):
    made = examples()
    pipeline = load_pipeline(str(tiny_sd), device="cpu")
    drawn = made.batch([3] * 600, seeded(1)).latents
    with torch.no_grad():
        from fallow.recipes.pictures import open_picture, to_pixels

        said = pipeline.vae.encode(to_pixels(open_picture(pictures / "3.png"), (32, 32))[None]).latent_dist
    scale = pipeline.vae.config.scaling_factor
    torch.testing.assert_close(drawn.mean(0), said.mean[0] * scale, rtol=0, atol=0.04)
    assert float((drawn.std(0) / (said.std[0] * scale)).mean()) == pytest.approx(1, abs=0.02)


def test_half_of_the_pictures_are_mirrored_and_only_if_asked(examples):
    made = examples(flip=True)
    assert (made.means[0][2] - made.means[1][2]).abs().max() > 0.01
    made.deviations = [[d * 0 for d in deviations] for deviations in made.deviations]
    drawn = made.batch([2] * 400, seeded(1)).latents
    straight = (drawn == made.means[0][2] * made.scale).flatten(1).all(1)
    assert 0.4 < float(straight.float().mean()) < 0.6
    assert len(examples().means) == 1


# -- what can go wrong ------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(settings, monkeypatch, page):
    real = noise.denoising_loss
    calls = []

    def broken(*args: Any, **more: Any) -> torch.Tensor:
        calls.append(None)
        return real(*args, **more) * (math.nan if len(calls) == 5 else 1.0)

    monkeypatch.setattr(noise, "denoising_loss", broken)
    config = settings(steps=9, save_every=2, log_every=100)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 5.*step-000004\. Lower lr=.*max_grad_norm=1.0"):
        train(config)
    folder = config.output
    assert [place.name for place in checkpoints(folder)] == ["step-000002", "step-000004"]
    info = json.loads((folder / "run.json").read_text())
    assert info["status"] == "failed"
    assert "the loss is nan" in info["error"]
    assert "the loss is nan" in (folder / "report.html").read_text()
    assert not (folder / "adapter").exists()
    assert [line["event"] for line in metrics(folder) if "event" in line][-1] == "nan"
    resumed = train(TrainConfig(resume=folder))  # it breaks once only
    assert all(math.isfinite(loss) for loss in losses(resumed.folder))
    assert resumed.info["status"] == "finished"


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(settings, monkeypatch):
    real = noise.denoising_loss

    def broken(network: Any, *args: Any, **more: Any) -> torch.Tensor:
        loss = real(network, *args, **more)
        loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(noise, "denoising_loss", broken)
    config = settings(steps=2, save_every=1, method="full")
    with pytest.raises(TrainingError, match=r"the gradient is not finite at step 1.*there was no checkpoint yet"):
        train(config)
    assert checkpoints(config.output) == []


def test_a_directory_in_use_is_never_written_into(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty; give another one, or go on with it: fallow train --resume"):
        train(settings())
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/run"):
        with pytest.raises(ConfigError, match="is, or lies in, a file"):
            train(settings(name))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place in which nobody can write, root included")
def test_an_output_that_cannot_be_written_is_told_before_anything_is_loaded(settings, monkeypatch):
    monkeypatch.setattr(text_to_image, "load_pipeline", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(
        ConfigError, match=r"output .* cannot be (made|written) \(.*\); give a folder that you may write"
    ):
        train(settings().model_copy(update={"output": Path("/proc/fallow-run")}))


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"model": "nowhere/at/all"}, ModelError, "does not exist"),
        ({"data": "./no-pictures"}, DataError, "no-pictures"),
        ({"resolution": 30}, ConfigError, "resolution=30 is not a multiple of 8"),
        ({"options": {"rank_weight": 1e-3}}, SelectionError, "no layer to act on"),
        ({"options": {"threshold": 1e3}}, SelectionError, "every"),
        ({"device": "abacus"}, ConfigError, "device=abacus"),
    ],
)
def test_what_cannot_be_trained_is_told_and_leaves_no_directory(settings, more, error, said):
    config = settings(**{name: value for name, value in more.items() if name not in ("model", "data", "device")})
    with pytest.raises(error, match=said):
        train(config.model_copy(update={name: more[name] for name in ("model", "data", "device") if name in more}))
    assert not config.output.exists()


def test_an_empty_folder_of_the_users_stays_when_nothing_was_trained(settings):
    config = settings(options={"rank_weight": 1e-3}, samples=1)
    config.output.mkdir()
    with pytest.raises(SelectionError):
        train(config)
    assert list(config.output.iterdir()) == []


def test_settings_are_refused_when_they_are_made():
    for values, said in (
        ({"stpes": 3}, r"there is no setting 'stpes' \(did you mean 'steps'\?\)"),
        ({"steps": 0}, "steps 0: input should be greater than or equal to 1"),
        ({"method": "saraa"}, "did you mean 'sara'"),
        ({"options": {"fractoin": 1}}, "did you mean 'fraction'"),
        ({"options": {"fraction": 1.5}}, "fraction=1.5"),
        ({"class_data": "somewhere"}, "needs class_prompt"),
        ({"sample_prompts": ["a dress", " "]}, "empty prompt"),
        ({"precision": "fp8"}, "precision fp8"),
        ({"lr": -1.0}, "lr -1.0"),
        ({"guidance": math.nan}, "guidance nan: input should be a finite number"),
        ({"noise_offset": math.inf}, "noise_offset inf: input should be a finite number"),
        ({"seed": 2**63}, "seed 9223372036854775808: input should be less than"),
    ):
        with pytest.raises((ConfigError, SelectionError), match=said):
            make_config(TrainConfig, values)


def test_every_setting_has_a_description_and_survives_toml():
    fields = TrainConfig.model_fields.items()
    assert all(field.description for _, field in fields)
    for name, field in fields:  # TOML has no null: what may be None must be None by default
        may_be_none = type(None) in get_args(field.annotation)
        assert not may_be_none or field.default is None, name
    config = TrainConfig(
        method="lora", options={"rank": 2, "target_modules": ["to_q"]}, lr=1e-4, sample_prompts=["a", "b"], min_snr=5
    )
    assert make_config(TrainConfig, tomllib.loads(to_toml(config, exclude={"output", "resume"}))) == config
