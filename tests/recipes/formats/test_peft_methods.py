"""PEFT's own files of our methods: what they compute here is what PEFT computes, and written back they are the same."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from networks import IDS, LAYERS, EveryKind, adapted
from peft import (
    LoraConfig,
    MissConfig,
    PeftModel,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fallow
from fallow.core.errors import AdapterError, ConfigError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Linears(nn.Module):
    """Layers of unlike sides, one of GPT-2's. Takes (B, 12), gives (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 12, bias=False)
        self.turned = Conv1D(10, 12)
        nn.init.normal_(self.turned.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.turned(self.third(torch.tanh(self.second(torch.tanh(self.first(x))))))


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
ALL, NO_TURNED = ["first", "second", "third", "turned"], ["first", "second", "third"]
CASES = {
    "lora": (EveryKind, "lora", LoraConfig(r=3, lora_alpha=6, target_modules=LAYERS, rank_pattern={"two": 2})),
    "alphas": (EveryKind, "lora", LoraConfig(r=3, target_modules=LAYERS, alpha_pattern={"linear": 2, "two": 5})),
    "rslora": (EveryKind, "lora", LoraConfig(r=3, lora_alpha=5, target_modules=LAYERS, use_rslora=True)),
    "above": (EveryKind, "lora", LoraConfig(r=20, lora_alpha=5, target_modules=["linear", "two"])),
    "dora": (EveryKind, "dora", LoraConfig(r=2, lora_alpha=3, target_modules=LAYERS, use_dora=True)),
    "vera": (Linears, "vera", VeraConfig(r=5, target_modules=ALL)),
    "vera-drawn": (Linears, "vera", VeraConfig(r=5, target_modules=ALL, save_projection=False, projection_prng_key=7)),
    "randlora": (Linears, "randlora", RandLoraConfig(r=5, randlora_alpha=50, target_modules=["first", "third"])),
    "randlora-unlike": (Linears, "randlora", RandLoraConfig(r=4, randlora_alpha=4, target_modules=ALL)),
    "randlora-sparse": (Linears, "randlora", RandLoraConfig(r=4, target_modules=["third"], sparse=True)),
    "miss": (Linears, "bone", MissConfig(r=5, target_modules=NO_TURNED)),
    "miss-mini": (Linears, "bone", MissConfig(r=4, mini_r=2, init_weights="mini", target_modules=NO_TURNED)),
    "miss-bat": (Linears, "bone", MissConfig(r=4, init_weights="bat", target_modules=NO_TURNED)),
}


def theirs(case: str, folder: Path) -> tuple[Tensor, type[nn.Module]]:
    """What PEFT's model with random values gives, once it is saved in the folder."""
    network, _, config = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(network(), config).eval()
        torch.manual_seed(4)
        with torch.no_grad():
            for param in model.parameters():
                if param.requires_grad:
                    param.add_(0.2 * torch.randn_like(param))
        model.save_pretrained(folder)
    return output(model), network


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(IDS if hasattr(model, "tokens") or "tokens" in dict(model.get_base_model().named_children()) else X)


@pytest.mark.parametrize("case", CASES)
def test_pefts_adapter_computes_the_same_here_and_is_the_same_when_written_back(case, tmp_path):
    wanted, network = theirs(case, tmp_path / "theirs")
    model = fallow.from_peft(tmp_path / "theirs", network()).eval()
    assert model.peft_config["default"].method == CASES[case][1]
    assert (output(network_of(network)) - wanted).abs().max() > 1e-3
    assert (output(model) - wanted).abs().max() < 1e-6 * max(1.0, float(wanted.abs().max()))

    assert fallow.to_peft(model, tmp_path / "ours") == tmp_path / "ours"
    before, after = (load_file(tmp_path / side / WEIGHTS) for side in ("theirs", "ours"))
    # the bases that PEFT keeps in each layer once more are left out
    before = {name: tensor for name, tensor in before.items() if not re.search(r"model\..+\.randlora_[AB]", name)}
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.shape == after[name].shape
        if case == "randlora-unlike" and name.endswith(("_A", "_B")):  # what no layer uses of them is not kept
            after[name] = torch.where(after[name] == 0, tensor, after[name])
        assert torch.equal(tensor.float(), after[name]), name
    again = PeftModel.from_pretrained(network(), tmp_path / "ours").eval()
    assert (output(again) - wanted).abs().max() < 1e-6 * max(1.0, float(wanted.abs().max()))
    told = [json.loads((tmp_path / side / CONFIG).read_text()) for side in ("theirs", "ours")]
    same = {"r", "lora_alpha", "use_rslora", "use_dora", "save_projection", "projection_prng_key", "randlora_alpha"}
    same |= {"peft_type", "d_initial", "init_weights"} | ({"mini_r"} if case == "miss-mini" else set())
    for name in same & told[1].keys():
        assert told[0][name] == told[1][name], name


def network_of(network: type[nn.Module]) -> nn.Module:
    return get_peft_model(network(), LoraConfig(r=1, target_modules=["linear", "first"]))


@pytest.mark.parametrize("case", ["lora", "dora", "vera", "randlora-unlike", "miss-bat"])
def test_what_was_read_trains_on_is_saved_and_loaded_as_ours(case, tmp_path):
    wanted, network = theirs(case, tmp_path / "theirs")
    model = fallow.from_peft(tmp_path / "theirs", network())
    assert model.peft_config["default"].made["base"]
    x = IDS if network is EveryKind else X
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(network(), tmp_path / "ours").eval()
    assert (output(again) - wanted).abs().max() < 1e-6 * max(1.0, float(wanted.abs().max()))
    kept, loaded = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
    assert all(torch.equal(kept[name], loaded[name]) for name in kept)
    torch.testing.assert_close(output(model.eval()), output(again), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "randlora", "bone"])
