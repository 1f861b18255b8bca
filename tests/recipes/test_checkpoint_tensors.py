"""Tensors of checkpoints in their authors' names, cut and called as diffusers has them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from fallow.core.errors import ModelError
from fallow.recipes.checkpoint_tensors import network_tensors
from fallow.recipes.extract import extract
from fallow.recipes.formats import reading


def test_a_single_file_of_stable_diffusion_is_read_by_diffusers_names(tmp_path):
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.randn(8, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": torch.randn(8, 8),
        "model.diffusion_model.output_blocks.2.1.conv.bias": torch.randn(8),
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": torch.randn(8, 4),
        "first_stage_model.encoder.conv_in.weight": torch.randn(8, 3, 3, 3),
    }
    save_file(tensors, tmp_path / "sd.safetensors")
    parts, others = network_tensors(tmp_path / "sd.safetensors")
    assert set(parts["unet"]) == {
        "conv_in.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "up_blocks.0.upsamplers.0.conv.bias",
    }
    assert set(parts["text_encoder"]) == {"encoder.layers.0.mlp.fc1.weight"}
    assert others == ["first_stage_model.encoder.conv_in.weight"]
    assert torch.equal(parts["unet"]["conv_in.weight"].read(), next(iter(tensors.values())))


def flux(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "double_blocks.0.img_attn.qkv.weight": torch.randn(24, 8, generator=rng),
        "single_blocks.1.linear1.weight": torch.randn(56, 8, generator=rng),
        "single_blocks.1.linear1.bias": torch.randn(56, generator=rng),
        "final_layer.adaLN_modulation.1.weight": torch.randn(16, 8, generator=rng),
    }


def test_the_fused_layers_of_flux_are_cut_also_their_biases(tmp_path):
    tensors = flux(0)
    save_file(tensors, tmp_path / "flux.safetensors")
    found = network_tensors(tmp_path / "flux.safetensors")[0]["transformer"]
    qkv, linear, bias, last = tensors.values()
    assert torch.equal(found["transformer_blocks.0.attn.to_k.weight"].read(), qkv[8:16])
    assert torch.equal(found["single_transformer_blocks.1.proj_mlp.weight"].read(), linear[24:])
    assert torch.equal(found["single_transformer_blocks.1.proj_mlp.bias"].read(), bias[24:])
    assert torch.equal(found["single_transformer_blocks.1.attn.to_v.bias"].read(), bias[16:24])
    assert torch.equal(found["norm_out.linear.weight"].read(), torch.cat([last[8:], last[:8]]))
    assert all(tuple(one.read().shape) == one.shape for one in found.values())


def test_an_adapter_of_two_single_files_has_diffusers_names_and_the_change(tmp_path):
    from fallow.core.linalg import Truncation

    one, other = flux(0), flux(1)
    for name, tensors in (("base", one), ("tuned", other)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    found = extract(*paths, tmp_path / "lora.safetensors", to="kohya", truncation=Truncation(rank=8))
    assert found["error"] < 1e-5
    layers = reading.read(tmp_path / "lora.safetensors").parts["transformer"]
    key = "double_blocks.0.img_attn.qkv.weight"
    torch.testing.assert_close(
        layers["transformer_blocks.0.attn.to_k.weight"].change(), (other[key] - one[key])[8:16], atol=1e-5, rtol=0
    )


def test_a_file_of_unknown_tensors_is_refused_by_its_first(tmp_path):
    save_file({"first_stage_model.x": torch.zeros(2), "model.diffusion_model.strange": torch.zeros(2)}, tmp_path / "a")
    with pytest.raises(ModelError, match="does not exist"):
        network_tensors(tmp_path / "none")
    found = network_tensors(tmp_path / "a")
    assert found[1] == ["first_stage_model.x"]
