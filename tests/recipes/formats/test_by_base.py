"""PEFT's own VeRA, RandLoRA, MiSS and SHiRA in the formats of other programs, which need the base to be told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import MissConfig, PeftConfig, PeftModel, RandLoraConfig, ShiraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn

from fallow.core.errors import AdapterError
from fallow.core.linalg import Truncation
from fallow.recipes.convert import convert
from fallow.recipes.resize import resize

LINEAR = ["to_q", "to_v"]
CONFIGS: dict[str, PeftConfig] = {
    "VERA": VeraConfig(r=4, target_modules=LINEAR),
    "RANDLORA": RandLoraConfig(r=3, target_modules=LINEAR),
    "MISS": MissConfig(r=2, target_modules=LINEAR),
    "SHIRA": ShiraConfig(r=2, target_modules=LINEAR),
}


def unet(folder: Path) -> nn.Module:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()


@torch.no_grad()
def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in network.named_parameters()}


def theirs(kind: str, base: Path, folder: Path) -> dict[str, Tensor]:
    """A random adapter of PEFT's in `folder`; what PEFT merges of it."""
    torch.manual_seed(0)
    model = get_peft_model(unet(base), CONFIGS[kind])
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.1 * torch.randn_like(param))
    model.base_model.model.config._name_or_path = ""
    model.save_pretrained(folder)
    return weights(PeftModel.from_pretrained(unet(base), folder).merge_and_unload())


def alike(found: dict[str, Tensor], wanted: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    moved = 0.0
    for name, weight in wanted.items():
        change = float((weight - base[name]).norm())
        assert float((found[name] - weight).norm()) <= 1e-4 * change + 1e-6 * float(weight.norm()), name
        moved += change
    assert moved > 0.1


@pytest.mark.parametrize("kind", CONFIGS)
def test_pefts_other_methods_become_a_lora_that_diffusers_loads(kind: str, tiny_sd, tmp_path):
    wanted = theirs(kind, tiny_sd, tmp_path / "theirs")
    how = Truncation(energy=1 - 1e-10) if kind == "SHIRA" else None
    file = tmp_path / "lora.safetensors"
    told = convert(tmp_path / "theirs", "kohya", file, truncation=how, base=str(tiny_sd))
    assert told["from"] == ("fallow" if kind == "SHIRA" else f"PEFT's {kind}")
    assert told["error"] < 1e-4
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.load_lora_weights(file)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    alike(weights(pipeline.unet), wanted, weights(unet(tiny_sd)))


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_their_base_they_are_refused_by_name(kind: str, tiny_sd, tmp_path):
    theirs(kind, tiny_sd, tmp_path / "theirs")
    with pytest.raises(AdapterError, match=f"PEFT's {kind}.*--base"):
        convert(tmp_path / "theirs", "lycoris-diff", tmp_path / "made.safetensors")
    assert not (tmp_path / "made.safetensors").exists()


@pytest.mark.parametrize("kind", ["VERA", "RANDLORA", "MISS"])
def test_beside_another_base_they_are_refused_by_name(kind: str, tiny_sd, tmp_path):
    theirs(kind, tiny_sd, tmp_path / "theirs")
    other = StableDiffusionPipeline.from_pretrained(tiny_sd)
    for block in (*other.unet.down_blocks, other.unet.mid_block):
        for attention in getattr(block, "attentions", []):
            attention.transformer_blocks[0].attn1.to_q = nn.Linear(7, 7, bias=False)
    other.unet.save_pretrained(tmp_path / "other" / "unet")
    with pytest.raises(AdapterError, match="to_q"):
        convert(tmp_path / "theirs", "peft", tmp_path / "made", base=str(tmp_path / "other" / "unet"))
    assert not (tmp_path / "made").exists()


def test_ranks_that_differ_are_resized_to_a_file_of_kohyas_that_diffusers_scales_alike(tiny_sd, tmp_path):
    theirs("RANDLORA", tiny_sd, tmp_path / "theirs")
    convert(tmp_path / "theirs", "kohya", tmp_path / "whole.safetensors", base=str(tiny_sd))
    told = resize(tmp_path / "whole.safetensors", tmp_path / "small.safetensors", truncation=Truncation(energy=0.9))
    assert len({layer["rank"] for layer in told["layers"].values()}) > 1
    assert 0.1 < told["error"] < 0.33
    changes = {}
    for name in ("whole", "small"):
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
        pipeline.load_lora_weights(tmp_path / f"{name}.safetensors")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        before, after = weights(unet(tiny_sd)), weights(pipeline.unet)
        changes[name] = torch.cat([(after[key] - before[key]).flatten() for key in before])
    missing = float((changes["whole"] - changes["small"]).norm() / changes["whole"].norm())
    assert missing == pytest.approx(told["error"], rel=1e-3)