@pytest.mark.parametrize("host", ["peft", "own"])
def test_adapters_trained_here_are_what_peft_computes_from_its_own_file(method, host, tmp_path):
    layers = ["first", "third"]
    model = adapted(method, host, Linears(), layers, rank=3)
    fallow.to_peft(model, tmp_path / "peft")
    again = PeftModel.from_pretrained(Linears(), tmp_path / "peft").eval()
    with torch.no_grad():
        assert (model(X) - Linears()(X)).abs().max() > 1e-4
        assert (model(X) - again(X)).abs().max() < 1e-5 * max(1.0, float(model(X).abs().max()))


def test_a_second_adapter_comes_beside_the_first_and_they_switch(tmp_path):
    lora, network = theirs("lora", tmp_path / "lora")
    dora, _ = theirs("dora", tmp_path / "dora")
    model = fallow.from_peft(tmp_path / "lora", network(), "one")
    assert fallow.from_peft(tmp_path / "dora", model, "two") is model
    model.eval()
    for name, wanted in (("one", lora), ("two", dora)):
        model.set_adapter(name)
        assert (output(model) - wanted).abs().max() < 1e-6
    with pytest.raises(ConfigError, match="'two' already"):
        fallow.from_peft(tmp_path / "dora", model, "two")


def test_files_of_kohya_are_read_by_way_of_their_factors(tmp_path, tiny_sd):
    from diffusers import UNet2DConditionModel

    from fallow.recipes.convert import convert

    unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
    names = ["to_q", "conv1", "proj_in"]
    made = get_peft_model(unet, LoraConfig(r=2, lora_alpha=3, target_modules=names, init_lora_weights=False))
    made.save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", "kohya", tmp_path / "kohya.safetensors")
    sample = torch.randn(1, unet.config.in_channels, 16, 16), 5, torch.randn(1, 4, unet.config.cross_attention_dim)
    with torch.no_grad():
        wanted = made.eval()(*sample).sample
        fresh = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
        got = fallow.from_peft(tmp_path / "kohya.safetensors", fresh).eval()(*sample).sample
    assert (got - wanted).abs().max() < 1e-5


# -- what cannot be ----------------------------------------------------------------------------------------------------


def changed(folder: Path, config: dict[str, object] | None = None, **tensors: Tensor | None) -> None:
    told = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(told | (config or {})))
    held = load_file(folder / WEIGHTS) | tensors
    save_file({key: value for key, value in held.items() if value is not None}, folder / WEIGHTS)


P = "base_model.model."


