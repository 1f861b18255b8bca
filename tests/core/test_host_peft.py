"""The PEFT host at the places where models differ: every kind of layer, shared weights, the programs around PEFT."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftConfig, PeftModel, convert_to_lora, get_peft_model, mapping
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

import fallow
from fallow.core.compact import gather
from fallow.core.on_import import after_import
from fallow.core.peft_host import FallowConfig, FallowLayer, FallowModel

IDS = torch.arange(12).view(2, 6)


def layers(model: nn.Module) -> dict[str, FallowLayer]:
    named = ((name.replace(".base_layer", ""), module) for name, module in model.named_modules())
    return {name.removeprefix("base_model.model."): m for name, m in named if isinstance(m, FallowLayer)}


def config(**options) -> fallow.SaRAConfig:
    return fallow.SaRAConfig(**{"fraction": 0.1, "target_modules": "all-layers", **options})


def train(model: nn.Module, loss, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()


class OfEveryKind(nn.Module):
    """Takes token ids (B, T), gives (B, T, 8)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(32, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.transposed = Conv1D(12, 16)
        self.one = nn.Conv1d(12, 8, 3, padding=1)
        self.two = nn.Conv2d(1, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.three = nn.Conv3d(1, 2, (3, 3, 1), padding=(1, 1, 0))
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 8, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.act(self.one(self.transposed(x).mT)).unsqueeze(1)  # in place, on what the adapted layer gave
        x = self.two(x).mean(1, keepdim=True)
        x = self.three(x.unsqueeze(-1)).mean((1, -1))
        return self.head(x.mT)


def square(model: nn.Module) -> torch.Tensor:
    return model(IDS).square().sum()


def test_every_kind_of_layer_gets_the_gradient_of_its_weight_and_starts_as_the_base():
    dense = OfEveryKind().double()
    square(dense).backward()
    model = get_peft_model(OfEveryKind().double(), config(fraction=0.5))
    assert torch.equal(model(IDS), dense(IDS))
    square(model).backward()
    found = layers(model)
    assert set(found) == {
        "tokens", "attention", "attention.out_proj", "transposed", "one", "two", "three", "head",
    }  # fmt: skip
    for name, layer in found.items():
        delta = layer.fallow_delta["default"]
        grad = gather(dict(dense.named_parameters())[f"{name}.{layer.tensor}"].grad, delta.index)
        assert grad.any()
        torch.testing.assert_close(delta.values.grad, grad, rtol=1e-10, atol=1e-12)


def test_every_kind_of_layer_trains_saves_loads_and_merges(tmp_path):
    model = get_peft_model(OfEveryKind(), config())
    train(model, square)
    assert all(layer.fallow_delta["default"].values.any() for layer in layers(model).values())
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(OfEveryKind(), tmp_path)
    with torch.no_grad():  # torch's attention rounds differently where a gradient is asked for
        assert torch.equal(fresh.eval()(IDS), model.eval()(IDS))
        merged = fresh.merge_and_unload()
        assert torch.equal(merged(IDS), model(IDS))
    assert merged.state_dict().keys() == OfEveryKind().state_dict().keys()
    assert type(merged.attention.out_proj).__name__ == "NonDynamicallyQuantizableLinear"


def test_the_fused_path_of_torchs_encoder_sees_the_adapter():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    model = get_peft_model(encoder, config(fraction=0.3))
    train(model, lambda m: (m(x) - 1).abs().sum())
    slow = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), slow, rtol=1e-4, atol=1e-5)


