"""Looking into adapters, combining, comparing and merging them; and that nothing is lost where that goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from fallow import assets
from fallow.core.errors import AdapterError, ConfigError, ModelError, StorageError
from fallow.core.files import fingerprint
from fallow.core.sparse import WEIGHTS, Entry, SparseDelta
from fallow.recipes import adapters as module
from fallow.recipes.adapter_files import apply_adapter, base_fingerprints, save_full, save_peft
from fallow.recipes.adapters import combine, describe, differ, merge_into
from fallow.recipes.pipelines import load_pipeline
from fallow.report.run import block_of


def delta_of(unet, seed: int, share: float = 0.1, store: str = "delta") -> SparseDelta:
    rng = torch.Generator().manual_seed(seed)
    entries = {}
    for name, p in unet.named_parameters():
        if p.dim() < 2:
            continue
        index = torch.randperm(p.numel(), generator=rng)[: int(share * p.numel())].sort().values.to(torch.int32)
        values = 0.05 * torch.randn(len(index), generator=rng)
        values = p.detach().flatten()[index.long()] + values if store == "value" else values
        entries[name] = Entry(index, values, tuple(p.shape), "float32", fingerprint(p))
    return SparseDelta(entries, store, {"method": "sara", "model": "tiny", "steps": 10 * seed, "fraction": share})


@pytest.fixture(scope="module")
def base(tiny_sd):
    """Not to be changed."""
    return load_pipeline(str(tiny_sd), "cpu").unet


@pytest.fixture
def pair(base, tmp_path) -> tuple[Path, Path]:
    """Two sparse adapters of the tiny pipeline: a directory, and one file."""
    return delta_of(base, 1).save(tmp_path / "one"), delta_of(base, 2).save(tmp_path / "two.safetensors")


@pytest.fixture
def lora(tiny_sd, tmp_path) -> Path:
    unet = load_pipeline(str(tiny_sd), "cpu").unet
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), unet)
    return save_peft(unet, tmp_path / "lora", {"method": "lora", "model": "tiny"})


@pytest.fixture
def full(tiny_sd, tmp_path) -> Path:
    unet = load_pipeline(str(tiny_sd), "cpu").unet
    prints = base_fingerprints(unet)
    with torch.no_grad():
        unet.conv_in.weight.add_(0.01)
    return save_full(unet, tmp_path / "full", prints, {"method": "full", "steps": 3})


def weights(unet) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in unet.named_parameters()}


# -- looking inside ---------------------------------------------------------------------------------------------------


def test_a_sparse_adapter_is_described_by_block_with_its_settings(base, pair):
    delta = delta_of(base, 1)
    found = describe(pair[0])
    facts = found["facts"]
    assert (facts["kind"], facts["method"], facts["model"], facts["steps"]) == ("sparse", "sara", "tiny", 10)
    assert facts["trained"] == delta.trained == sum(b["trained"] for b in found["blocks"].values())
    assert facts["bytes"] == sum(f.stat().st_size for f in pair[0].iterdir())
    assert facts["share"] == pytest.approx(0.1, abs=0.01)
    assert facts["norm"] == pytest.approx(torch.cat([e.values for e in delta.entries.values()]).norm().item())
    assert list(found["blocks"]) == list(dict.fromkeys(block_of(name) for name in delta.entries))
    down = [entry for name, entry in delta.entries.items() if name.startswith("down_blocks.0.")]
    values = torch.cat([entry.values for entry in down])
    assert found["blocks"]["down_blocks.0"] == {
        "trained": len(values),
        "numel": sum(entry.numel for entry in down),
        "norm": pytest.approx(values.norm().item()),
        "largest": pytest.approx(values.abs().max().item()),
    }
    assert found["remarks"] == []
    json.dumps(found, allow_nan=False)


def test_what_the_file_alone_cannot_tell_is_none_with_a_remark(base, lora, full, tmp_path):
    delta_of(base, 1, store="value").save(tmp_path / "v.safetensors")
    for path, kind, says in (
        (tmp_path / "v.safetensors", "sparse", "stores the trained values"),
        (lora, "peft", "known only when merged"),
        (full, "full", "holds all weights"),
    ):
        found = describe(path)
        assert found["facts"]["kind"] == kind
        assert all(block["norm"] is None and block["largest"] is None for block in found["blocks"].values())
        assert any(says in remark for remark in found["remarks"])
        assert sum(block["trained"] for block in found["blocks"].values()) == found["facts"]["trained"]
        json.dumps(found, allow_nan=False)
    assert describe(full)["facts"]["trained"] == sum(p.numel() for p in base.parameters())
    facts = describe(lora)["facts"]
    assert (facts["peft_type"], facts["r"], facts["method"]) == ("LORA", 2, "lora")
    assert sorted(facts["target_modules"]) == ["to_q", "to_v"]


def test_what_a_file_of_any_kind_tells_other_tools_is_shown(base, tiny_sd, tmp_path):
    said = {"modelspec.title": "T", "modelspec.hash_sha256": "", "ss_seed": "3"}
    unet = load_pipeline(str(tiny_sd), "cpu").unet
    whole = save_full(unet, tmp_path / "full", base_fingerprints(unet), {}, said)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), unet)
    kinds = [
        delta_of(base, 1).save(tmp_path / "one.safetensors", notes=said),
        save_peft(unet, tmp_path / "lora", {}, said),
        whole,
    ]
    for place in kinds:
        notes = describe(place)["notes"]
        assert notes | {"modelspec.hash_sha256": ""} == said
        assert len(notes["modelspec.hash_sha256"]) == 66
    assert describe(delta_of(base, 1).save(tmp_path / "plain"))["notes"] == {}


def test_an_adapter_without_a_fingerprint_is_remarked(lora):
    save_file(load_file(lora / WEIGHTS), lora / WEIGHTS)
    assert any("no fingerprint" in remark for remark in describe(lora)["remarks"])


# -- combining --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["both.safetensors", "both"])
def test_a_combination_is_the_sum_of_the_changes(base, pair, tiny_sd, tmp_path, name):
    one, two = delta_of(base, 1), delta_of(base, 2)
    written = combine([(str(pair[0]), 0.6), (str(pair[1]), -0.5)], tmp_path / name)
    union = sum(len(torch.cat([one.entries[n].index, two.entries[n].index]).unique()) for n in one.entries)
    assert written["trained"] == union
    assert written["written"] == str(tmp_path / name)
    unet = load_pipeline(str(tiny_sd), "cpu").unet
    apply_adapter(unet, tmp_path / name)
    for key, found in weights(unet).items():
        expected = base.get_parameter(key).detach().flatten().clone()
        for delta, scale in ((one, 0.6), (two, -0.5)):
            if key in delta.entries:
                expected[delta.entries[key].index.long()] += scale * delta.entries[key].values
        torch.testing.assert_close(found.flatten(), expected, atol=1e-7, rtol=1e-6)
    facts = describe(tmp_path / name)["facts"]
    assert (facts["method"], facts["model"], facts.get("steps")) == ("combined", "tiny", None)
    assert [part["scale"] for part in facts["of"]] == [0.6, -0.5]


def test_only_sparse_adapters_of_one_base_are_combined(base, pair, lora, tmp_path):
    with pytest.raises(AdapterError, match=r"lora is of kind peft.*fallow adapter merge"):
        combine([(str(pair[0]), 1.0), (str(lora), 1.0)], tmp_path / "both")
    other = delta_of(base, 3)
    name, entry = next(iter(other.entries.items()))
    other.entries[name] = Entry(entry.index, entry.values, entry.shape, entry.dtype, "f32:0,f16:0,bf16:0")
    other.save(tmp_path / "other")
    with pytest.raises(AdapterError, match="different bases"):
        combine([(str(pair[0]), 1.0), (str(tmp_path / "other"), 1.0)], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_a_combination_replaces_nothing_unless_told(pair, tmp_path):
    before = pair[1].read_bytes()
    with pytest.raises(ConfigError, match=r"two\.safetensors exists already"):
        combine([(str(pair[0]), 1.0)], pair[1])
    with pytest.raises(ConfigError, match="one exists already"):
        combine([(str(pair[1]), 1.0)], pair[0])
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="file is a file already"):
        combine([(str(pair[1]), 1.0)], tmp_path / "file", overwrite=True)
    assert pair[1].read_bytes() == before
    combine([(str(pair[0]), 1.0), (str(pair[1]), 1.0)], pair[1], overwrite=True)
    assert describe(pair[1])["facts"]["method"] == "combined"


# -- comparing --------------------------------------------------------------------------------------------------------


def test_an_adapter_differs_from_itself_in_nothing_and_from_its_opposite_by_sign(pair, tmp_path):
    found = differ(pair[0], pair[0])
    assert (found["kind"], found["shared"]) == ("adapters", found["first_trained"])
    assert found["cosine"] == pytest.approx(1)
    combine([(str(pair[0]), -2.0)], tmp_path / "opposite")
    turned = differ(pair[0], tmp_path / "opposite")
    assert turned["cosine"] == pytest.approx(-1)
    assert all(part["cosine"] == pytest.approx(-1) for part in turned["tensors"].values())


def test_two_adapters_overlap_where_both_train(base, pair):
    one, two = delta_of(base, 1), delta_of(base, 2)
    found = differ(*pair)
    for name, part in found["tensors"].items():
        a, b = one.entries[name], two.entries[name]
        shared = set(a.index.tolist()) & set(b.index.tolist())
        assert (part["shared"], part["first_trained"], part["second_trained"]) == (
            len(shared),
            len(a.index),
            len(b.index),
        )
        dense_a, dense_b = torch.zeros(a.numel), torch.zeros(a.numel)
        dense_a[a.index.long()], dense_b[b.index.long()] = a.values, b.values
        assert part["cosine"] == pytest.approx(torch.cosine_similarity(dense_a, dense_b, dim=0).item(), abs=1e-6)
    assert found["shared"] == sum(part["shared"] for part in found["tensors"].values())
    assert abs(found["cosine"]) < 0.1
    json.dumps(found, allow_nan=False)


def test_stored_values_have_no_cosine(base, pair, tmp_path):
    delta_of(base, 1, store="value").save(tmp_path / "v")
    found = differ(pair[0], tmp_path / "v")
    assert found["cosine"] is None
    assert found["shared"] == found["first_trained"]


def test_checkpoints_differ_where_their_entries_do(tiny_sd, full, base):
    found = differ(tiny_sd / "unet", full)
    assert found["kind"] == "checkpoints"
    assert list(found["tensors"]) == ["conv_in.weight"]
    assert found["changed"] == found["tensors"]["conv_in.weight"]["changed"] == base.conv_in.weight.numel()
    assert found["tensors"]["conv_in.weight"]["largest"] == pytest.approx(0.01, rel=1e-4)
    assert found["only_in_first"] == found["only_in_second"] == []


def test_an_adapter_and_a_checkpoint_cannot_be_compared(pair, tiny_sd, tmp_path):
    with pytest.raises(AdapterError, match=r"is a sparse adapter and .* is none"):
        differ(tiny_sd, pair[0])
    with pytest.raises(ModelError, match="does not exist"):
        differ(tmp_path / "no", tmp_path / "nothing")


# -- merging ----------------------------------------------------------------------------------------------------------


def test_a_merged_pipeline_is_the_base_with_the_adapters_and_needs_no_fallow(tiny_sd, pair, lora, tmp_path):
    pairs = [(str(pair[0]), 0.7), (str(lora), 1.0), (str(pair[1]), 0.5)]
    written = merge_into(str(tiny_sd), pairs, tmp_path / "deep" / "merged")
    expected = load_pipeline(str(tiny_sd), "cpu")
    module.apply_adapters(expected, pairs)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "deep" / "merged")
    found = weights(loaded.unet)
    assert found.keys() == weights(expected.unet).keys()
    assert all(torch.equal(found[name], w) for name, w in weights(expected.unet).items())
    assert written["bytes"] == sum(f.stat().st_size for f in (tmp_path / "deep/merged").rglob("*") if f.is_file())


def test_the_number_format_of_a_merge_is_the_one_asked_for(tiny_sd, pair, tmp_path):
    merge_into(str(tiny_sd), [(str(pair[0]), 1.0)], tmp_path / "half", dtype="float16")
    tensors = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    with pytest.raises(ConfigError, match="dtype=int8"):
        merge_into(str(tiny_sd), [(str(pair[0]), 1.0)], tmp_path / "x", dtype="int8")


def test_the_base_is_never_written_over(tiny_sd, pair, monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "MINI_SD", tiny_sd)
    for output in (tiny_sd, tiny_sd / "unet", tiny_sd.parent):
        for model in (str(tiny_sd), "mini-sd"):
            with pytest.raises(ConfigError, match="never written over"):
                merge_into(model, [(str(pair[0]), 1.0)], output, overwrite=True)


def test_what_is_there_is_kept_unless_it_is_an_earlier_merge_and_may_be_replaced(tiny_sd, pair, tmp_path):
    pairs = [(str(pair[0]), 1.0)]
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to-mother.txt").write_text("dear")
    with pytest.raises(ConfigError, match="exists already"):
        merge_into(str(tiny_sd), pairs, tmp_path / "letters")
    with pytest.raises(ConfigError, match="no pipeline, which is kept"):
        merge_into(str(tiny_sd), pairs, tmp_path / "letters", overwrite=True)
    with pytest.raises(ConfigError, match="is a file already"):
        merge_into(str(tiny_sd), pairs, tmp_path / "letters" / "to-mother.txt", overwrite=True)
    merge_into(str(tiny_sd), pairs, tmp_path / "merged")
    weights_file = tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors"
    first = weights_file.read_bytes()
    merge_into(str(tiny_sd), [(str(pair[1]), 1.0)], tmp_path / "merged", overwrite=True)
    assert weights_file.read_bytes() != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["letters", "merged", "one", "two.safetensors"]


def test_a_merge_that_fails_leaves_the_earlier_one_and_nothing_of_its_own(tiny_sd, pair, tmp_path, monkeypatch):
    pairs = [(str(pair[0]), 1.0)]
    merge_into(str(tiny_sd), pairs, tmp_path / "merged")
    before = {p: p.read_bytes() for p in (tmp_path / "merged").rglob("*") if p.is_file()}

    def fail(self, folder, **_):
        (Path(folder) / "half-written").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", fail)
    with pytest.raises(StorageError, match="No space left"):
        merge_into(str(tiny_sd), pairs, tmp_path / "merged", overwrite=True)
    assert {p: p.read_bytes() for p in (tmp_path / "merged").rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "one", "two.safetensors"]
    with pytest.raises(AdapterError, match="does not exist"):
        merge_into(str(tiny_sd), [(str(tmp_path / "none"), 1.0)], tmp_path / "other")
    with pytest.raises(ConfigError, match="no adapter to merge"):
        merge_into(str(tiny_sd), [], tmp_path / "other")
    assert not (tmp_path / "other").exists()
