"""Files that we write are read by diffusers, PEFT and LyCORIS as we read them, and theirs by us."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fallow.core.errors import AdapterError
from fallow.recipes.adapter_files import apply_adapter, prepare
from fallow.recipes.approximation import Most
from fallow.recipes.convert import convert
from fallow.recipes.formats import reading
from fallow.recipes.pipelines import apply_adapters, load_pipeline

LAYERS = ["to_q", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.2", "conv_in", "linear_1", "conv_shortcut"]
ENCODER = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]  # as kohya; diffusers tells the format by out


@pytest.fixture(scope="module", autouse=True)
def any_peft() -> Iterator[None]:
    """transformers refuses a PEFT that is older than itself before it loads a text encoder's adapter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)
        yield


@pytest.fixture(scope="module")
def community(any_peft, tiny_sd, tmp_path_factory) -> Path:
    """What diffusers' own trainers save: a LoRA of network and text encoder, of two ranks and alphas."""
    return trained(tiny_sd, tmp_path_factory.mktemp("community"), {"to_v": 1})


@pytest.fixture(scope="module")
def even(any_peft, tiny_sd, tmp_path_factory) -> Path:
    """The same with one alpha; diffusers takes no heed of those that differ between attentions in kohya's format."""
    return trained(tiny_sd, tmp_path_factory.mktemp("even"), {})


def trained(tiny_sd: Path, folder: Path, alphas: dict[str, int]) -> Path:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    torch.manual_seed(5)
    settings = {
        "unet": LoraConfig(
            r=4, lora_alpha=6, target_modules=LAYERS, rank_pattern={"conv1": 2}, alpha_pattern=alphas,
            init_lora_weights=False,
        ),
        "text_encoder": LoraConfig(r=2, lora_alpha=4, target_modules=ENCODER, init_lora_weights=False),
    }  # fmt: skip
    tensors, told = {}, {}
    from peft import get_peft_model_state_dict

    for part, config in settings.items():
        network = getattr(pipeline, part)
        network.add_adapter(config)
        prefix = f"{part}.text_model." if part == "text_encoder" else f"{part}."
        tensors |= {prefix + k: v for k, v in get_peft_model_state_dict(network).items()}
        told |= {
            f"{part}.{k}": sorted(v) if isinstance(v, set) else v
            for k, v in network.peft_config["default"].to_dict().items()
        }
    file = folder / "pytorch_lora_weights.safetensors"
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(told), "modelspec.title": "style"}
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata)
    return file


def changed(tiny_sd: Path, path: Path, scale: float = 1.0) -> StableDiffusionPipeline:
    pipeline = load_pipeline(str(tiny_sd), "cpu")
    apply_adapters(pipeline, [(path, scale)])
    return pipeline


def merged_by_diffusers(tiny_sd: Path, path: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def assert_same(one, other, part: str, tolerance: float = 1e-5) -> None:
    a, b = weights(getattr(one, part)), weights(getattr(other, part))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def assert_moved(pipeline, tiny_sd: Path, part: str) -> None:
    base = weights(getattr(load_pipeline(str(tiny_sd), "cpu"), part))
    assert sum(not torch.equal(w, base[n]) for n, w in weights(getattr(pipeline, part)).items()) >= 2


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_lora_of_diffusers_is_applied_as_diffusers_fuses_it(tiny_sd, community, part):
    ours, theirs = changed(tiny_sd, community), merged_by_diffusers(tiny_sd, community)
    assert_same(ours, theirs, part)
    assert_moved(ours, tiny_sd, part)


@pytest.mark.parametrize(("which", "to"), [("community", "diffusers"), ("even", "kohya")])
def test_what_we_write_is_fused_by_diffusers_as_we_apply_it(tiny_sd, request, tmp_path, which, to):
    file, given = tmp_path / "made.safetensors", request.getfixturevalue(which)
    convert(given, to, file)
    theirs = merged_by_diffusers(tiny_sd, file)
    ours = changed(tiny_sd, given)
    for part in ("unet", "text_encoder"):
        assert_same(ours, theirs, part)
        assert_same(changed(tiny_sd, file), ours, part, 0.0)


def test_our_pictures_and_those_of_diffusers_with_the_lora_loaded_are_the_same(tiny_sd, even, tmp_path):
    file = tmp_path / "made.safetensors"
    convert(even, "kohya", file)
    ours = changed(tiny_sd, file)
    theirs = StableDiffusionPipeline.from_pretrained(tiny_sd)
    theirs.load_lora_weights(str(tmp_path), weight_name=file.name)
    theirs.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 2, "output_type": "pt"}
    drawn = [p("a", generator=torch.Generator().manual_seed(0), **how).images for p in (ours, theirs)]
    torch.testing.assert_close(drawn[0], drawn[1], atol=1e-5, rtol=0)


