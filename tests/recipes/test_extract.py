"""Adapters out of two checkpoints, of another size, and in another format, where the numbers are known."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fallow.core.errors import AdapterError, ConfigError, ModelError
from fallow.core.linalg import Truncation
from fallow.core.sparse import WEIGHTS, Entry, SparseDelta
from fallow.recipes.adapter_files import apply_adapter
from fallow.recipes.approximation import Most
from fallow.recipes.checkpoint_tensors import Stored
from fallow.recipes.convert import convert
from fallow.recipes.extract import extract
from fallow.recipes.formats import reading
from fallow.recipes.pipelines import load_pipeline
from fallow.recipes.resize import resize

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
CONV = "down_blocks.0.resnets.0.conv1.weight"
NORM = "conv_norm_out.weight"


def unet_of(path) -> nn.Module:
    return load_pipeline(str(path), "cpu").unet


@pytest.fixture(scope="module")
def tuned(tiny_sd, tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """The safetensors file of a UNet whose changes are of rank 3 (linear, singular values 4, 2, 1), full (convolution)
    and in a norm; and the changes.
    """
    rng = torch.Generator().manual_seed(1)
    file = next((tiny_sd / "unet").glob("*.safetensors"))
    base = load_file(file)
    out, inner = base[LINEAR].shape
    u = torch.linalg.qr(torch.randn(out, 3, generator=rng))[0]
    v = torch.linalg.qr(torch.randn(inner, 3, generator=rng))[0]
    change = {
        LINEAR: (u * torch.tensor([4.0, 2.0, 1.0])) @ v.T,
        CONV: 0.1 * torch.randn(base[CONV].shape, generator=rng),
        NORM: torch.full(base[NORM].shape, 0.5),
    }
    made = {name: value + change[name] if name in change else value for name, value in base.items()}
    path = tmp_path_factory.mktemp("tuned") / "diffusion_pytorch_model.safetensors"
    save_file(made, path)
    return path, {name: made[name] - base[name] for name in change}


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


# -- LoRA -------------------------------------------------------------------------------------------------------------


def test_the_extracted_lora_is_the_best_of_its_rank_and_tells_what_it_misses(tiny_sd, tuned, tmp_path):
    found = extract(str(tiny_sd), str(tuned[0]), tmp_path / "lora", truncation=Truncation(rank=2))
    assert found["layers"].keys() == {LINEAR, CONV}
    linear, conv = found["layers"][LINEAR], found["layers"][CONV]
    assert linear["error"] == pytest.approx(1 / math.sqrt(21), rel=1e-4)  # 4, 2 of 4, 2, 1
    values = torch.linalg.svdvals(tuned[1][CONV].flatten(1))
    assert conv["error"] == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-4)
    square = 21 + float(values.square().sum())
    lost = 1 + float(values[2:].square().sum())
    assert found["error"] == pytest.approx(math.sqrt(lost / square), rel=1e-4)
    norm = float(tuned[1][NORM].square().sum())
    assert f"1 biases, norms and embeddings, such as {NORM}" in found["remarks"][0]
    assert f"{100 * norm / (norm + square):.3g}%" in found["remarks"][0]


def test_peft_loads_the_extracted_lora_and_merges_it_to_what_was_told(tiny_sd, tuned, tmp_path):
    found = extract(str(tiny_sd), str(tuned[0]), tmp_path / "lora", truncation=Truncation(energy=0.9))
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    ranks = {name: one["rank"] for name, one in found["layers"].items()}
    assert ranks[LINEAR] == 2 < ranks[CONV]  # 16, 4 of 21 is above nine tenths
    assert {config["r"], *config["rank_pattern"].values()} == set(ranks.values())
    base = weights(unet_of(tiny_sd))
    hosted = PeftModel.from_pretrained(unet_of(tiny_sd), tmp_path / "lora").merge_and_unload()
    for name, weight in weights(hosted).items():
        change = weight - base[name]
        if name not in ranks:
            assert not change.any()
            continue
        error = float((change - tuned[1][name]).norm() / tuned[1][name].norm())
        assert error == pytest.approx(found["layers"][name]["error"], abs=1e-4)
        assert error**2 <= 0.1 + 1e-5
    own = unet_of(tiny_sd)
    apply_adapter(own, tmp_path / "lora")
    for name, weight in weights(own).items():
        torch.testing.assert_close(weight, weights(hosted)[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_extraction_writes_the_other_formats_too_with_the_fingerprints_of_the_base(tiny_sd, tuned, tmp_path, to):
    file = tmp_path / "lora.safetensors"
    extract(str(tiny_sd), str(tuned[0]), file, to=to, truncation=Truncation(energy=1.0), dtype=torch.float32)
    own, base = unet_of(tiny_sd), weights(unet_of(tiny_sd))
    apply_adapter(own, file)
    for name in (LINEAR, CONV):
        torch.testing.assert_close(weights(own)[name] - base[name], tuned[1][name], atol=1e-5, rtol=0)
    moved = unet_of(tiny_sd)
    with torch.no_grad():
        dict(moved.named_parameters())[LINEAR].mul_(2)
    with pytest.raises(AdapterError, match="another base"):
        apply_adapter(moved, file)
    layers = reading.read(file).parts["unet"]
    assert len({layer.alpha for layer in layers.values()}) == 1  # whatever the ranks


@pytest.mark.parametrize("kind", ["lora", "sara"])
def test_a_few_tensors_of_the_checkpoints_are_in_memory_at_a_time(tmp_path, monkeypatch, kind):
    base = {f"down_blocks.{i}.weight": torch.randn(20, 20) for i in range(20)}
    paths = [tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"]
    for path, more in zip(paths, (0.0, 0.01), strict=True):
        save_file({name: value + more for name, value in base.items()}, path)
    live: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most, read = [], Stored.read

    def counted(self: Stored) -> Tensor:
        found = read(self)
        live.add(found)
        most.append(len(live))
        return found

    monkeypatch.setattr(Stored, "read", counted)
    how = {"truncation": Truncation(rank=1)} if kind == "lora" else {"most": Most(budget=100)}
    extract(str(paths[0]), str(paths[1]), tmp_path / kind, kind=kind, **how)
    assert len(most) >= 40
    assert max(most) <= 8


# -- sparse -----------------------------------------------------------------------------------------------------------


def test_all_changed_entries_bring_the_tuned_model_back(tiny_sd, tuned, tmp_path):
    expected = load_file(tuned[0])
    for store, tolerance in (("delta", 1e-6), ("value", 0.0)):
        file = tmp_path / f"{store}.safetensors"
        found = extract(str(tiny_sd), str(tuned[0]), file, kind="sara", store=store)
        assert found["error"] == 0.0
        assert found["trained"] == sum(int((value != 0).sum()) for value in tuned[1].values())
        own = unet_of(tiny_sd)
        apply_adapter(own, file)
        for name, weight in weights(own).items():
            torch.testing.assert_close(weight, expected[name], atol=tolerance, rtol=0)


def test_a_budget_keeps_the_largest_changes_of_all_tensors_and_a_threshold_those_of_small_weights(
    tiny_sd, tuned, tmp_path
):
    base = load_file(next((tiny_sd / "unet").glob("*.safetensors")))
    flat = torch.cat([value.flatten() for value in tuned[1].values()]).abs()
    found = extract(str(tiny_sd), str(tuned[0]), tmp_path / "a.safetensors", kind="sara", most=Most(budget=100))
    delta = SparseDelta.load(tmp_path / "a.safetensors")
    assert delta.trained == 100
    kept = torch.cat([entry.values for entry in delta.entries.values()]).abs()
    assert float(kept.min()) >= float(flat.sort(descending=True).values[100])
    assert found["error"] == pytest.approx(math.sqrt(1 - float(kept.norm() / flat.norm()) ** 2), rel=1e-3)
    extract(str(tiny_sd), str(tuned[0]), tmp_path / "b.safetensors", kind="sara", threshold=0.02)
    delta = SparseDelta.load(tmp_path / "b.safetensors")
    for name, value in tuned[1].items():
        small = ((base[name].abs() < 0.02) & (value != 0)).flatten().nonzero().flatten()
        index = delta.entries[name].index.long() if name in delta.entries else small[:0]
        assert torch.equal(index, small)


# -- resizing ---------------------------------------------------------------------------------------------------------


def test_a_lower_rank_is_the_truncated_product_and_a_higher_one_the_same_change(tiny_sd, tuned, tmp_path):
    full = tmp_path / "full.safetensors"
    extract(str(tiny_sd), str(tuned[0]), full, to="kohya", truncation=Truncation(rank=8))
    tensors = load_file(full)
    tensors = {k: v * 0.5 if k.endswith("alpha") else v for k, v in tensors.items()}  # a scale to keep
    save_file(tensors, full, {"ss_network_dim": "8", "ss_network_alpha": "4", "ss_tag_frequency": "{}"})
    layers = reading.read(full).parts["unet"]
    found = resize(full, tmp_path / "low.safetensors", truncation=Truncation(rank=1))
    low = reading.read(tmp_path / "low.safetensors")
    for name, layer in low.parts["unet"].items():
        u, s, vt = torch.linalg.svd(layers[name].change().flatten(1), full_matrices=False)
        torch.testing.assert_close(layer.change().flatten(1), s[0] * u[:, :1] @ vt[:1], atol=1e-4, rtol=0)
        assert found["layers"][name]["error"] == pytest.approx(float(s[1:].norm() / s.norm()), rel=1e-3)
        assert layer.scale == layers[name].scale
    assert (low.foreign["ss_network_dim"], low.foreign["ss_network_alpha"]) == ("1", "0.5")
    assert low.foreign["ss_tag_frequency"] == "{}"
    assert resize(full, tmp_path / "high.safetensors", truncation=Truncation(rank=12))["error"] == 0.0
    high = reading.read(tmp_path / "high.safetensors").parts["unet"]
    for name, layer in high.items():
        assert layer.rank == 12
        assert layer.down[8:].abs().min() > 0  # a start from which the new rows can be trained
        torch.testing.assert_close(layer.change(), layers[name].change(), atol=1e-6, rtol=0)


def test_a_sparse_adapter_keeps_its_largest_changes_in_either_store(tiny_sd, tuned, tmp_path):
    for store, base in (("delta", None), ("value", str(tiny_sd))):
        file, small = tmp_path / f"{store}.safetensors", tmp_path / f"{store}-small.safetensors"
        extract(str(tiny_sd), str(tuned[0]), file, kind="sara", store=store)
        found = resize(file, small, most=Most(fraction=0.25), base=base)
        one, other = SparseDelta.load(file), SparseDelta.load(small)
        assert other.trained == found["trained"] == round(0.25 * one.trained)
        assert other.store == store
        for name, entry in other.entries.items():
            where = torch.isin(one.entries[name].index, entry.index)
            assert torch.equal(one.entries[name].values[where], entry.values)
            assert entry.fingerprint == one.entries[name].fingerprint
    with pytest.raises(AdapterError, match="give --base MODEL"):
        resize(file, tmp_path / "none.safetensors", most=Most(budget=5))
    assert not (tmp_path / "none.safetensors").exists()


def test_a_sparse_adapter_becomes_factors_with_the_error_told(tiny_sd, tuned, tmp_path):
    sparse = tmp_path / "sparse.safetensors"
    extract(str(tiny_sd), str(tuned[0]), sparse, kind="sara")
    with pytest.raises(ConfigError, match="give --rank 16 or --energy"):
        convert(sparse, "peft", tmp_path / "lora")
    found = convert(sparse, "peft", tmp_path / "lora", truncation=Truncation(rank=2))
    assert found["layers"][LINEAR]["error"] == pytest.approx(1 / math.sqrt(21), rel=1e-3)
    assert NORM in found["remarks"][0]


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"kind": "loha"}, ConfigError, "kind=loha"),
        ({"to": "fallow"}, ConfigError, "kind=lora cannot be written as fallow"),
        ({"to": "kohia"}, ConfigError, "did you mean 'kohya'"),
        ({"to": "kohya"}, ConfigError, "must be a file for kohya"),
        ({"most": Most(budget=3)}, ConfigError, "give rank or energy"),
        ({"kind": "sara", "truncation": Truncation(rank=2)}, ConfigError, "give --fraction or --budget"),
        ({"kind": "sara", "threshold": -1.0}, ConfigError, "threshold=-1.0"),
        ({"kind": "sara", "parts": ["text_encoder"]}, ConfigError, "denoising network alone"),
        ({"parts": ["vae"]}, ConfigError, "part=vae"),
        ({"parts": ["text_encoder"]}, ModelError, "has no text_encoder"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tiny_sd, tuned, tmp_path, how, error, message):
    with pytest.raises(error, match=message):
        extract(str(tiny_sd), str(tuned[0]), tmp_path / "made", **how)
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_are_none_or_of_two_models_are_refused(tiny_sd, tuned, tmp_path):
    output = tmp_path / "made"
    with pytest.raises(ModelError, match="does not exist"):
        extract("nowhere", str(tuned[0]), output)
    with pytest.raises(ModelError, match=r"no linear layer or convolution .* differs"):
        extract(str(tuned[0]), str(tuned[0]), output)
    broken = tmp_path / "broken.safetensors"
    tensors = load_file(tuned[0])
    save_file({**tensors, LINEAR: torch.full_like(tensors[LINEAR], float("nan"))}, broken)
    with pytest.raises(ModelError, match="NaN or infinite"):
        extract(str(tiny_sd), str(broken), output)
    save_file({**tensors, LINEAR: torch.zeros(3, 5)}, broken)
    with pytest.raises(ModelError, match=r"is \(16, 16\) in .* and \(3, 5\)"):
        extract(str(tiny_sd), str(broken), output)
    assert not output.exists()
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="overwrite"):
        extract(str(tiny_sd), str(tuned[0]), folder)
    with pytest.raises(ConfigError, match="is kept"):
        extract(str(tiny_sd), str(tuned[0]), folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_folder_of_runs_is_never_taken_for_an_earlier_adapter(tiny_sd, tuned, tmp_path):
    runs = tmp_path / "runs"
    SparseDelta({"a.weight": Entry(torch.tensor([0]), torch.ones(1), (2, 2), "float32", "")}, "delta", {}).save(
        runs / "run-1" / "adapter"
    )
    with pytest.raises(ConfigError, match="is kept"):
        extract(str(tiny_sd), str(tuned[0]), runs, overwrite=True)
    assert (runs / "run-1" / "adapter" / WEIGHTS).is_file()


def test_a_full_adapter_is_converted_by_what_it_differs_by_from_the_base(tiny_sd, tmp_path):
    from fallow.recipes.adapter_files import base_fingerprints, save_full

    unet = unet_of(tiny_sd)
    prints = base_fingerprints(unet)
    with torch.no_grad():
        dict(unet.named_parameters())[CONV].add_(0.01)
        dict(unet.named_parameters())[NORM].add_(0.02)
    save_full(unet, tmp_path / "full", prints, {"method": "full"})
    with pytest.raises(AdapterError, match="give --base MODEL"):
        convert(tmp_path / "full", "lycoris-diff", tmp_path / "diff.safetensors")
    convert(tmp_path / "full", "fallow", tmp_path / "sparse.safetensors", base=str(tiny_sd))
    assert SparseDelta.load(tmp_path / "sparse.safetensors").entries.keys() == {CONV, NORM}
    found = convert(
        tmp_path / "full", "kohya", tmp_path / "lora.safetensors", base=str(tiny_sd), truncation=Truncation(rank=1)
    )
    assert found["error"] < 1e-4  # the same everywhere, which is of rank 1
    own = unet_of(tiny_sd)
    apply_adapter(own, tmp_path / "lora.safetensors")
    torch.testing.assert_close(weights(own)[CONV], weights(unet)[CONV], atol=1e-5, rtol=0)