@pytest.mark.parametrize(
    ("case", "config", "tensors", "told"),
    [
        ("lora", {"bias": "all"}, {}, "trained biases"),
        ("lora", {"modules_to_save": ["head"]}, {}, "trained whole"),
        ("lora", {"layer_replication": [[0, 1]]}, {}, "doubled"),
        ("lora", {"init_lora_weights": "pissa_niter_4"}, {}, "changes the base too"),
        ("lora", {"alora_invocation_tokens": [1]}, {}, "activation by tokens"),
        ("lora", {"use_qalora": True}, {}, "pooled inputs"),
        ("lora", {"peft_type": "LOHA"}, {}, "'LOHA', which is none of LORA, VERA"),
        ("lora", {"peft_type": "SHIRA"}, {}, r"'SHIRA', .* read by fallow.SHiRA.from_peft"),
        ("lora", {"peft_type": "VERA"}, {}, "which its method has not"),
        ("lora", {"use_dora": True}, {}, "lacks magnitude"),
        ("lora", {"alpha_pattern": {"(a+)+": 1}}, {}, "regular expression"),
        ("dora", {"use_dora": False}, {}, "which its method has not"),
        ("dora", {"lora_dropout": 0.1}, {}, "DoRA has no dropout here"),
        ("lora", {}, {P + "linear.lora_B.weight": None}, "at 'linear': it lacks B"),
        ("lora", {}, {P + "linear.lora_B.weight": torch.zeros(12, 2)}, "ask for"),
        ("lora", {}, {P + "linear.lora_B.weight": torch.zeros(12)}, "no matrices"),
        ("lora", {}, {P + "linear.lora_A.weight": torch.zeros(3, 17)}, "ask for"),
        ("lora", {}, {P + "linear.lora_A.weight": torch.full((3, 16), float("nan"))}, "NaN"),
        ("lora", {}, {P + "linaer.lora_A.weight": torch.zeros(3, 16), P + "linaer.lora_B.weight": torch.zeros(12, 3)},
         "'linaer', which EveryKind lacks.*did you mean 'linear'"),
        ("lora", {}, {P + "linear.hada_w1": torch.zeros(3)}, "hada_w1"),
        ("vera", {}, {P + "first.vera_lambda_b": torch.zeros(3)}, "ask for"),
        ("vera", {}, {"base_model.vera_A": None}, "lacks the projections"),
        ("vera", {}, {"base_model.vera_A": torch.zeros(5, 3)}, "less than"),
        ("vera", {"r": 0}, {}, "rank=0"),
        ("randlora", {}, {"base_model.randlora_B": None}, "lacks its bases"),
        ("randlora", {}, {P + "first.randlora_gamma": torch.zeros(2, 12)}, "ask for"),
        ("miss", {"init_weights": "mini", "mini_r": 7}, {}, "ask for"),
        ("miss-bat", {"r": 5}, {}, "ask for"),
    ],
)  # fmt: skip
def test_what_has_no_place_here_is_refused_by_name_and_the_model_is_as_it_was(case, config, tensors, told, tmp_path):
    _, network = theirs(case, tmp_path / "theirs")
    changed(tmp_path / "theirs", config, **tensors)
    model = network()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(AdapterError, match=told):
        fallow.from_peft(tmp_path / "theirs", model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(param.requires_grad for param in model.parameters())


def test_layers_that_peft_runs_otherwise_are_refused_on_reading_too(tmp_path):
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3, groups=2)
            self.tokens = nn.Embedding(8, 4)
            self.readout = nn.Linear(4, 8, bias=False)
            self.readout.weight = self.tokens.weight

        def forward(self, x: Tensor) -> Tensor:
            return x

    for layer, told in (("conv", "groups=2"), ("readout", "other modules of Grouped share")):
        get_peft_model(Grouped(), LoraConfig(r=2, target_modules=[layer])).save_pretrained(tmp_path / layer)
        with pytest.raises(AdapterError, match=told):
            fallow.from_peft(tmp_path / layer, Grouped())


def test_what_pefts_methods_cannot_say_is_refused_by_name_and_not_written(tmp_path):
    mixed = {"turned": {"rank": 2}}
    for method, options, told in (
        ("kasa", {}, "no method like 'kasa'.*to_lora"),
        ("vera", {"patterns": mixed}, "'turned' has rank=2.*one for all layers"),
        ("randlora", {"rank": 5}, r"layers of \[2, 3\] bases"),
        ("bone", {}, "'turned' is a Conv1D, for which PEFT has no MiSS"),
    ):
        model = fallow.attach(Linears(), method, targets=["first", "turned"], **{"rank": 3} | options)
        with pytest.raises(ConfigError, match=told):
            fallow.to_peft(model, tmp_path / "peft")
        assert not (tmp_path / "peft").exists()
    model = fallow.attach(Linears(), "bone", targets=["first"], rank=4, kind="bat", group="in")
    with pytest.raises(ConfigError, match="group='in'"):
        fallow.to_peft(model, tmp_path / "peft")
    model = fallow.attach(EveryKind(), "vera", targets=["two"], rank=3)
    with pytest.raises(ConfigError, match="'two' is a Conv2d, for which PEFT has no VeRA"):
        fallow.to_peft(model, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_a_folder_without_an_adapter_is_told_as_such(tmp_path):
    theirs("lora", tmp_path / "theirs")
    with pytest.raises(AdapterError, match="does not exist"):
        fallow.from_peft(tmp_path / "nowhere", EveryKind())
    (tmp_path / "theirs" / WEIGHTS).write_bytes(b"not a file of tensors")
    with pytest.raises(AdapterError, match="cannot be read as safetensors"):
        fallow.from_peft(tmp_path / "theirs", EveryKind())
    shutil.rmtree(tmp_path / "theirs")