def test_a_shared_weight_is_trained_in_every_module_that_shares_it(tiny_gpt2, tmp_path):
    def loss(model: nn.Module) -> torch.Tensor:
        return model(IDS, labels=IDS).loss

    torch.manual_seed(0)
    base = tiny_gpt2().double().eval()
    dense = copy.deepcopy(base)
    loss(dense).backward()
    for targets in (["wte"], ["lm_head"], ["wte", "lm_head"], "all-layers"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
            model = get_peft_model(copy.deepcopy(base), config(target_modules=targets))
            loss(model).backward()
            held = layers(model)
            delta = held["transformer.wte"].fallow_delta["default"]
            assert "default" not in held["lm_head"].fallow_delta
            expected = gather(dense.transformer.wte.weight.grad, delta.index)
            torch.testing.assert_close(delta.values.grad, expected, rtol=1e-10, atol=1e-13)
            train(model, loss)
            model.save_pretrained(tmp_path, save_embedding_layers=False)
        fresh = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert torch.equal(fresh(IDS).logits, model(IDS).logits)
        merged = model.merge_and_unload()
        assert torch.equal(merged(IDS).logits, fresh(IDS).logits)
        assert merged.lm_head.weight is merged.transformer.wte.weight


def test_all_linear_leaves_the_output_layer_out_and_patterns_and_layer_numbers_choose(tiny_gpt2):
    named = set(layers(get_peft_model(tiny_gpt2(), config(target_modules="all-linear"))))
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert named == {f"transformer.h.{i}.{part}" for i in (0, 1) for part in parts}
    some = config(target_modules=["c_attn"], layers_to_transform=[1], layers_pattern="h")
    assert set(layers(get_peft_model(tiny_gpt2(), some))) == {"transformer.h.1.attn.c_attn"}
    some = config(target_modules=r".*\.h\.0\..*c_(attn|fc)", exclude_modules=["c_fc"])
    assert set(layers(get_peft_model(tiny_gpt2(), some))) == {"transformer.h.0.attn.c_attn"}
    norm = config(target_modules=["ln_1"])
    assert set(layers(get_peft_model(tiny_gpt2(), norm))) == {"transformer.h.0.ln_1", "transformer.h.1.ln_1"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(tiny_gpt2, reentrant):
    torch.manual_seed(0)
    plain = get_peft_model(tiny_gpt2().eval(), config(target_modules="all-linear"))
    other = copy.deepcopy(plain).train()
    for module in other.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    other.enable_input_require_grads()
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, other):
        model(IDS, labels=IDS).loss.backward()
    for one, two in zip(layers(plain).values(), layers(other).values(), strict=True):
        grads = [layer.fallow_delta["default"].values.grad for layer in (one, two)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)


def test_autocast_gives_float32_gradients(tiny_gpt2):
    model = get_peft_model(tiny_gpt2(), config())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    grads = [layer.fallow_delta["default"].values.grad for layer in layers(model).values() if layer.fallow_delta]
    assert all(grad.dtype == torch.float32 and grad.any() for grad in grads)


def test_a_module_that_is_called_twice_adds_its_gradients_up():
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8).double(), torch.randn(3, 8).double()
    twice = nn.Sequential(layer, nn.Tanh(), layer)
    dense = copy.deepcopy(twice)
    dense(x).sum().backward()
    model = get_peft_model(twice, config(fraction=0.5, target_modules=["0", "2"]))
    model(x).sum().backward()
    delta = layers(model)["0"].fallow_delta["default"]
    torch.testing.assert_close(delta.values.grad, gather(dense[0].weight.grad, delta.index))


def test_the_trainer_trains_checkpoints_and_resumes_as_if_uninterrupted(tiny_gpt2, tmp_path):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": IDS[0], "labels": IDS[0]}, {"input_ids": IDS[1], "labels": IDS[1]}] * 8

    def run(folder: str, resume: str | None = None) -> PeftModel:
        torch.manual_seed(0)
        options = {"reselect_at": 0.5, "rank_weight": 1e-3, "rank_min_side": 8, "rank_layers": "all"}
        model = get_peft_model(tiny_gpt2().eval(), config(target_modules="all-linear", **options))
        arguments = TrainingArguments(
            str(tmp_path / folder), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, seed=0,
            learning_rate=1e-2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
            gradient_checkpointing=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[fallow.Callback(model)])
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run("whole")
    again = run("again", str(tmp_path / "whole" / "checkpoint-4"))
    with torch.no_grad():
        assert torch.equal(whole.eval()(IDS).logits, again.eval()(IDS).logits)
    live = [layer.fallow_delta["default"].live for layer in layers(whole).values()]
    assert 0 < sum(int((~mask).sum()) for mask in live) < sum(mask.numel() for mask in live)
    loaded = PeftModel.from_pretrained(whole.unload(), tmp_path / "whole" / "checkpoint-6")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(IDS).logits, again.eval()(IDS).logits)


