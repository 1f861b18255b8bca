"""Names of layers, fused layers of FLUX and Stable Diffusion 3, and files that are broken or mean harm."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fallow.core.errors import AdapterError, ConfigError
from fallow.recipes.convert import convert
from fallow.recipes.formats import names, reading
from fallow.recipes.formats.patterns import Pattern, settings

NAMES = [
    "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0",
    "up_blocks.1.resnets.2.conv_shortcut",
    "mid_block.resnets.0.time_emb_proj",
    "time_embedding.linear_1",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "text_model.encoder.layers.11.self_attn.out_proj",
    "single_transformer_blocks.37.attn.to_q",
    "transformer_blocks.3.norm1_context.linear",
    "transformer_blocks.3.ff_context.net.2",
    "encoder.block.2.layer.1.DenseReluDense.wi_0",
    "input_blocks.4.1.proj_in",
    "double_blocks.18.img_attn.qkv",
]


@pytest.mark.parametrize("name", NAMES)
def test_dots_are_found_again_where_kohya_wrote_underscores(name):
    assert names.dotted(name.replace(".", "_")) == name


def test_a_name_of_unknown_words_is_read_from_the_network_alone():
    assert names.dotted("zorg_0_to_q") is None
    assert names.dotted("zorg_0_to_q", ["a", "zorg.0.to_q"]) == "zorg.0.to_q"


def pair(place: str, out: int, inner: int, rank: int = 2, alpha: float | None = 1.0, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    made = {
        f"{place}.lora_down.weight": torch.randn(rank, inner, generator=rng),
        f"{place}.lora_up.weight": torch.randn(out, rank, generator=rng),
    }
    return made | ({} if alpha is None else {f"{place}.alpha": torch.tensor(alpha)})


# -- FLUX and Stable Diffusion 3 --------------------------------------------------------------------------------------

FLUX = {
    "lora_unet_double_blocks_0_img_attn_qkv": (24, 8),
    "lora_unet_double_blocks_0_txt_attn_proj": (8, 8),
    "lora_unet_single_blocks_3_linear1": (56, 8),  # 3 x 8 and a hidden layer of 32
    "lora_unet_single_blocks_3_linear2": (8, 40),
    "lora_unet_final_layer_adaLN_modulation_1": (16, 8),
}


def test_the_fused_layers_of_flux_are_cut_by_rows_and_put_together_again(tmp_path):
    tensors = {}
    for number, (place, (out, inner)) in enumerate(FLUX.items()):
        tensors |= pair(place, out, inner, seed=number)
    file, back = tmp_path / "flux.safetensors", tmp_path / "back.safetensors"
    save_file(tensors, file)
    layers = reading.read(file).parts["transformer"]

    def change(place):
        return 0.5 * tensors[f"{place}.lora_up.weight"] @ tensors[f"{place}.lora_down.weight"]

    qkv, linear = change("lora_unet_double_blocks_0_img_attn_qkv"), change("lora_unet_single_blocks_3_linear1")
    for at, name in enumerate(("to_q", "to_k", "to_v")):
        rows = slice(8 * at, 8 * at + 8)
        torch.testing.assert_close(layers[f"transformer_blocks.0.attn.{name}.weight"].change(), qkv[rows])
        torch.testing.assert_close(layers[f"single_transformer_blocks.3.attn.{name}.weight"].change(), linear[rows])
    torch.testing.assert_close(layers["single_transformer_blocks.3.proj_mlp.weight"].change(), linear[24:])
    last = change("lora_unet_final_layer_adaLN_modulation_1")
    torch.testing.assert_close(layers["norm_out.linear.weight"].change(), torch.cat([last[8:], last[:8]]))
    convert(file, "diffusers", tmp_path / "diffusers.safetensors")
    convert(tmp_path / "diffusers.safetensors", "kohya", back)
    found = load_file(back)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_queries_and_values_of_different_factors_become_blocks_of_one_layer(tmp_path):
    tensors = {}
    for number, name in enumerate(("to_q", "to_v")):
        place = f"transformer.transformer_blocks.0.attn.{name}"
        made = pair("x", 8, 8, rank=2 + number, alpha=None, seed=number)
        tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"] = made.values()
    file, made = tmp_path / "diffusers.safetensors", tmp_path / "kohya.safetensors"
    save_file(tensors, file)
    convert(file, "kohya", made)
    assert {key.split(".")[0] for key in load_file(made)} == {"lora_unet_joint_blocks_0_x_block_attn_qkv"}
    one, other = reading.read(file).parts["transformer"], reading.read(made).parts["transformer"]
    for name in ("to_q", "to_v"):
        key = f"transformer_blocks.0.attn.{name}.weight"
        torch.testing.assert_close(other[key].change(), one[key].change())
    assert not other["transformer_blocks.0.attn.to_k.weight"].change().any()


# -- parts ------------------------------------------------------------------------------------------------------------


def test_text_encoders_of_kohya_are_told_apart_and_named_as_before(tmp_path):
    tensors = {}
    for number, prefix in enumerate(("lora_te1", "lora_te2")):
        tensors |= pair(f"{prefix}_text_model_encoder_layers_0_mlp_fc1", 8, 4, seed=number)
    tensors |= pair("lora_unet_mid_block_attentions_0_proj_in", 8, 8)
    file, back = tmp_path / "xl.safetensors", tmp_path / "back.safetensors"
    save_file(tensors, file)
    assert set(reading.read(file).parts) == {"text_encoder", "text_encoder_2", "unet"}
    convert(file, "peft", tmp_path / "peft")
    assert {p.name for p in (tmp_path / "peft").iterdir()} == {"text_encoder", "text_encoder_2", "unet"}
    convert(tmp_path / "peft", "kohya", back)
    found = load_file(back)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_the_oldest_names_of_diffusers_are_read(tmp_path):
    place = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor"
    save_file(
        {f"{place}.to_out_lora.down.weight": torch.ones(2, 4), f"{place}.to_out_lora.up.weight": torch.ones(6, 2)},
        tmp_path / "old.safetensors",
    )
    layers = reading.read(tmp_path / "old.safetensors").parts["unet"]
    ((name, layer),) = layers.items()
    assert name == "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.weight"
    assert (layer.scale, layer.shape) == (1.0, (6, 4))


# -- patterns ---------------------------------------------------------------------------------------------------------


def test_patterns_mean_to_us_what_they_mean_to_peft():
    pattern = Pattern("here", "alpha_pattern", {"^conv_in": 2, "to_q": 3, "b.to_q": 4})
    found = [pattern.of(layer, 1) for layer in ("conv_in", "a.conv_in", "a.to_q", "b.to_q", "auto_q")]
    assert found == [2, 1, 3, 3, 1]  # PEFT takes the first that fits
    with pytest.raises(AdapterError, match="regular expression"):
        Pattern("here", "alpha_pattern", {"(a+)+$": 1})


def test_a_layer_named_as_the_end_of_another_is_addressed_alone():
    import re

    told = settings({"proj_out": (4, 4.0), "blocks.0.proj_out": (2, 1.5)}, dora=False)
    assert not re.fullmatch(told["target_modules"], "blocks.1.proj_out")
    assert re.fullmatch(told["target_modules"], "proj_out")
    assert (told["r"], told["rank_pattern"], told["alpha_pattern"]) == (4, {"^blocks.0.proj_out": 2},
                                                                        {"^blocks.0.proj_out": 1.5})  # fmt: skip


# -- files that are broken or mean harm -------------------------------------------------------------------------------

GOOD = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{GOOD}.lora_up.weight"), "no up"),
        (lambda t: t.update({f"{GOOD}.lora_up.weight": torch.zeros(8, 3)}), "no pair of factors"),
        (lambda t: t.update({f"{GOOD}.lora_up.weight": torch.full((8, 2), float("nan"))}), "NaN or infinite"),
        (lambda t: t.update({f"{GOOD}.alpha": torch.tensor(float("inf"))}), "NaN or infinite"),
        (lambda t: t.update({f"{GOOD}.alpha": torch.ones(3)}), "no single number"),
        (lambda t: t.update({f"{GOOD}.lora_down.weight": torch.zeros(2, 8, dtype=torch.int32)}), "real numbers"),
        (lambda t: t.update({f"{GOOD}.hada_w1_a": torch.zeros(2, 8)}), "LoHa"),
        (lambda t: t.update({f"{GOOD}.lokr_w1": torch.zeros(2, 8)}), "LoKr"),
        (lambda t: t.update({"surprise": torch.zeros(2)}), "no adapter format"),
        (lambda t: t.update(pair("lora_unet_.._.._etc_passwd", 4, 4)), "cannot read"),
        (lambda t: t.update({f"{GOOD}.dora_scale": torch.ones(1, 8)}), "wd_on_output=False"),
        (lambda t: t.update({f"{GOOD}.lora_mid.weight": torch.zeros(5, 2, 3, 3)}), "does not fit between"),
        (
            lambda t: t.update(
                {f"{GOOD}.lora_mid.weight": torch.zeros(2, 2, 3), f"{GOOD}.lora_down.weight": torch.zeros(2)}
            ),
            "does not fit between",
        ),
        (lambda t: t.update({f"{GOOD}.diff": torch.zeros(8, 8)}), "full change and"),
        (lambda t: t.update(pair("lycoris_mid_block_attentions_0_proj_in", 8, 8)), "twice"),
    ],
)
def test_a_broken_or_foreign_file_is_refused_by_name(tmp_path, change, message):
    tensors = pair(GOOD, 8, 8)
    change(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(AdapterError, match=message):
        convert(tmp_path / "bad.safetensors", "diffusers", tmp_path / "made")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.safetensors"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata"),
        ({"lora_adapter_metadata": "[]"}, "no table"),
        ({"lora_adapter_metadata": json.dumps({"unet.lora_alpha": "much"})}, "lora_alpha"),
        ({"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {"a": "b"}})}, "not a number"),
        ({"fallow": "{"}, "broken metadata"),
        ({"fallow": json.dumps({"base": 3})}, "broken metadata"),
    ],
)
def test_broken_metadata_are_refused(tmp_path, metadata, message):
    save_file(pair("unet.mid_block.attentions.0.proj_in", 8, 8, alpha=None), tmp_path / "bad.safetensors", metadata)
    with pytest.raises(AdapterError, match=message):
        reading.read(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "all"}, "trained biases"),
        ({"modules_to_save": ["conv_in"]}, "trained whole"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"peft_type": "LOHA"}, "PEFT's LOHA"),
        ({"lora_alpha": None}, None),
    ],
)
def test_settings_of_peft_that_other_formats_cannot_hold_are_refused_by_name(tmp_path, settings, message):
    folder = tmp_path / "peft"
    folder.mkdir()
    tensors = {
        "base_model.model.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 4),
        "base_model.model.mid_block.attentions.0.proj_in.lora_B.weight": torch.ones(4, 2),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, **settings}))
    if message is None:
        convert(folder, "kohya", tmp_path / "made.safetensors")
        assert float(load_file(tmp_path / "made.safetensors")[f"{GOOD}.alpha"]) == 8  # PEFT's own default
        return
    with pytest.raises(AdapterError, match=message):
        convert(folder, "kohya", tmp_path / "made.safetensors")
    assert not (tmp_path / "made.safetensors").exists()


# -- sparse adapters of several parts ---------------------------------------------------------------------------------


def test_sparse_adapters_of_several_parts_become_one_file_and_a_folder_again(tmp_path):
    from fallow.core.sparse import Entry, SparseDelta
    from fallow.recipes.adapters import describe

    whole = {"unet": "conv_in.weight", "text_encoder": "encoder.layers.0.mlp.fc1.weight"}
    for number, (part, name) in enumerate(whole.items()):
        entry = Entry(
            torch.tensor([1, 5], dtype=torch.int32), torch.tensor([0.5, number - 1.0]), (4, 3), "float32", "f32:a"
        )
        SparseDelta({name: entry}, "delta", {"method": "sara"}).save(tmp_path / "parts" / part)
    file, back = tmp_path / "full.safetensors", tmp_path / "back"
    convert(tmp_path / "parts", "lycoris-diff", file)
    assert set(load_file(file)) == {"lora_unet_conv_in.diff", "lora_te_text_model_encoder_layers_0_mlp_fc1.diff"}
    convert(file, "fallow", back)
    for part, name in whole.items():
        one, other = (SparseDelta.load(place / part) for place in (tmp_path / "parts", back))
        assert torch.equal(one.entries[name].index, other.entries[name].index)
        assert torch.equal(one.entries[name].values, other.entries[name].values)
        assert one.entries[name].fingerprint == other.entries[name].fingerprint
        assert one.metadata == other.metadata
    found = describe(back)
    assert found["facts"]["parts"] == {"unet": "sparse", "text_encoder": "sparse"}
    assert found["facts"]["trained"] == 4
    with pytest.raises(ConfigError, match="give a folder"):
        convert(file, "fallow", tmp_path / "one.safetensors")
