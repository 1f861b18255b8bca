"""Three kinds of adapter, one meaning: base + scale x change; and what is broken or foreign is refused untouched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fallow.core.errors import AdapterError, ConfigError
from fallow.core.files import fingerprint
from fallow.core.sparse import Entry, SparseDelta
from fallow.recipes.adapter_files import (
    WEIGHTS,
    adapter_size,
    apply_adapter,
    apply_together,
    bare_parameters,
    base_fingerprints,
    check_peft,
    kind_of,
    save_full,
    save_peft,
)

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def unet(tiny_unet: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same weights at every call."""

    def make(seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return tiny_unet().eval()

    return make


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def out(model: nn.Module) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    latents, text = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 5, 16, generator=rng)
    with torch.no_grad():
        return model(latents, torch.tensor([3, 800]), text).sample


def moved(model: nn.Module, seed: int, size: float = 0.02) -> nn.Module:
    """As after full training."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=rng))
    return model


@pytest.fixture
def full(unet, tmp_path) -> tuple[Path, dict[str, Tensor]]:
    """A full adapter, and the weights it was saved from."""
    model = unet()
    base = base_fingerprints(model)
    moved(model, 1)
    return save_full(model, tmp_path / "full", base, {"method": "full"}), weights(model)


def with_lora(model: nn.Module, config: LoraConfig | None = None, seed: int = 2) -> nn.Module:
    """LoRA put into the bare network, its factors as after training."""
    inject_adapter_in_model(config or LoraConfig(r=2, lora_alpha=4, target_modules=ATTENTION), model)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or (p.requires_grad and name.endswith("bias")):
                p.copy_(0.2 * torch.randn(p.shape, generator=rng))
    return model


@pytest.fixture
def lora(unet, tmp_path) -> Path:
    return save_peft(with_lora(unet()), tmp_path / "lora", {"method": "lora"})


def sparse_delta(model: nn.Module, seed: int = 3, store: str = "delta") -> SparseDelta:
    rng = torch.Generator().manual_seed(seed)
    entries = {}
    for name, p in model.named_parameters():
        if p.dim() < 2:
            continue
        index = torch.randperm(p.numel(), generator=rng)[: p.numel() // 10].sort().values.to(torch.int32)
        values = 0.1 * torch.randn(len(index), generator=rng)
        values = p.detach().flatten()[index.long()] + values if store == "value" else values
        entries[name] = Entry(index, values, tuple(p.shape), "float32", fingerprint(p))
    return SparseDelta(entries, store, {"method": "sara"})


@pytest.fixture
def sparse(unet, tmp_path) -> Path:
    return sparse_delta(unet()).save(tmp_path / "sparse")


def test_every_kind_is_told_apart_also_by_its_run_directory(full, lora, sparse, tmp_path):
    assert (kind_of(full[0]), kind_of(lora), kind_of(sparse)) == ("full", "peft", "sparse")
    run = tmp_path / "run"
    run.mkdir()
    lora.rename(run / "adapter")
    assert kind_of(run) == "peft"


def test_full_weights_come_back_bit_for_bit_and_scale_zero_is_the_base(full, unet):
    model = unet()
    apply_adapter(model, full[0], scale=0.0)
    assert same(weights(model), weights(unet()))
    apply_adapter(model, full[0])
    assert same(weights(model), full[1])


@pytest.mark.parametrize("scale", [0.5, -1.0, 1.5])
def test_full_scales_the_way_from_the_base(full, unet, scale):
    model, base = unet(), weights(unet())
    apply_adapter(model, full[0], scale=scale)
    for name, found in weights(model).items():
        torch.testing.assert_close(found, base[name] + scale * (full[1][name] - base[name]), atol=1e-6, rtol=0)


def test_pefts_own_loader_reads_what_was_saved_and_draws_the_same(lora, unet):
    expected = out(with_lora(unet()))
    loaded = PeftModel.from_pretrained(unet(), str(lora)).eval()
    assert torch.equal(out(loaded), expected)
    assert (out(unet()) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("way", ["inject_adapter_in_model", "get_peft_model", "add_adapter"])
def test_peft_is_saved_whichever_way_it_was_put_in(way, unet, tmp_path):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=ATTENTION, init_lora_weights=False)
    model = unet()
    hosted = model
    if way == "inject_adapter_in_model":
        inject_adapter_in_model(config, model)
    elif way == "get_peft_model":
        hosted = get_peft_model(model, config)
    else:
        model.add_adapter(config)
    expected = out(model)
    save_peft(hosted, tmp_path / "lora", {})
    other = unet()
    apply_adapter(other, tmp_path / "lora")
    torch.testing.assert_close(out(other), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, lora_alpha=4, target_modules=[*ATTENTION, "conv1"]),
        LoraConfig(r=2, target_modules=ATTENTION, use_dora=True),
        LoraConfig(r=2, target_modules=ATTENTION, use_rslora=True, rank_pattern={"to_q": 3}),
        LoraConfig(r=2, target_modules=[*ATTENTION, "conv1"], bias="lora_only"),
    ],
    ids=["convolutions", "dora", "rslora", "biases"],
)
def test_a_merged_peft_adapter_draws_as_the_unmerged_one(config, unet, tmp_path):
    trained = with_lora(unet(), config)
    save_peft(trained, tmp_path / "lora", {})
    model = unet()
    apply_adapter(model, tmp_path / "lora")
    torch.testing.assert_close(out(model), out(trained), atol=2e-5, rtol=1e-4)
    assert same({n: w for n, w in weights(model).items() if "attn" not in n and "conv1" not in n},
                {n: w for n, w in weights(unet()).items() if "attn" not in n and "conv1" not in n})  # fmt: skip


def test_other_peft_methods_pass_through(unet, tmp_path):
    model = unet()
    inject_adapter_in_model(LoHaConfig(r=2, alpha=4, target_modules=ATTENTION, init_weights=False), model)
    save_peft(model, tmp_path / "loha", {})
    other = unet()
    apply_adapter(other, tmp_path / "loha")
    torch.testing.assert_close(out(other), out(model), atol=2e-5, rtol=1e-4)


def test_peft_configs_that_change_no_weights_or_keep_modules_are_refused(unet):
    check_peft(LoraConfig(target_modules=ATTENTION))
    with pytest.raises(ConfigError, match=r"modules_to_save.*conv_out.*leave it out"):
        check_peft(LoraConfig(target_modules=ATTENTION, modules_to_save=["conv_out"]))
    with pytest.raises(ConfigError, match="peft_type=PROMPT_TUNING"):
        check_peft(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_peft_scales_by_its_change_and_leaves_no_trace_of_peft(lora, unet):
    one, half = unet(), unet()
    one.conv_in.weight.requires_grad_(False)
    torch.manual_seed(7)
    drawn = torch.get_rng_state()
    apply_adapter(one, lora)
    assert torch.equal(torch.get_rng_state(), drawn)
    apply_adapter(half, lora, scale=0.5)
    base, changed = weights(unet()), 0
    for name, found in weights(half).items():
        torch.testing.assert_close(found, base[name] + 0.5 * (weights(one)[name] - base[name]), atol=1e-6, rtol=0)
        changed += not torch.equal(found, base[name])
    assert changed == sum(name.endswith(tuple(f"{target}.weight" for target in ATTENTION)) for name in base)
    assert [n for n, _ in one.named_modules()] == [n for n, _ in unet().named_modules()]
    assert not hasattr(one, "peft_config")
    assert [n for n, p in one.named_parameters() if not p.requires_grad] == ["conv_in.weight"]
    assert not one.training


@pytest.mark.parametrize("settings", [{"bias": "a little"}, {"modules_to_save": "/etc/passwd"}, {"r": 0}])
def test_settings_that_peft_refuses_half_way_leave_the_network_as_it_was(lora, unet, settings):
    config = lora / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    model = unet()
    before, kinds = weights(model), [type(module) for module in model.modules()]
    with pytest.raises(AdapterError):
        apply_adapter(model, lora)
    assert same(weights(model), before)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("store", ["delta", "value"])
def test_sparse_changes_only_its_entries_and_values_come_back_exactly(store, unet, tmp_path):
    delta = sparse_delta(unet(), store=store)
    delta.save(tmp_path / "a.safetensors")
    model = unet().to(memory_format=torch.channels_last)
    apply_adapter(model, tmp_path / "a.safetensors")
    for name, base in weights(unet()).items():
        expected = base.flatten()
        if name in delta.entries:
            entry = delta.entries[name]
            at = entry.index.long()
            expected[at] = entry.values if store == "value" else expected[at] + entry.values
        assert torch.equal(dict(model.named_parameters())[name].detach().flatten(), expected)


def test_all_kinds_together_are_the_sum_of_their_changes_in_any_order(full, lora, sparse, unet):
    base = weights(unet())
    pairs = [(full[0], 0.5), (lora, 0.8), (sparse, -0.7), (full[0], 0.25)]
    expected = {name: w.double() for name, w in base.items()}
    for path, scale in pairs:
        alone = unet()
        apply_adapter(alone, path)
        for name, w in weights(alone).items():
            expected[name] += scale * (w.double() - base[name].double())
    for order in (pairs, pairs[::-1]):
        model = unet()
        apply_together(model, order)
        for name, found in weights(model).items():
            torch.testing.assert_close(found, expected[name].float(), atol=1e-6, rtol=1e-5)


def test_the_base_in_half_precision_is_recognised(full, lora, sparse, unet):
    for path in (full[0], lora, sparse):
        model = unet().to(torch.bfloat16)
        apply_adapter(model, path)
        assert not same(weights(model), weights(unet().to(torch.bfloat16)))


@pytest.mark.parametrize("kind", ["full", "lora", "sparse"])
def test_another_base_is_refused_untouched_unless_forced(kind, request, unet):
    path = request.getfixturevalue(kind)
    path = path[0] if kind == "full" else path
    model = unet(seed=9)
    before = weights(model)
    with pytest.raises(AdapterError, match=r"another base.*--force"):
        apply_adapter(model, path)
    assert same(weights(model), before)
    apply_adapter(model, path, force=True)
    assert not same(weights(model), before)


def test_one_that_is_refused_keeps_the_others_from_being_applied(full, lora, sparse, unet, tmp_path):
    (sparse / WEIGHTS).write_bytes((sparse / WEIGHTS).read_bytes()[:-100])
    model = unet()
    with pytest.raises(AdapterError, match="cut off"):
        apply_together(model, [(full[0], 1.0), (lora, 1.0), (sparse, 1.0)])
    assert same(weights(model), weights(unet()))
    assert [n for n, _ in model.named_modules()] == [n for n, _ in unet().named_modules()]


def test_a_peft_adapter_from_elsewhere_has_no_fingerprint_and_is_taken(lora, unet):
    tensors = load_file(lora / WEIGHTS)
    save_file(tensors, lora / WEIGHTS)
    model = unet(seed=9)
    apply_adapter(model, lora)
    assert not same(weights(model), weights(unet(seed=9)))


@pytest.mark.parametrize("kind", ["full", "lora", "sparse"])
def test_truncated_weights_are_told_as_such(kind, request, unet):
    path = request.getfixturevalue(kind)
    path = path[0] if kind == "full" else path
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-50])
    with pytest.raises(AdapterError, match=f"{WEIGHTS}.*cut off"):
        apply_adapter(unet(), path)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_tensors_that_fit_nothing_are_missing_or_of_another_shape_are_refused_untouched(kind, request, unet):
    path = request.getfixturevalue(kind)
    path = path[0] if kind == "full" else path
    tensors = load_file(path / WEIGHTS)
    name = next(n for n, t in tensors.items() if t.dim() == 2)
    for wrong in (
        {**tensors, name.replace("weight", "weird"): tensors[name].clone()},
        {n: t for n, t in tensors.items() if n != name},
        {**tensors, name: torch.zeros(3, 7)},
    ):
        save_file(wrong, path / WEIGHTS)
        model = unet()
        with pytest.raises(AdapterError, match=r"lacks|fits no layer|missing|must be|in this model"):
            apply_adapter(model, path)
        assert same(weights(model), weights(unet()))
        assert [n for n, _ in model.named_modules()] == [n for n, _ in unet().named_modules()]


def test_what_is_no_adapter_is_named_with_what_to_give(full, lora, unet, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    (tmp_path / "other.safetensors").write_bytes(b"no tensors at all")
    save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    for path, says in (
        (tmp_path / "nothing", "does not exist"),
        (folder, f"no {WEIGHTS}"),
        (tmp_path / "other.safetensors", "cannot be read as safetensors"),
        (tmp_path / "plain.safetensors", "no adapter of a format"),
    ):
        with pytest.raises(AdapterError, match=says):
            apply_adapter(unet(), path)
    config = full[0] / "adapter_config.json"
    for text, says in (('{"kind": "holographic"}', "holographic"), ("{", "cannot be read"), ("[]", "no settings")):
        config.write_text(text)
        with pytest.raises(AdapterError, match=says):
            kind_of(full[0])
    config.unlink()
    with pytest.raises(AdapterError, match="no adapter_config"):
        kind_of(full[0])
    settings = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["nowhere"]}))
    with pytest.raises(AdapterError, match="PEFT cannot put this adapter"):
        apply_adapter(unet(), lora)


def test_scales_that_are_no_number_are_refused(full, unet):
    with pytest.raises(ConfigError, match="scale=nan"):
        apply_adapter(unet(), full[0], scale=float("nan"))


def test_size_is_the_number_of_trained_parameters_and_the_bytes_on_disk(full, lora, sparse, unet):
    model = with_lora(unet())
    in_factors = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    in_all = sum(p.numel() for p in unet().parameters())
    for path, trained in ((full[0], in_all), (lora, in_factors), (sparse, sparse_delta(unet()).trained)):
        assert adapter_size(path) == (trained, sum(f.stat().st_size for f in path.iterdir()))
    assert adapter_size(sparse / WEIGHTS) == (sparse_delta(unet()).trained, (sparse / WEIGHTS).stat().st_size)


def test_bare_parameters_are_those_of_the_network_without_pefts(unet):
    plain, hosted = unet(), with_lora(unet(), LoraConfig(r=2, target_modules=ATTENTION, use_dora=True))
    assert same({n: p.detach() for n, p in bare_parameters(hosted).items()}, weights(plain))
    assert base_fingerprints(hosted, ["conv_in.weight"]) == {"conv_in.weight": fingerprint(plain.conv_in.weight)}


def test_saving_replaces_an_older_adapter_only_when_the_new_one_is_complete(full, unet, monkeypatch):
    from fallow.recipes import adapter_files

    before = {f.name: f.read_bytes() for f in full[0].iterdir()}

    def fail(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(adapter_files, "write_json", fail)
    with pytest.raises(OSError, match="disk is full"):
        save_full(moved(unet(), 5), full[0], base_fingerprints(unet()), {})
    assert {f.name: f.read_bytes() for f in full[0].iterdir()} == before
    assert [p.name for p in full[0].parent.iterdir()] == ["full"]


def test_what_is_no_adapter_is_not_replaced_by_one(unet, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to-mother.txt").write_text("dear")
    (tmp_path / "file").write_text("precious")
    for place, says in (("letters", "in use by something that is no adapter"), ("file", "is a file")):
        with pytest.raises(AdapterError, match=says):
            save_full(unet(), tmp_path / place, base_fingerprints(unet()), {})
        with pytest.raises(AdapterError, match=says):
            save_peft(with_lora(unet()), tmp_path / place, {})
    assert (tmp_path / "letters" / "to-mother.txt").read_text() == "dear"


@pytest.mark.parametrize("kind", ["full", "sparse"])
def test_a_network_whose_blocks_are_compiled_takes_adapters_under_their_plain_names(kind, request, unet):
    """Regional compilation wraps blocks, which puts `_orig_mod` into their parameters' names."""
    adapter = request.getfixturevalue(kind)
    place = adapter[0] if isinstance(adapter, tuple) else adapter
    plain, regional = unet(), unet()
    regional.mid_block = torch.compile(regional.mid_block, backend="eager")
    assert any("_orig_mod" in name for name, _ in regional.named_parameters())
    for network in (plain, regional):
        apply_adapter(network, place, 0.7)
    ours = {name.replace("_orig_mod.", ""): value for name, value in weights(regional).items()}
    assert same(ours, weights(plain))
    assert not same(ours, weights(unet()))
