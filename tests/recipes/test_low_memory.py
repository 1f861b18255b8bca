"""Runs that save memory by how the base is kept: they train, resume, and their adapters fit the ordinary base."""

from __future__ import annotations

import re
from io import StringIO

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console
from safetensors.torch import load_file

import fallow
from fallow.analysis.memory import LiveBytes
from fallow.core.errors import ConfigError
from fallow.core.sparse import SparseDelta
from fallow.recipes import low_memory
from fallow.recipes.doctor import Plan, batch_loss, memory, memory_of
from fallow.recipes.doctor import Source as Model
from fallow.recipes.methods import LORA_TARGETS
from fallow.recipes.pipelines import apply_adapters, load_pipeline
from fallow.recipes.run_directory import read_info
from fallow.recipes.settings import make_config
from fallow.recipes.text_to_image import train
from fallow.recipes.train_config import TrainConfig

QUANTISED = ["fp8", "nf4", "int8"]
MODES = [(method, {"base_precision": mode}) for method in ("sara", "lora") for mode in QUANTISED]
MODES += [("sara", {"block_swap": 6}), ("lora", {"block_swap": 6}), ("sara", {"base_precision": "bf16"})]
MODES += [("sara", {"base_precision": "nf4", "block_swap": 5})]
pytestmark = pytest.mark.usefixtures("quick", "untold")
told = low_memory.told


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs estimate nothing beforehand, which takes longer than their three steps."""
    monkeypatch.setattr(low_memory, "told", lambda config: "")


@pytest.fixture(scope="module")
def ordinary(tiny_sd, tmp_path_factory):
    """What a network predicts with the adapter of an ordinary run, by method."""
    made = {}

    def get(method, pictures):
        if method not in made:
            run = train(config(tiny_sd, pictures, tmp_path_factory.mktemp(method) / "run", method=method))
            made[method] = run.info["trained_parameters"], prediction(tiny_sd, run.adapter)
        return made[method]

    return get


def config(tiny_sd, pictures, output, **more):
    settings = {
        "model": str(tiny_sd), "data": str(pictures), "output": output, "steps": 3, "batch_size": 2, "samples": 0,
        "save_every": 0, "warmup": 0, "lr": 1e-2, "log_every": 1,
    }  # fmt: skip
    if more.get("method", "sara") == "sara":
        settings["options"] = {"fraction": 0.1}
    return TrainConfig(**{**settings, **more})


def tensors(folder):
    return load_file(next(folder.glob("*.safetensors")))


def prediction(tiny_sd, adapter):
    pipeline = load_pipeline(str(tiny_sd))
    apply_adapters(pipeline, [(adapter, 1.0)])
    torch.manual_seed(3)
    with torch.no_grad():
        return pipeline.unet(torch.randn(2, 4, 8, 8), 500, torch.randn(2, 5, 16)).sample


@pytest.mark.parametrize(("method", "mode"), MODES, ids=lambda one: one if isinstance(one, str) else str(one.values()))
def test_a_run_trains_and_its_adapter_fits_the_ordinary_base(tiny_sd, pictures, tmp_path, ordinary, method, mode):
    run = train(config(tiny_sd, pictures, tmp_path / "low", method=method, **mode))
    trained, expected = ordinary(method, pictures)
    assert run.info["trained_parameters"] == trained
    assert (prediction(tiny_sd, run.adapter) - expected).norm() / expected.norm() < 0.25  # loads without force
    kept = mode.get("base_precision")
    if method == "sara":
        told = SparseDelta.load(run.adapter).metadata.get("base_kept_as", [])
        assert told == ({"nf4": ["fp8", "nf4"], "fp8": ["fp8"], "int8": ["int8"]}.get(kept, []))


@pytest.mark.parametrize("method", ["sara", "lora"])
@pytest.mark.parametrize("mode", [{"base_precision": "nf4"}, {"base_precision": "fp8", "block_swap": 7}],
                         ids=["nf4", "fp8-7"])  # fmt: skip
def test_an_interrupted_run_goes_on_bit_for_bit(tiny_sd, pictures, tmp_path, method, mode):
    whole = train(config(tiny_sd, pictures, tmp_path / "whole", method=method, steps=4, **mode))

    class Stop(Exception):
        pass

    def stop(step):
        if step == 2:
            raise Stop

    with pytest.raises(Stop):
        train(config(tiny_sd, pictures, tmp_path / "cut", method=method, steps=4, save_every=2, **mode),
              after_step=stop)  # fmt: skip
    resumed = train(TrainConfig(resume=tmp_path / "cut"))
    ours, theirs = tensors(resumed.adapter), tensors(whole.adapter)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_fused_step_trains_to_the_weights_of_the_ordinary_one(tiny_sd, pictures, tmp_path):
    runs = [
        train(config(tiny_sd, pictures, tmp_path / str(fused), max_grad_norm=0.0, fused_step=fused, **mode))
        for fused, mode in ((True, {"base_precision": "nf4"}), (False, {"base_precision": "nf4"}))
    ]
    ours, theirs = (tensors(run.adapter) for run in runs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name])


def test_the_preset_fills_in_what_is_not_given_and_nothing_else():
    preset = TrainConfig(low_memory=True)
    assert (preset.base_precision, preset.precision, preset.gradient_checkpointing) == ("fp8", "bf16", True)
    assert (preset.fused_step, preset.max_grad_norm) == (True, 0.0)
    own = TrainConfig(low_memory=True, base_precision="nf4", precision="no", max_grad_norm=1.0)
    assert (own.base_precision, own.precision, own.fused_step) == ("nf4", "no", False)
    lora = TrainConfig(low_memory=True, method="lora", accumulation=4)
    assert (lora.base_precision, lora.fused_step, lora.max_grad_norm) == ("fp8", False, 1.0)
    full = TrainConfig(low_memory=True, method="full")
    assert (full.base_precision, full.gradient_checkpointing) == ("float32", True)
    assert TrainConfig(base_precision="bf16").precision == "bf16"
    assert TrainConfig(fused_step=True).max_grad_norm == 0
    assert not low_memory.is_low(TrainConfig())


def test_a_run_of_the_preset_says_beforehand_what_memory_it_takes(tiny_sd, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(low_memory, "told", told)
    said = StringIO()
    console = Console(file=said, width=200)
    run = train(config(tiny_sd, pictures, tmp_path / "run", low_memory=True, steps=1), console)
    assert re.search(r"memory: about \d+\.\d MB \(0\.\d MB of the network as fp8", said.getvalue())
    assert read_info(run.folder)["trained_parameters"] > 0
    saved = (run.folder / "config.toml").read_text()
    assert 'base_precision = "fp8"' in saved
    assert told(TrainConfig()) == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "full", "base_precision": "nf4"}, "base_precision=nf4 keeps frozen weights"),
        ({"method": "lt-sft", "block_swap": 2}, "block_swap=2 uploads weights"),
        ({"base_precision": "bf16", "precision": "fp16"}, "needs precision=bf16, and it is fp16"),
        ({"base_precision": "fp8", "train_text_encoder": True}, "base_precision=fp8 is for the denoising network"),
        ({"fused_step": True, "method": "lora"}, "and lora is none"),
        ({"fused_step": True, "accumulation": 2}, "accumulation=2 waits for more"),
        ({"fused_step": True, "class_prompt": "a bag"}, "class_prompt a second"),
        ({"fused_step": True, "max_grad_norm": 1.0}, "which max_grad_norm=1.0 clips; give 0"),
        ({"fused_step": True, "precision": "fp16"}, "as precision=fp16 must"),
        ({"fused_step": True, "options": {"in_backward": False}}, "contradict each other"),
        ({"options": {"in_backward": True}}, "the option in_backward never has all gradients"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(TrainConfig, settings)


def test_more_blocks_than_there_are_cannot_be_swapped(tiny_sd, pictures, tmp_path):
    with pytest.raises(ConfigError, match=r"block_swap=99 of \d+ blocks of this network leaves none"):
        train(config(tiny_sd, pictures, tmp_path / "run", block_swap=99))
    assert not (tmp_path / "run").exists()


PLANS = [
    {"base_precision": "nf4"}, {"base_precision": "fp8", "block_swap": 7}, {"block_swap": 6},
    {"base_precision": "int8", "fused_step": True}, {"base_precision": "nf4", "method": "lora"},
    {"base_precision": "bf16", "precision": "bf16"},
]  # fmt: skip


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: "-".join(map(str, plan.values())))
def test_the_estimate_is_within_15_per_cent_of_the_bytes_that_a_step_holds(tiny_sd, plan):
    plan = Plan(model=str(tiny_sd), fraction=0.1, batch_size=2, **plan)
    estimate = memory_of(plan)
    pipeline = load_pipeline(str(tiny_sd))
    network = pipeline.unet.train()
    with LiveBytes(network) as live:
        low_memory.keep(network, plan.base_precision, plan.block_swap)
        if plan.method == "lora":
            network.requires_grad_(False)
            inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=LORA_TARGETS), network)
            rule = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad])
        else:
            rule = fallow.SaRA(network, fraction=0.1, lr=1e-3, in_backward=plan.fused_step)
        loss = batch_loss(plan, Model.find(plan.model), network)
        for _ in range(2):
            value = loss()
            value.backward()
            rule.step()
            rule.zero_grad()
            del value
        live.peak = live.now
        loss().backward()
        rule.step()
    there_before = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for param in (*network.parameters(), *network.buffers())
        for tensor in ((param.store.parts or {}).values() if hasattr(param, "store") else [param])
    }  # fmt: skip
    kept = sum(size for key, size in there_before.items() if live._alive.get(key, 0) is None)
    inputs = 2 * 4 * 8 * 8 * 4 * 2 + 2 * 16 * 16 * 4  # the batch itself, made before the estimate counts
    assert estimate.total - estimate.others == pytest.approx(live.peak + kept - inputs, rel=0.15)


def test_doctor_compares_with_a_quantised_lora_and_an_ordinary_full_training(tiny_sd):
    plain = {one.method: one for one in memory(Plan(model=str(tiny_sd)))}
    low = {one.method: one for one in memory(Plan(model=str(tiny_sd), base_precision="nf4"))}
    assert low["sara"].weights < 0.6 * plain["sara"].weights
    assert low["lora, rank 8"].weights == pytest.approx(low["sara"].weights)
    assert low["full"] == plain["full"]
    with pytest.raises(ConfigError, match="base_precision=4bit is unknown; give one of float32, bf16, fp8"):
        memory(Plan(model=str(tiny_sd), base_precision="4bit"))
    with pytest.raises(ConfigError, match="method=full writes all weights"):
        memory(Plan(model=str(tiny_sd), method="full", block_swap=2))
