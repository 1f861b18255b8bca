"""The authors' names of layers mean to us what they mean to diffusers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from fallow.recipes.adapter_files import prepare
from fallow.recipes.convert import convert
from fallow.recipes.formats import names, reading


def test_every_weight_of_an_xl_unet_is_where_diffusers_puts_it():
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(2, 4),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=40,
    )  # fmt: skip
    own = {key: torch.tensor(float(number)) for number, key in enumerate(unet.state_dict())}
    attended = {("up_blocks", 0)}
    original = {}
    for key, value in own.items():
        layer, _, role = key.rpartition(".")
        original[f"model.diffusion_model.{names.to_ldm(layer, attended)}.{role}"] = value
    assert len(original) == len(own)
    config = {**unet.config, "class_embed_type": None, "addition_embed_type": "text_time"}
    theirs = convert_ldm_unet_checkpoint(original, config=config)
    assert theirs == own
    for key in original:
        layer, _, role = key.removeprefix("model.diffusion_model.").rpartition(".")
        assert original[key] == own[f"{names.from_ldm(layer)}.{role}"]


def kohya_flux(hidden: int = 16, rank: int = 2) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = {
        "double_blocks_0_img_attn_qkv": (3 * hidden, hidden),
        "double_blocks_0_txt_attn_qkv": (3 * hidden, hidden),
        "double_blocks_0_img_attn_proj": (hidden, hidden),
        "double_blocks_0_txt_attn_proj": (hidden, hidden),
        "double_blocks_0_img_mlp_0": (4 * hidden, hidden),
        "double_blocks_0_txt_mlp_2": (hidden, 4 * hidden),
        "double_blocks_0_img_mod_lin": (6 * hidden, hidden),
        "double_blocks_0_txt_mod_lin": (6 * hidden, hidden),
        "single_blocks_0_linear1": (7 * hidden, hidden),
        "single_blocks_0_linear2": (hidden, 5 * hidden),
        "single_blocks_0_modulation_lin": (3 * hidden, hidden),
    }
    made = {}
    for name, (out, inner) in shapes.items():
        made[f"lora_unet_{name}.lora_down.weight"] = torch.randn(rank, inner, generator=rng)
        made[f"lora_unet_{name}.lora_up.weight"] = torch.randn(out, rank, generator=rng)
        made[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
    return made


def test_diffusers_reads_the_names_of_flux_as_we_do(tmp_path):
    from diffusers import FluxPipeline

    # the sizes of linear1 are those of the true model in diffusers' reading
    tensors = {key: value for key, value in kohya_flux().items() if "linear1" not in key}
    save_file(tensors, tmp_path / "flux.safetensors")
    theirs = FluxPipeline.lora_state_dict(dict(tensors))
    layers = reading.read(tmp_path / "flux.safetensors").parts["transformer"]
    found = {key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in theirs if "lora_A" in key}
    assert {name.removesuffix(".weight") for name in layers} == found
    for name, layer in layers.items():
        place = f"transformer.{name.removesuffix('.weight')}"
        product = theirs[f"{place}.lora_B.weight"] @ theirs[f"{place}.lora_A.weight"]
        torch.testing.assert_close(layer.change(), product, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_transformer_of_diffusers_fuses_what_we_made_of_the_fused_layers(tmp_path, family):
    if family == "flux":
        from diffusers import FluxTransformer2DModel as Model

        size = {"num_single_layers": 1, "axes_dims_rope": (4, 2, 2), "in_channels": 4}
        tensors = kohya_flux()
    else:
        from diffusers import SD3Transformer2DModel as Model

        size = {"sample_size": 8, "in_channels": 4, "caption_projection_dim": 16}
        rename = (
            ("double_blocks_0_img_", "joint_blocks_0_x_block_"),
            ("double_blocks_0_txt_", "joint_blocks_0_context_block_"),
        )
        tensors = {key: value for key, value in kohya_flux().items() if "_attn_" in key and "txt_attn_proj" not in key}
        for old, new in rename:
            tensors = {key.replace(old, new): value for key, value in tensors.items()}
    torch.manual_seed(0)
    size |= {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16}
    ours = Model(patch_size=1, pooled_projection_dim=16, **size)
    theirs = Model.from_config(ours.config)
    theirs.load_state_dict(ours.state_dict())
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    save_file(tensors, tmp_path / "kohya.safetensors")
    convert(tmp_path / "kohya.safetensors", "diffusers", tmp_path / "made.safetensors")
    theirs.load_lora_adapter(str(tmp_path), weight_name="made.safetensors", prefix="transformer")
    theirs.fuse_lora()
    prepare(ours, [(tmp_path / "kohya.safetensors", 1.0)]).apply()
    merged = {name.replace(".base_layer", ""): p for name, p in theirs.named_parameters() if "lora_" not in name}
    moved = {name for name, p in ours.named_parameters() if not torch.equal(p, before[name])}
    assert len(moved) == len(load_file(tmp_path / "made.safetensors")) // 2
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, merged[name], atol=1e-5, rtol=0)
