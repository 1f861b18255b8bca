"""Loading a pipeline, refusing what is none, and drawing so that a picture depends on its seed and prompt alone."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fallow import assets
from fallow.core.errors import AdapterError, ConfigError, ModelError
from fallow.recipes import pipelines
from fallow.recipes.adapter_files import base_fingerprints, save_full
from fallow.recipes.pipelines import apply_adapters, generate, load_pipeline, trained_part

QUICK = {"steps": 3, "guidance": 2.0}


@pytest.fixture
def copied(tiny_sd: Path, tmp_path: Path) -> Path:
    """A pipeline directory that a test may break."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "model"))


def pixels(pictures) -> list[np.ndarray]:
    return [np.array(picture).astype(int) for picture in pictures]


def test_a_directory_is_loaded_in_float32_in_eval_mode_without_a_safety_checker(tiny_sd):
    pipeline = load_pipeline(str(tiny_sd), device="cpu")
    assert pipeline.safety_checker is None
    assert not any(m.training for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for m in part.modules())
    assert {p.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in part.parameters()} == {
        torch.float32
    }
    assert trained_part(pipeline) is pipeline.unet
    assert load_pipeline(str(tiny_sd), "cpu", torch.bfloat16).unet.dtype == torch.bfloat16


def test_mini_sd_is_the_shipped_directory(tiny_sd, monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "MINI_SD", tiny_sd)
    assert load_pipeline("mini-sd", "cpu").unet.config.cross_attention_dim == 16
    monkeypatch.setattr(assets, "MINI_SD", tmp_path / "gone")
    with pytest.raises(ModelError, match=r"mini-sd is not in .*install Fallow again"):
        load_pipeline("mini-sd", "cpu")


def test_half_precision_files_are_read_alone_or_not_and_become_float32(copied):
    expected = load_file(copied / "unet/diffusion_pytorch_model.safetensors")
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        file = copied / part / f"{name}.safetensors"
        save_file({k: v.half() for k, v in load_file(file).items()}, copied / part / f"{name}.fp16.safetensors",
                  metadata={"format": "pt"})  # fmt: skip
        file.unlink()
    unet = load_pipeline(str(copied), "cpu").unet
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    assert torch.equal(unet.conv_in.weight, expected["conv_in.weight"].half().float())


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("./nowhere", "does not exist; give 'mini-sd', a pipeline directory"),
        ("minisd", "does not exist"),
        ("some/deep/path", "does not exist"),
    ],
)
def test_a_wrong_path_is_told(model, says):
    with pytest.raises(ModelError, match=f"model {model} {says}"):
        load_pipeline(model, "cpu")


def test_a_directory_that_is_no_pipeline_is_told(tmp_path):
    with pytest.raises(ModelError, match=r"is no pipeline: .* has no model_index\.json"):
        load_pipeline(str(tmp_path), "cpu")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match=r"model_index\.json cannot be read"):
        load_pipeline(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("KandinskyPipeline", "is a KandinskyPipeline; Fallow works with Stable Diffusion 1"),
        ("", "is a pipeline without a class; Fallow works with"),
    ],
)
def test_another_family_is_told_before_it_is_loaded(tmp_path, kind, says):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(ModelError, match=says):
        load_pipeline(str(tmp_path), "cpu")


def test_weights_that_are_cut_off_missing_or_pickled_are_told(copied):
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_pipeline(str(copied), "cpu")
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_pipeline(str(copied), "cpu")


def test_a_hub_id_that_cannot_be_reached_is_told(monkeypatch):
    from diffusers import DiffusionPipeline

    def offline(*_, **__):
        raise OSError("We couldn't connect to the hub.\nmore lines")

    monkeypatch.setattr(DiffusionPipeline, "load_config", offline)
    with pytest.raises(ModelError, match=r"model owner/name is no folder here.*couldn't connect to the hub\)") as told:
        load_pipeline("owner/name", "cpu")
    assert "more lines" not in str(told.value)
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *_, **__: {"_class_name": "KandinskyPipeline"})
    with pytest.raises(ModelError, match="is a KandinskyPipeline; Fallow works with"):
        load_pipeline("owner/name", "cpu")


def test_single_files_are_known_by_their_tensors(tmp_path):
    file = tmp_path / "model.safetensors"
    for name, says in (
        ("adaln_single.emb.timestep_embedder.linear_1.weight", "holds the transformer of PixArt alone"),
        ("down_blocks.0.lora_A.weight", r"no checkpoint of a whole model .*down_blocks.*--adapter"),
    ):
        save_file({name: torch.zeros(1)}, file)
        with pytest.raises(ModelError, match=says):
            load_pipeline(str(file), "cpu")
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ModelError, match="cut off"):
        load_pipeline(str(file), "cpu")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(ModelError, match="can run code"):
        load_pipeline(str(tmp_path / "model.ckpt"), "cpu")


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "StableDiffusionPipeline"),
        ("conditioner.embedders.1.model.ln_final.weight", "StableDiffusionXLPipeline"),
        ("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight", "StableDiffusion3Pipeline"),
        ("double_blocks.0.img_attn.qkv.weight", "FluxPipeline"),
    ],
)
def test_a_single_file_goes_to_its_family_in_diffusers(tensor, kind, tmp_path, monkeypatch, tiny_sd):
    import diffusers

    file = tmp_path / "sd.safetensors"
    save_file({tensor: torch.zeros(1)}, file)
    ready = load_pipeline(str(tiny_sd), "cpu")
    asked = {}

    def load(path, **how):
        asked.update(how, path=path)
        return ready

    monkeypatch.setattr(getattr(diffusers, kind), "from_single_file", load)
    assert load_pipeline(str(file), "cpu") is ready
    own = {"safety_checker", "requires_safety_checker"} if kind == "StableDiffusionPipeline" else set()
    assert asked.keys() == {"path", *own}
    assert asked["path"] == str(file)