def test_peft_loads_each_part_of_what_we_write(tiny_sd, community, tmp_path):
    convert(community, "peft", tmp_path / "made")
    ours = changed(tiny_sd, community)
    for part in ("unet", "text_encoder"):
        network = getattr(load_pipeline(str(tiny_sd), "cpu"), part)
        hosted = PeftModel.from_pretrained(network, tmp_path / "made" / part).merge_and_unload()
        own = weights(getattr(ours, part))
        for name, weight in weights(hosted).items():
            torch.testing.assert_close(weight, own[name], atol=1e-5, rtol=0)
    assert_same(changed(tiny_sd, tmp_path / "made"), ours, "text_encoder", 0.0)


def tensors_of(file: Path) -> dict[str, Tensor]:
    return load_file(file)


@pytest.mark.parametrize("to", ["kohya", "peft"])
def test_there_and_back_is_the_same_bit_for_bit_with_its_metadata(community, tmp_path, to):
    there = tmp_path / ("made" if to == "peft" else "made.safetensors")
    convert(community, to, there)
    convert(there, "diffusers", tmp_path / "back.safetensors")
    before, after = tensors_of(community), tensors_of(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with safe_open(tmp_path / "back.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.title"] == "style"
    one, other = reading.read(community), reading.read(tmp_path / "back.safetensors")
    for part, name, layer in one.layers():
        assert other.parts[part][name].alpha == layer.alpha


def test_a_scale_and_several_adapters_add_up(tiny_sd, community):
    base, once = load_pipeline(str(tiny_sd), "cpu").unet, changed(tiny_sd, community).unet
    half = load_pipeline(str(tiny_sd), "cpu")
    apply_adapters(half, [(community, 0.25), (community, 0.5)])
    for (name, b), (_, o), (_, h) in zip(
        base.named_parameters(), once.named_parameters(), half.unet.named_parameters(), strict=True
    ):
        torch.testing.assert_close(h, b + 0.75 * (o - b), atol=1e-5, rtol=1e-5, msg=name)


# -- DoRA -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def dora(tiny_sd, tmp_path) -> tuple[Path, dict[str, Tensor]]:
    """A DoRA that PEFT saved, and the weights as PEFT merges it."""
    from peft import get_peft_model

    unet = load_pipeline(str(tiny_sd), "cpu").unet
    config = LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["to_q", "conv1"], init_lora_weights=False)
    hosted = get_peft_model(unet, config)
    with torch.no_grad():
        for name, p in hosted.named_parameters():
            if "magnitude" in name:
                p.mul_(1.25)
    hosted.save_pretrained(tmp_path / "dora")
    return tmp_path / "dora", weights(hosted.merge_and_unload())


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_dora_is_applied_as_peft_merges_it_whatever_the_format(tiny_sd, dora, tmp_path, to):
    file = tmp_path / "made.safetensors"
    convert(dora[0], to, file)
    for name, weight in weights(changed(tiny_sd, file).unet).items():
        torch.testing.assert_close(weight, dora[1][name], atol=1e-5, rtol=1e-5)
    convert(file, "peft", tmp_path / "back")
    before = tensors_of(dora[0] / "adapter_model.safetensors")
    after = tensors_of(tmp_path / "back" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# -- Stable Diffusion XL ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet_xl() -> UNet2DConditionModel:
    """The shape of SDXL's UNet: two residual layers to a block, one block without attention, time ids."""
    torch.manual_seed(2)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(2, 4),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=40,
    )  # fmt: skip