def _two_halves(config: fallow.SaRAConfig) -> list[torch.Tensor]:
    """On each rank, its half of the batch; on one alone, all of it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(80, 96), nn.GELU(), nn.Linear(96, 80))
    model = get_peft_model(net, config)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    run = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for step in range(4):
        x = torch.randn(8, 80, generator=torch.Generator().manual_seed(step)).chunk(ranks)
        run(x[dist.get_rank() if ranks > 1 else 0]).square().mean().backward()
        optimizer.step()
        fallow.step(run)
        optimizer.zero_grad()
    return [layer.fallow_delta["default"].values.detach() for layer in layers(model).values()]


def _rank(rank: int, folder: Path, options: fallow.SaRAConfig) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(_two_halves(options), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    options = config(rank_weight=5e-3, reselect_at=[2])
    # Forked: a new interpreter would import PEFT anew, which takes longer than all of this file.
    torch.multiprocessing.start_processes(_rank, (tmp_path, options), nprocs=2, start_method="fork")
    alone = _two_halves(options)
    for rank in (0, 1):
        held = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for one, other in zip(alone, held, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_weight_that_was_offloaded_is_not_written_to_nowhere():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config(fraction=0.5))
    layer = layers(model)["0"]
    layer.get_base_layer().weight = nn.Parameter(layer.parameter.to("meta"), requires_grad=False)
    with pytest.raises(fallow.ModelError, match="was offloaded"):
        model(torch.randn(2, 8))


def test_adapters_of_every_kind_of_layer_and_of_shared_weights_become_sparse_ones_and_come_back(tiny_gpt2, tmp_path):
    for make, run in ((OfEveryKind, lambda m: m(IDS)), (lambda: tiny_gpt2().eval(), lambda m: m(IDS).logits)):
        torch.manual_seed(0)
        base = make()
        model = get_peft_model(copy.deepcopy(base), config())
        train(model, lambda m, run=run: run(m).square().mean())
        sparse = fallow.to_sparse(model)
        assert sparse.trained == model.get_nb_trainable_parameters()[0]
        shown = copy.deepcopy(base)
        fallow.Adapters(shown).add("style", sparse)
        back = fallow.from_sparse(sparse, copy.deepcopy(base))
        with torch.no_grad():
            assert torch.equal(run(back.eval()), run(model.eval()))
        held = dict(shown.named_parameters())
        for name, layer in layers(model).items():
            if layer.leader is layer:
                assert torch.equal(held[f"{name}.{layer.tensor}"], layer.parameter)
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        folder = fallow.to_sparse(tmp_path, base)
        assert all(torch.equal(folder.entries[name].values, entry.values) for name, entry in sparse.entries.items())


def test_replicas_of_data_parallel_are_refused():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config(fraction=0.5))
    replica = layers(model)["0"]._replicate_for_data_parallel()
    with pytest.raises(fallow.ModelError, match="use DistributedDataParallel"):
        replica(torch.randn(2, 8))


def test_text_is_generated_alike_before_and_after_merging(tiny_gpt2):
    torch.manual_seed(0)
    model = get_peft_model(tiny_gpt2(), config())
    train(model, lambda m: m(IDS, labels=IDS).loss, steps=4)
    model.eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    shown = model.generate(IDS[:, :4], **options)
    rows = model.generate(IDS[:, :4], adapter_names=["default", "__base__"], **options)
    with model.disable_adapter():
        base = model.generate(IDS[:, :4], **options)
    assert torch.equal(rows, torch.stack([shown[0], base[1]]))
    assert torch.equal(model.merge_and_unload().generate(IDS[:, :4], **options), shown)


def test_transformers_own_add_adapter_works(tiny_gpt2, tmp_path, monkeypatch):
    # transformers may ask for a later PEFT than there is; what it calls is there.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)
    torch.manual_seed(0)
    model = tiny_gpt2().eval()
    base, expected = copy.deepcopy(model), model(IDS).logits
    model.add_adapter(config(target_modules="all-linear"), "style")
    assert torch.equal(model(IDS).logits, expected)
    train(model, lambda m: m(IDS, labels=IDS).loss)
    trained = model(IDS).logits
    model.disable_adapters()
    assert torch.equal(model(IDS).logits, expected)
    model.enable_adapters()
    assert torch.equal(model(IDS).logits, trained)
    model.add_adapter(config(target_modules=["c_attn"]), "other")
    assert torch.equal(model(IDS).logits, expected)
    model.set_adapter("style")
    assert torch.equal(model(IDS).logits, trained)
    model.save_pretrained(tmp_path)
    base.load_adapter(str(tmp_path), "style")
    assert torch.equal(base(IDS).logits, trained)


def test_diffusers_own_add_adapter_works(tiny_unet, tmp_path):
    torch.manual_seed(0)
    unet, noise, text = tiny_unet(), torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)

    def run(model: nn.Module) -> torch.Tensor:
        return model(noise, 3, text).sample

    base, expected = copy.deepcopy(unet), run(unet)
    unet.add_adapter(config(), "style")
    assert sum(isinstance(layer.get_base_layer(), nn.Conv2d) for layer in layers(unet).values()) > 10
    assert torch.equal(run(unet), expected)
    trained_count = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert trained_count == sum(unet.peft_config["style"].made["entries"].values())
    train(unet, lambda m: run(m).square().mean())
    trained = run(unet)
    unet.disable_adapters()
    assert torch.equal(run(unet), expected)
    unet.enable_adapters()
    assert torch.equal(run(unet), trained)
    unet.set_adapters(["style"], [0.0])
    assert torch.equal(run(unet), expected)
    unet.set_adapters(["style"], [1.0])
    assert torch.equal(run(unet), trained)
    unet.save_lora_adapter(tmp_path, "style")
    state = get_peft_model_state_dict(unet, adapter_name="style")
    base.add_adapter(unet.peft_config["style"], "style")
    set_peft_model_state_dict(base, state, "style")
    assert torch.equal(run(base), trained)
    unet.fuse_lora()
    assert torch.equal(run(unet), trained)
    unet.delete_adapters("style")
    wrapped = get_peft_model(tiny_unet(), config(target_modules=["to_q", "to_v", "conv1"]))
    train(wrapped, lambda m: run(m).square().mean(), steps=1)


def test_parameters_that_peft_trains_whole_are_saved_beside(tiny_vit, tmp_path):
    torch.manual_seed(0)
    base, pixels = tiny_vit().eval(), torch.randn(2, 3, 16, 16)
    model = get_peft_model(copy.deepcopy(base), config(target_modules="all-linear", modules_to_save=["classifier"]))
    train(model, lambda m: m(pixels).logits.square().sum())
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(fresh(pixels).logits, model(pixels).logits)


def test_models_are_copied_and_pickled_with_their_adapters(tiny_gpt2):
    torch.manual_seed(0)
    model = get_peft_model(tiny_gpt2().eval(), config())
    train(model, lambda m: m(IDS, labels=IDS).loss)
    expected = model(IDS).logits
    other = copy.deepcopy(model)
    train(model, lambda m: m(IDS, labels=IDS).loss)
    assert torch.equal(other(IDS).logits, expected)
    assert not torch.equal(model(IDS).logits, expected)
    stored = io.BytesIO()
    torch.save(other, stored)
    stored.seek(0)
    assert torch.equal(torch.load(stored, weights_only=False)(IDS).logits, expected)


def test_an_adapter_may_lie_inside_pefts_lora_and_follow_a_move_of_dtype():
    model, x = OfEveryKind(), IDS
    model.add_module("extra", nn.Linear(2, 2))
    peft = get_peft_model(model, config(target_modules=["head", "one"]))
    train(peft, square)
    half = copy.deepcopy(peft).bfloat16()
    torch.testing.assert_close(half(x).float(), peft(x), rtol=0.1, atol=0.05)
    with half.disable_adapter():
        assert torch.equal(half(x), OfEveryKind().bfloat16()(x))


def test_a_dense_change_can_be_had_as_lora():
    peft = get_peft_model(OfEveryKind(), config(target_modules=["head"], fraction=0.9))
    train(peft, square)
    lora_config, state = convert_to_lora(peft, rank=8)
    assert isinstance(lora_config, LoraConfig)
    change = state["base_model.model.head.lora_B.weight"] @ state["base_model.model.head.lora_A.weight"]
    torch.testing.assert_close(change, layers(peft)["head"].get_delta_weight("default"), rtol=1e-3, atol=1e-5)


def test_what_cannot_be_adapted_in_place_is_refused_by_name():
    def refuse(module: nn.Module, told: str, target: str = "it") -> None:
        model = nn.ModuleDict({"it": module})
        with pytest.raises(fallow.ModelError, match=told):
            get_peft_model(model, config(target_modules=[target]))
        assert model["it"] is module

    refuse(nn.ReLU(), r"'it' \(ReLU\) has no weight of its own")
    refuse(nn.Embedding(8, 4, max_norm=1.0), "'it' rewrites its own weight")
    refuse(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "has no weight of its own")
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    refuse(quantised, r"'it' \(Linear\) is quantised or sharded \(torch.int8")
    outer = nn.Module()
    outer.inner = nn.Linear(4, 4)
    outer.used_elsewhere = outer.inner.weight
    with pytest.raises(fallow.ModelError, match="shares a weight that is to be adapted"):
        get_peft_model(nn.ModuleDict({"outer": outer}), config(target_modules=["inner"]))
    with pytest.raises(fallow.FallowError, match="on the meta device"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4, device="meta")), config(target_modules=["0"]))
    with pytest.raises(fallow.ConfigError, match="must be 'linear'"):
        get_peft_model(OfEveryKind(), config()).base_model.add_weighted_adapter(["default"], [1.0], "x", "ties")


def test_a_backward_through_a_weight_that_a_parent_reads_is_refused_after_a_switch():
    """The projection of nn.MultiheadAttention, which its parent reads: autograd tells of it."""
    torch.manual_seed(0)
    model = get_peft_model(nn.MultiheadAttention(8, 2), config(target_modules=["out_proj"]))
    x = torch.randn(3, 1, 8, requires_grad=True)
    loss = model(x, x, x)[0].sum()
    with torch.no_grad(), model.disable_adapter():
        model(x, x, x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_files_are_read_by_their_method(tmp_path):
    folder = tmp_path / "adapter"
    config(target_modules=["q"]).save_pretrained(folder)
    read = PeftConfig.from_pretrained(str(folder))
    assert type(read) is fallow.SaRAConfig
    assert read.peft_type == "FALLOW"
    assert read.peft_type.value == "FALLOW"
    told = json.loads((folder / "adapter_config.json").read_text())
    assert (told["peft_type"], told["method"]) == ("FALLOW", "sara")
    (folder / "adapter_config.json").write_text(json.dumps(told | {"of_later": 1}))
    with pytest.warns(UserWarning, match=r"unknown fields, which are ignored: \['of_later'\]"):
        PeftConfig.from_pretrained(str(folder))
    with pytest.raises(fallow.AdapterError, match=r"method='sarah' is not hosted.*did you mean 'sara'"):
        FallowConfig(method="sarah")


def test_importing_fallow_is_enough_for_peft_to_know():
    code = "import sys, fallow; print(sorted({'torch', 'peft'} & set(sys.modules)), sys.meta_path[0].package)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert told.stdout.split() == ["[]", "peft"], told.stderr
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["FALLOW"] is FallowModel


def test_a_module_is_imported_right_after_a_package_whoever_imports_that(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("told = []")
    (tmp_path / "ours_first.py").write_text("import theirs; theirs.told.append(__name__)")
    (tmp_path / "ours_second.py").write_text("import theirs; theirs.told.append(__name__)")
    (tmp_path / "ours_broken.py").write_text("1 / 0")
    after_import("theirs", "ours_first")
    assert "theirs" not in sys.modules
    theirs = import_module("theirs")
    assert theirs.told == ["ours_first"]
    assert theirs.__loader__ is theirs.__spec__.loader
    assert not any(isinstance(finder, type(after_import)) for finder in sys.meta_path)
    after_import("theirs", "ours_second")
    assert theirs.told == ["ours_first", "ours_second"]
    with pytest.warns(UserWarning, match="ours_broken does not work with this theirs and is left out"):
        after_import("theirs", "ours_broken")


@pytest.mark.parametrize("first", ["fallow.to_lora", "fallow.core.peft_host.layer"])
def test_whatever_of_ours_comes_first_peft_learns_of_all_methods_without_a_warning(first):
    """In an interpreter of its own."""
    take = f"import {first}" if "core" in first else f"import fallow; {first}"
    told = f"{take}; import peft; from fallow.core.peft_host.contract import METHODS; print(len(METHODS) > 20)"
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", told], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("True")
