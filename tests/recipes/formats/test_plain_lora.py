"""Every method as a plain LoRA: PEFT loads the folder and computes what our model does."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from networks import LAYERS, EveryKind, adapted, run
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import fallow
from fallow.core.delta import REGISTRY
from fallow.core.errors import AdapterError, ConfigError
from fallow.core.linalg import Truncation
from fallow.core.low_rank_form import low_rank_form

METHODS = sorted(name for name, kind in REGISTRY.items() if kind.__module__.startswith("fallow.deltas."))
EXACT = ("bone", "codyra", "kasa", "lora", "lora-xs", "mos", "nola", "pego", "randlora", "sora", "svfit", "vera")
CONDITIONED = ("petalface",)  # the change depends on values of a forward


def hosted(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(EveryKind(), folder).eval()


@pytest.mark.parametrize("host", ["peft", "own"])
@pytest.mark.parametrize("method", EXACT)
def test_a_product_of_factors_is_written_exactly_for_peft_on_every_kind_of_layer(method, host, tmp_path):
    model = adapted(method, host, EveryKind())
    told = fallow.to_lora(model, tmp_path / "lora")
    ours, theirs, base = run(model), run(hosted(tmp_path / "lora")), run(EveryKind())
    assert set(told["layers"]) == set(LAYERS)
    assert told["error"] == told["largest"] == 0.0
    assert (ours - base).abs().max() > 1e-4
    assert (ours - theirs).abs().max() < 1e-6 * max(1.0, float(ours.abs().max()))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in CONDITIONED])
def test_any_mergeable_method_becomes_a_lora_of_a_given_error(method, tmp_path):
    model = adapted(method, "peft", EveryKind())
    if REGISTRY[method].mode == "output":
        with pytest.raises(ConfigError, match=f"'{method}' at '.*' depends on the layer's input"):
            fallow.to_lora(model, tmp_path / "lora", error=1e-5)
        return
    told = fallow.to_lora(model, tmp_path / "lora", error=1e-5)
    assert told["largest"] < 1.1e-5
    # and the error that is told is that of the merged weights, measured apart
    theirs, ours = hosted(tmp_path / "lora").merge_and_unload(), model.merge_and_unload()
    for name in told["layers"]:
        base = EveryKind().get_submodule(name).weight
        change = ours.get_submodule(name).weight - base
        missing = (ours.get_submodule(name).weight - theirs.get_submodule(name).weight).norm()
        assert missing < 2e-5 * change.norm() + 1e-6 * base.norm()


def test_the_error_of_a_given_rank_is_that_of_the_best_approximation(tmp_path):
    model = adapted("dora", "own", EveryKind())
    weight = {name: EveryKind().get_submodule(name).weight.detach() for name in ("linear", "two")}
    told = fallow.to_lora(model, tmp_path / "lora", rank=3)
    fallow.merge(model)
    for name, base in weight.items():
        values = torch.linalg.svdvals((model.get_submodule(name).weight.detach() - base).flatten(1).double())
        best = float(values[3:].norm() / values.norm())
        assert told["layers"][name]["rank"] == 3
        assert told["layers"][name]["error"] == pytest.approx(best, rel=1e-3)
    errors = [layer["error"] for layer in told["layers"].values()]
    norms = [layer["norm"] for layer in told["layers"].values()]
    assert told["largest"] == max(errors) > 0.05
    whole = sum((e * n) ** 2 for e, n in zip(errors, norms, strict=True)) / sum(n**2 for n in norms)
    assert told["error"] == pytest.approx(whole**0.5)


def test_factors_are_cut_without_forming_the_change():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(40, 30))
    fallow.attach(layer, "lora", targets=["0"], rank=6)
    delta = layer[0].adapters["default"]
    delta.randomize()
    whole = delta.delta_weight().detach().double()
    made = low_rank_form(delta, lambda: pytest.fail("LoRA needs no weight"), Truncation(rank=4))
    values = torch.linalg.svdvals(whole)
    assert made.rank == 4
    assert made.b.shape == (30, 4)
    assert made.a.shape == (4, 40)
    assert made.error == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-4)
    assert float((made.b @ made.a - whole).norm()) == pytest.approx(made.missing, rel=1e-4)


def test_ranks_that_differ_stand_in_the_folder_with_one_scale(tmp_path):
    model = adapted("lora", "own", EveryKind(), patterns={"two": {"rank": 3}, "linear": {"rank": 5, "alpha": 2.0}})
    fallow.to_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 2
    assert config["rank_pattern"] == config["alpha_pattern"] == {"^linear": 5, "^two": 3}
    assert (run(model) - run(hosted(tmp_path / "lora"))).abs().max() < 1e-6
    with safe_open(tmp_path / "lora" / "adapter_model.safetensors", "pt") as file:
        told = json.loads(file.metadata()["fallow"])
    assert told["metadata"]["from"] == "lora"
    assert set(told["base"]) == {f"{name}.weight" for name in LAYERS}


def test_a_folder_may_be_of_half_precision(tmp_path):
    model = adapted("lora", "own", EveryKind())
    fallow.to_lora(model, tmp_path / "lora", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "lora" / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_fused_projections_become_one_block_diagonal_lora(tmp_path):
    model = get_peft_model(EveryKind(), fallow.LoRAConfig(rank=2, target_modules=["linear"], fused={"linear": 3}))
    for delta in model.modules():
        if isinstance(delta, fallow.Delta):
            delta.randomize()
    told = fallow.to_lora(model.eval(), tmp_path / "lora")
    assert told["layers"]["linear"]["rank"] == 6
    assert (run(model) - run(hosted(tmp_path / "lora"))).abs().max() < 1e-6


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv1d(4, 4, 3, groups=2)
        self.dilated = nn.Conv1d(4, 4, 3, dilation=2)
        self.circular = nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")
        self.attention = nn.MultiheadAttention(8, 2)
        self.tokens = nn.Embedding(8, 4)
        self.readout = nn.Linear(4, 8, bias=False)
        self.readout.weight = self.tokens.weight


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("grouped", "groups=2"),
        ("dilated", r"dilation=\(2,\)"),
        ("circular", "padding_mode='circular'"),
        ("attention.in_proj_weight", "read by its module itself"),
        ("attention.out_proj", "read by its module itself"),
        ("tokens", "shared by tokens, readout"),
    ],
)
def test_layers_that_peft_does_otherwise_are_refused_by_name_and_nothing_is_written(target, told, tmp_path):
    model = fallow.attach(Odd(), "lora", targets=[target], rank=2)
    with pytest.raises(ConfigError, match=told) as error:
        fallow.to_lora(model, tmp_path / "lora")
    assert target in str(error.value)
    assert not (tmp_path / "lora").exists()


def test_attention_within_pefts_host_is_refused_by_name(tmp_path):
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    for targets, told in (
        (["attention"], "read by its module itself"),
        (["out_proj"], "attention that reads the weight"),
    ):
        model = get_peft_model(Attending(), fallow.LoRAConfig(rank=2, target_modules=targets))
        with pytest.raises(ConfigError, match=told):
            fallow.to_lora(model, tmp_path / "lora")


def test_methods_and_bounds_that_cannot_be_are_refused_by_name(tmp_path):
    model = adapted("dora", "own", EveryKind())
    with pytest.raises(ConfigError, match=r"'dora' at 'tokens' is no product of two factors.*rank=16"):
        fallow.to_lora(model, tmp_path / "lora")
    for bound, told in (
        ({"rank": 0}, "rank=0"), ({"rank": 2.5}, "rank=2.5"), ({"error": 0.0}, "error=0.0"), ({"error": 1}, "error=1"),
        ({"energy": 2.0}, "energy=2.0"), ({"rank": 2, "error": 0.1}, "give one of them"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            fallow.to_lora(model, tmp_path / "lora", **bound)
    with pytest.raises(ConfigError, match="no adapter 'style'"):
        fallow.to_lora(model, tmp_path / "lora", "style")
    fallow.merge(model)
    with pytest.raises(ConfigError, match="merged"):
        fallow.to_lora(model, tmp_path / "lora", rank=2)
    with pytest.raises(ConfigError, match="no adapter 'default'"):
        fallow.to_lora(EveryKind(), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


class Bent(fallow.Delta):
    name = "bent-for-this-test"

    def setup(self, site):
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x, y):
        return y * (1 + self.gate)


def test_an_unmergeable_method_and_another_tuners_adapter_are_refused_by_name(tmp_path):
    model = fallow.attach(EveryKind(), Bent, targets=["linear"])
    with pytest.raises(ConfigError, match="'bent-for-this-test' at 'linear' depends on the layer's input"):
        fallow.to_lora(model, tmp_path / "lora", rank=2)
    sparse = get_peft_model(EveryKind(), fallow.SaRAConfig(fraction=0.1, target_modules=["linear"]))
    with pytest.raises(ConfigError, match="no weight parameterization"):
        fallow.to_lora(sparse, tmp_path / "lora", rank=2)


def test_what_is_no_adapter_is_kept_and_an_older_adapter_replaced(tmp_path):
    model = adapted("lora", "own", EveryKind())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(AdapterError, match="in use by something that is no adapter"):
        fallow.to_lora(model, tmp_path / "notes")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"
    fallow.to_lora(model, tmp_path / "lora")
    before = copy.deepcopy(load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    model.get_submodule("linear").adapters["default"].randomize()
    fallow.to_lora(model, tmp_path / "lora")
    after = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    changed = {name.split(".")[2] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"linear"}


def test_every_method_is_in_these_tests():
    assert set(EXACT) <= set(METHODS)
    assert len(METHODS) >= 25