def lora_of(network: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A kohya file of every linear layer and convolution."""
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            out, *inner = module.weight.shape
            place = f"lora_unet_{name.replace('.', '_')}"
            made[f"{place}.lora_down.weight"] = torch.randn(2, *inner, generator=rng)
            made[f"{place}.lora_up.weight"] = 0.1 * torch.randn(out, 2, *[1] * (len(inner) - 1), generator=rng)
            made[f"{place}.alpha"] = torch.tensor(1.0)
    return made


def test_every_layer_of_an_xl_unet_has_a_name_in_the_original_network_and_back(unet_xl, tmp_path):
    first, ldm, back = (tmp_path / f"{name}.safetensors" for name in ("first", "ldm", "back"))
    save_file(lora_of(unet_xl), first, {"ss_network_dim": "2"})
    convert(first, "kohya-ldm", ldm)
    names = {key.split(".")[0].removeprefix("lora_unet_") for key in tensors_of(ldm)}
    assert {"input_blocks_4_1_transformer_blocks_1_attn2_to_k", "input_blocks_3_0_op", "middle_block_2_in_layers_2",
            "output_blocks_2_2_conv", "time_embed_0", "label_emb_0_2", "out_2"} <= names  # fmt: skip
    convert(ldm, "kohya", back)
    before, after = tensors_of(first), tensors_of(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert reading.read(ldm).format == "kohya-ldm"


def test_the_original_names_of_an_xl_lora_mean_the_same_layers_to_diffusers(unet_xl, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    first, ldm = tmp_path / "first.safetensors", tmp_path / "ldm.safetensors"
    # diffusers' reading of the names of the convolutions within blocks is not theirs to vouch for: attentions alone
    save_file({k: v for k, v in lora_of(unet_xl).items() if "transformer_blocks" in k and "ff" not in k}, first)
    convert(first, "kohya-ldm", ldm)
    states, alphas = StableDiffusionXLPipeline.lora_state_dict(str(ldm), unet_config=unet_xl.config)[:2]
    theirs = UNet2DConditionModel.from_config(unet_xl.config)
    theirs.load_state_dict(unet_xl.state_dict())
    theirs.load_lora_adapter(states, network_alphas=alphas, prefix="unet")
    theirs.fuse_lora()
    ours = UNet2DConditionModel.from_config(unet_xl.config)
    ours.load_state_dict(unet_xl.state_dict())
    prepare(ours, [(ldm, 1.0)]).apply()
    merged = {name.replace(".base_layer", ""): p for name, p in theirs.named_parameters() if "lora_" not in name}
    moved = 0
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, merged[name], atol=1e-5, rtol=0)
        moved += not torch.equal(weight, dict(unet_xl.named_parameters())[name])
    assert moved == len(tensors_of(first)) // 3


# -- full changes -----------------------------------------------------------------------------------------------------


def test_lycoris_merges_our_full_changes_as_we_apply_them(tiny_sd, tmp_path):
    from lycoris import create_lycoris_from_weights

    from fallow.core.sparse import Entry, SparseDelta

    unet = load_pipeline(str(tiny_sd), "cpu").unet
    rng = torch.Generator().manual_seed(3)
    entries = {}
    for name, p in unet.named_parameters():
        if name.endswith(".weight") and "conv_norm_out" not in name:
            index = torch.randperm(p.numel(), generator=rng)[: max(1, p.numel() // 10)].sort().values.int()
            entries[name] = Entry(index, torch.randn(len(index), generator=rng), tuple(p.shape), "float32", "")
    first = next(iter(entries.values()))
    first.values[0] = 0.0  # trained, and did not move
    sparse = SparseDelta(entries, "delta", {"method": "sara"}).save(
        tmp_path / "sparse.safetensors", notes={"modelspec.title": "a style"}
    )
    file = tmp_path / "full.safetensors"
    convert(sparse, "lycoris-diff", file)
    own = changed(tiny_sd, file).unet
    assert_same_weights = weights(changed(tiny_sd, sparse).unet)
    for name, weight in weights(own).items():
        torch.testing.assert_close(weight, assert_same_weights[name], atol=1e-6, rtol=0)
    theirs = {key.replace("lora_unet_", "lycoris_"): value for key, value in tensors_of(file).items()}
    network, _ = create_lycoris_from_weights(1.0, "", unet, theirs)
    assert len(network.loras) == len(entries)
    network.merge_to(1.0)
    for name, weight in weights(unet).items():
        torch.testing.assert_close(weight, assert_same_weights[name], atol=1e-5, rtol=0)
    back = tmp_path / "back.safetensors"
    convert(file, "fallow", back)
    one, other = SparseDelta.load(sparse), SparseDelta.load(back)
    assert one.entries.keys() == other.entries.keys()
    for name, entry in one.entries.items():
        assert torch.equal(entry.index, other.entries[name].index)
        assert torch.equal(entry.values, other.entries[name].values)
    assert other.metadata == one.metadata
    for made in (file, back):
        with safe_open(made, framework="pt") as opened:
            assert opened.metadata()["modelspec.title"] == "a style"


def test_a_lora_made_sparse_in_full_is_the_same_change(tiny_sd, community, tmp_path):
    unet_only = tmp_path / "unet.safetensors"
    save_file({k: v for k, v in tensors_of(community).items() if k.startswith("unet.")}, unet_only)
    found = convert(unet_only, "fallow", tmp_path / "all.safetensors")
    assert found["error"] == 0.0
    assert_same(changed(tiny_sd, tmp_path / "all.safetensors"), changed(tiny_sd, unet_only), "unet", 1e-6)
    part = convert(unet_only, "fallow", tmp_path / "part.safetensors", most=Most(fraction=0.2))
    assert part["trained"] == pytest.approx(0.2 * found["trained"], rel=0.01)
    assert 0.1 < part["error"] < 0.9


def test_lycoris_reads_our_tucker_form_as_plain_factors(tiny_sd, tmp_path):
    from lycoris import create_lycoris_from_weights

    unet = load_pipeline(str(tiny_sd), "cpu").unet
    weight = unet.conv_in.weight
    out, inner = weight.shape[:2]
    tensors = {
        "lora_unet_conv_in.lora_down.weight": torch.randn(3, inner, 1, 1),
        "lora_unet_conv_in.lora_mid.weight": torch.randn(3, 3, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.randn(out, 3, 1, 1),
        "lora_unet_conv_in.alpha": torch.tensor(1.5),
    }
    save_file(tensors, tmp_path / "tucker.safetensors")
    ours = changed(tiny_sd, tmp_path / "tucker.safetensors").unet.conv_in.weight
    theirs = {key.replace("lora_unet_", "lycoris_"): value for key, value in tensors.items()}
    network, _ = create_lycoris_from_weights(1.0, "", unet, theirs)
    network.merge_to(1.0)
    torch.testing.assert_close(ours, unet.conv_in.weight, atol=1e-5, rtol=0)


def test_an_adapter_of_a_text_encoder_alone_is_for_a_pipeline(tiny_sd, community, tmp_path):
    file = tmp_path / "encoder.safetensors"
    save_file({k: v for k, v in tensors_of(community).items() if k.startswith("text_encoder.")}, file)
    pipeline = changed(tiny_sd, file)
    assert_moved(pipeline, tiny_sd, "text_encoder")
    with pytest.raises(AdapterError, match="text encoders alone"):
        apply_adapter(pipeline.unet, file)
    save_file({k.replace("layers.0", "layers.7"): v for k, v in tensors_of(file).items()}, file)
    with pytest.raises(AdapterError, match=r"changes 'encoder.*which CLIPTextModel lacks"):
        apply_adapters(pipeline, [(file, 1.0)])


def test_peft_loads_the_second_text_encoder_of_an_xl_lora(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=10, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        projection_dim=8, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    encoder = CLIPTextModelWithProjection(config)
    place = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    up, down = torch.randn(16, 2), torch.randn(2, 8)
    tensors = {f"{place}.lora_up.weight": up, f"{place}.lora_down.weight": down, f"{place}.alpha": torch.tensor(1.0)}
    other = {key.replace("te2", "te1"): value.clone() for key, value in tensors.items()}
    save_file(tensors | other, tmp_path / "xl.safetensors")
    convert(tmp_path / "xl.safetensors", "peft", tmp_path / "made")
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    before = weights(encoder)[name]
    after = weights(PeftModel.from_pretrained(encoder, tmp_path / "made" / "text_encoder_2").merge_and_unload())[name]
    torch.testing.assert_close(after, before + 0.5 * up @ down, atol=1e-5, rtol=0)