def test_a_device_that_is_not_there_is_told(tiny_sd):
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device={device} does not work here"):
            load_pipeline(str(tiny_sd), device)


# -- drawing ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tiny_sd):
    return load_pipeline(str(tiny_sd), "cpu")


def test_a_picture_depends_on_its_seed_and_prompt_and_not_on_the_batch(pipeline):
    prompts, seeds = ["a dress", "a coat", "a bag"], [4, 9, 4]
    together = pixels(generate(pipeline, prompts, seeds=seeds, **QUICK))
    again = pixels(generate(pipeline, prompts, seeds=seeds, **QUICK))
    turned = pixels(generate(pipeline, prompts[::-1], seeds=seeds[::-1], **QUICK))[::-1]
    alone = [pixels(generate(pipeline, [p], seeds=[s], **QUICK))[0] for p, s in zip(prompts, seeds, strict=True)]
    for one, two, three, four in zip(together, again, turned, alone, strict=True):
        assert (one == two).all()
        assert abs(one - three).max() <= 1  # a rounding, where the matrix products depend on the batch
        assert abs(one - four).max() <= 1
    other_seed = pixels(generate(pipeline, ["a dress"], seeds=[5], **QUICK))[0]
    assert abs(other_seed - together[0]).max() > 10
    assert together[0].shape == (32, 32, 3)


def test_prompt_negative_and_guidance_matter(pipeline):
    def draw(**how):
        return pixels(generate(pipeline, ["a dress"], **{"seeds": [1], **QUICK, **how}))[0]

    plain = draw()
    assert (draw(negative="") == plain).all()
    assert (draw(negative="a coat") != plain).any()
    assert (draw(guidance=30.0) != plain).any()
    assert (
        pixels(generate(pipeline, ["some coat"], seeds=[1], steps=3, guidance=30.0))[0] != draw(guidance=30.0)
    ).any()


def test_the_global_random_state_and_training_modes_are_as_before(pipeline):
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    modes = [m.training for m in pipeline.unet.modules()]
    generate(pipeline, ["a dress"], seeds=[0], **QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in pipeline.unet.modules()] == modes
    assert not pipeline.vae.training
    pipeline.unet.eval()


def test_sides_are_those_asked_for_and_impossible_ones_refused(pipeline):
    assert generate(pipeline, ["x"], seeds=[0], width=48, height=40, **QUICK)[0].size == (48, 40)
    with pytest.raises(ConfigError, match="width=30 is not a multiple of 8; give 24 or 32"):
        generate(pipeline, ["x"], seeds=[0], width=30, **QUICK)
    with pytest.raises(ConfigError, match="1001 denoising steps are impossible with this model; give 1 to 1000"):
        generate(pipeline, ["x"], seeds=[0], steps=1001, guidance=1.0)
    with pytest.raises(ConfigError, match="guidance=nan must be a finite number"):
        generate(pipeline, ["x"], seeds=[0], steps=1, guidance=float("nan"))
    with pytest.raises(ConfigError, match="2 seeds for 1 prompts"):
        generate(pipeline, ["x"], seeds=[0, 1], **QUICK)
    assert generate(pipeline, [], seeds=[], **QUICK) == []


def test_adapters_are_put_on_the_network_and_a_broken_one_on_nothing(tiny_sd, tmp_path):
    trained = load_pipeline(str(tiny_sd), "cpu")
    base = base_fingerprints(trained.unet)
    with torch.no_grad():
        for p in trained.unet.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    save_full(trained.unet, tmp_path / "full", base, {})
    pipeline = load_pipeline(str(tiny_sd), "cpu")
    plain = pixels(generate(pipeline, ["a dress"], seeds=[0], **QUICK))[0]
    with pytest.raises(AdapterError, match="does not exist"):
        apply_adapters(pipeline, [(tmp_path / "full", 1.0), (tmp_path / "none", 1.0)])
    assert (pixels(generate(pipeline, ["a dress"], seeds=[0], **QUICK))[0] == plain).all()
    apply_adapters(pipeline, [(tmp_path / "full", 1.0)])
    adapted, expected = (pixels(generate(p, ["a dress"], seeds=[0], **QUICK))[0] for p in (pipeline, trained))
    assert (adapted == expected).all()
    assert (adapted != plain).any()


def test_the_best_device_is_a_gpu_where_there_is_one(monkeypatch):
    for cuda, mps, best in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=cuda: found)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda found=mps: found)
        assert pipelines.best_device() == best


def test_a_prompt_that_is_longer_than_the_model_reads_is_told_once_and_by_name(pipeline, capfd):
    with pytest.warns(
        UserWarning, match="'a very long prompt, indeed' has .* tokens, of which this model reads 16"
    ) as told:
        generate(pipeline, ["a very long prompt, indeed", "another one that is too long"], seeds=[0, 1], **QUICK)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(pipeline, ["short"], seeds=[0], **QUICK)
    assert capfd.readouterr().err == ""
