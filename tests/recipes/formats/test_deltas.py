"""Folders of our weight parameterizations in the formats of other programs, which load them and compute the same."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from networks import EveryKind, adapted, run
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import fallow
from fallow.cli import app
from fallow.core.errors import AdapterError, ConfigError
from fallow.core.linalg import Truncation
from fallow.recipes.adapter_files import apply_adapter
from fallow.recipes.adapters import describe
from fallow.recipes.convert import LEAVES_DORA, convert

LAYERS = ["to_q", "to_v", "conv1", "proj_in"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module", autouse=True)
def any_peft():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)
        yield


def unet(folder: Path) -> nn.Module:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()


@torch.no_grad()
def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def saved(method: str, host: str, base: Path, folder: Path, **options: object) -> dict[str, Tensor]:
    """An adapter of the pipeline's UNet in `folder`; the weights with it."""
    model = adapted(method, host, unet(base), LAYERS, **options)
    if host == "peft":
        model.save_pretrained(folder)
        return weights(model.merge_and_unload())
    fallow.save(model, folder)
    fallow.merge(model)
    return weights(fallow.detach(model))


def alike(found: dict[str, Tensor], wanted: dict[str, Tensor], base: dict[str, Tensor], most: float = 1e-5) -> None:
    moved = 0.0
    for name, weight in wanted.items():
        change = float((weight - base[name]).norm())
        assert float((found[name] - weight).norm()) <= most * change + 1e-6 * float(weight.norm()), name
        moved += change
    assert moved > 0.1


@pytest.mark.parametrize("host", ["peft", "own"])
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "kasa", "nola", "bone", "randlora"])
def test_a_delta_becomes_a_folder_that_peft_loads_with_the_same_change(method, host, tiny_sd, tmp_path):
    wanted = saved(method, host, tiny_sd, tmp_path / "ours")
    base = str(tiny_sd) if method == "kasa" else None
    told = convert(tmp_path / "ours", "peft", tmp_path / "lora", base=base)
    assert told["from"] == method
    assert told["error"] == 0.0
    made = PeftModel.from_pretrained(unet(tiny_sd), tmp_path / "lora").merge_and_unload()
    alike(weights(made), wanted, weights(unet(tiny_sd)))


@pytest.mark.parametrize(
    ("method", "to", "how"),
    [("lora", "kohya", None), ("lora", "diffusers", None), ("nola", "kohya", None), ("dora", "diffusers", None),
     ("dora", "kohya", Truncation(energy=1 - 1e-10)), ("bone", "diffusers", Truncation(rank=2))],
)  # fmt: skip
def test_a_delta_becomes_a_file_that_diffusers_loads_with_the_same_change(method, to, how, tiny_sd, tmp_path):
    wanted = saved(method, "own", tiny_sd, tmp_path / "ours")
    base = str(tiny_sd) if how is not None else None
    convert(tmp_path / "ours", to, tmp_path / "lora.safetensors", truncation=how, base=base)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    alike(weights(pipeline.unet), wanted, weights(unet(tiny_sd)), 1e-4)


@pytest.mark.parametrize("host", ["peft", "own"])
def test_factors_of_lora_and_magnitudes_of_dora_go_over_bit_for_bit(host, tiny_sd, tmp_path):
    for method in ("lora", "dora"):
        saved(method, host, tiny_sd, tmp_path / method, alpha=3.0, scaling="rslora")
        convert(tmp_path / method, "peft", tmp_path / f"peft-{method}")
        before, after = (load_file(tmp_path / side / WEIGHTS) for side in (method, f"peft-{method}"))
        mark = ".fallow_delta." if host == "peft" else ".adapters."
        ours = {key.replace("base_model.model.", "").split(mark)[0]: {} for key in before}
        for key, value in before.items():
            layer, _, name = key.replace("base_model.model.", "").partition(mark)
            ours[layer][name] = value
        assert len(after) == len(before)
        for layer, held in ours.items():
            for name, theirs in (
                ("A", "lora_A.weight"),
                ("B", "lora_B.weight"),
                ("magnitude", "lora_magnitude_vector"),
            ):
                if name in held:
                    assert torch.equal(after[f"base_model.model.{layer}.{theirs}"].flatten(), held[name].flatten())
        config = json.loads((tmp_path / f"peft-{method}" / CONFIG).read_text())
        assert config["use_dora"] is (method == "dora")
        assert config["lora_alpha"] / config["r"] == pytest.approx(3.0 / math.sqrt(2))


def test_a_rank_makes_a_plain_lora_of_dora_and_tells_what_it_misses(tiny_sd, tmp_path):
    wanted, base = saved("dora", "peft", tiny_sd, tmp_path / "ours"), weights(unet(tiny_sd))
    told = convert(tmp_path / "ours", "peft", tmp_path / "lora", truncation=Truncation(rank=3), base=str(tiny_sd))
    made = weights(PeftModel.from_pretrained(unet(tiny_sd), tmp_path / "lora").merge_and_unload())
    change = sum(float((wanted[name] - base[name]).square().sum()) for name in wanted)
    missing = sum(float((wanted[name] - made[name]).square().sum()) for name in wanted)
    assert told["error"] == pytest.approx(math.sqrt(missing / change), rel=1e-3)
    assert 0.05 < told["error"] < 1.0
    assert not any("magnitude" in name for name in load_file(tmp_path / "lora" / WEIGHTS))
    for to in ("lycoris-diff", "fallow"):
        convert(tmp_path / "ours", to, tmp_path / f"{to}.safetensors", base=str(tiny_sd))
        network = unet(tiny_sd)
        apply_adapter(network, tmp_path / f"{to}.safetensors", force=True)
        alike(weights(network), wanted, base)


def test_wide_factors_are_cut_and_the_error_told_without_a_base(tiny_sd, tmp_path):
    wanted, base = saved("randlora", "own", tiny_sd, tmp_path / "ours"), weights(unet(tiny_sd))
    told = convert(tmp_path / "ours", "kohya", tmp_path / "lora.safetensors", truncation=Truncation(energy=0.9))
    network = unet(tiny_sd)
    apply_adapter(network, tmp_path / "lora.safetensors")
    made = weights(network)
    change = sum(float((wanted[name] - base[name]).square().sum()) for name in wanted)
    missing = sum(float((wanted[name] - made[name]).square().sum()) for name in wanted)
    assert told["error"] == pytest.approx(math.sqrt(missing / change), rel=1e-3)
    assert told["error"] < math.sqrt(0.1)
    for name, layer in told["layers"].items():
        assert 0 < layer["error"] < math.sqrt(0.1)
        assert 1 < layer["rank"] < min(base[f"{name}.weight"].flatten(1).shape)


def test_the_base_goes_along_and_is_checked(tiny_sd, tmp_path):
    for host in ("peft", "own"):
        saved("dora", host, tiny_sd, tmp_path / host)
        other = unet(tiny_sd)
        with torch.no_grad():
            for param in other.parameters():
                param.mul_(1.5)
        other.save_pretrained(tmp_path / f"other-{host}")
        with pytest.raises(AdapterError, match="trained on another base"):
            convert(tmp_path / host, "kohya", tmp_path / "k.safetensors", truncation=Truncation(rank=2),
                    base=str(tmp_path / f"other-{host}"))  # fmt: skip
        save_file({"linear.weight": torch.zeros(12, 16)}, tmp_path / "none.safetensors")
        with pytest.raises(AdapterError, match="which the base has not"):
            convert(tmp_path / host, "kohya", tmp_path / "k.safetensors", truncation=Truncation(rank=2),
                    base=str(tmp_path / "none.safetensors"))  # fmt: skip
        half = unet(tiny_sd).half()
        half.save_pretrained(tmp_path / f"half-{host}")
        convert(tmp_path / host, "kohya", tmp_path / f"half-{host}.safetensors", truncation=Truncation(rank=2),
                base=str(tmp_path / f"half-{host}"))  # fmt: skip
        assert not (tmp_path / "k.safetensors").exists()
    convert(tmp_path / "own", "kohya", tmp_path / "kohya.safetensors")
    with safe_open(tmp_path / "kohya.safetensors", "pt") as file:
        told = json.loads(file.metadata()["fallow"])
    assert told["metadata"]["method"] == "dora"
    assert all(name.endswith(".weight") for name in told["base"])
    network = unet(tiny_sd)
    with torch.no_grad():
        network.get_parameter(next(iter(told["base"]))).mul_(2)
    with pytest.raises(AdapterError, match="another base"):
        apply_adapter(network, tmp_path / "kohya.safetensors")


def test_what_fallow_save_wrote_is_applied_to_a_network_by_the_recipes(tiny_sd, tmp_path):
    for method in ("lora", "dora"):
        wanted = saved(method, "own", tiny_sd, tmp_path / method)
        network = unet(tiny_sd)
        apply_adapter(network, tmp_path / method)
        alike(weights(network), wanted, weights(unet(tiny_sd)))
    model = adapted("lora", "own", unet(tiny_sd), LAYERS)
    fallow.save(model, tmp_path / "one.safetensors")
    network = unet(tiny_sd)
    apply_adapter(network, tmp_path / "one.safetensors")
    fallow.merge(model)
    alike(weights(network), weights(fallow.detach(model)), weights(unet(tiny_sd)))


def test_magnitudes_that_diffusers_leaves_out_of_kohyas_files_are_told(tiny_sd, tmp_path):
    wanted = saved("dora", "own", tiny_sd, tmp_path / "ours")
    told = convert(tmp_path / "ours", "kohya", tmp_path / "lora.safetensors")
    assert told["remarks"] == [LEAVES_DORA]
    network = unet(tiny_sd)
    apply_adapter(network, tmp_path / "lora.safetensors")
    alike(weights(network), wanted, weights(unet(tiny_sd)))


@pytest.mark.parametrize("host", ["peft", "own"])
def test_layers_of_gpt2_go_to_peft_alone(host, tmp_path):
    model = adapted("lora", host, EveryKind(), ["linear", "turned", "one", "two", "three"])
    save = model.save_pretrained if host == "peft" else lambda folder: fallow.save(model, folder)
    save(tmp_path / "ours")
    convert(tmp_path / "ours", "peft", tmp_path / "lora")
    again = PeftModel.from_pretrained(EveryKind(), tmp_path / "lora").eval()
    assert (run(again) - run(model)).abs().max() < 1e-6
    assert (run(again) - run(EveryKind())).abs().max() > 1e-4
    with pytest.raises(AdapterError, match=r"'turned', a Conv1D, for which kohya has no place.*to_lora"):
        convert(tmp_path / "ours", "kohya", tmp_path / "lora.safetensors")


# -- what cannot be ----------------------------------------------------------------------------------------------------


class Gated(fallow.Delta):
    name = "gated-for-this-test"

    def setup(self, site):
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x, y):
        return y * (1 + self.gate)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.grouped = nn.Conv1d(4, 4, 3, groups=2)
        self.tokens = nn.Embedding(8, 4)
        self.linear = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("method", "layer", "told"),
    [
        ("lora", "attention.in_proj_weight", "'attention.in_proj_weight', a Parameter that its module reads"),
        ("lora", "grouped", "'grouped', a convolution with groups=2.*lycoris-diff"),
        ("lora", "tokens", "'tokens', an embedding"),
        (Gated, "linear", "'gated-for-this-test', which depends on inputs"),
        ("loca", "linear", "'linear.weight' has a full change.*--rank"),
        ("svfit", "linear", "at 'linear' that are made of the base weight.*--base"),
    ],
)
def test_what_has_no_plain_form_is_refused_by_name(method, layer, told, tmp_path):
    options = {"loca": {"components": 4}}.get(method, {}) if isinstance(method, str) else {}
    options |= {"rank": 2} if method in ("lora", "svfit") else {}
    fallow.save(fallow.attach(Odd(), method, targets=[layer], **options), tmp_path / "ours")
    with pytest.raises((AdapterError, ConfigError), match=told):
        convert(tmp_path / "ours", "peft", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_dora_without_its_base_asks_for_it_by_name(tiny_sd, tmp_path):
    saved("dora", "own", tiny_sd, tmp_path / "ours")
    with pytest.raises(AdapterError, match=r"made of the base weight.*--base MODEL"):
        convert(tmp_path / "ours", "peft", tmp_path / "lora", truncation=Truncation(rank=2))


@pytest.mark.parametrize("host", ["peft", "own"])
@pytest.mark.parametrize("method", ["lora", "nola"])
@pytest.mark.parametrize(
    ("how", "told"),
    [("missing", "lacks"), ("extra", "holds 'surplus' of 'linear'"), ("misshapen", "has .* as"), ("nan", "NaN"),
     ("layout", "which is no layer"), ("config", "rank=0"), ("cut", "cannot be read"),
     ("other", "lacks|holds")],
)  # fmt: skip
def test_broken_files_are_refused_by_name_before_anything_is_written(how, told, method, host, tmp_path):
    model = adapted(method, host, EveryKind(), ["linear", "two"])
    model.save_pretrained(tmp_path / "ours") if host == "peft" else fallow.save(model, tmp_path / "ours")
    file, config = tmp_path / "ours" / WEIGHTS, tmp_path / "ours" / CONFIG
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors, settings = load_file(file), json.loads(config.read_text())
    key = next(key for key, value in tensors.items() if value.ndim and "linear" in key)
    if how == "missing":
        del tensors[key]
    elif how == "extra":
        tensors[key.rpartition(".")[0] + ".surplus"] = torch.zeros(2)
    elif how == "misshapen":
        tensors[key] = torch.zeros(*tensors[key].shape, 2)
    elif how == "nan":
        tensors[key] = torch.full_like(tensors[key], float("nan"))
    elif how == "other":
        tensors = {key.replace(key.rpartition(".")[2], "Q"): value for key, value in tensors.items()}
    else:
        layers = settings["made"]["layers"] if host == "peft" else settings["weights"]
        if how == "layout":
            where = layers if host == "peft" else layers["linear"]
            where["linear" if host == "peft" else "layer"] = {"kind": "rnn", "shape": [1]}
        (settings if host == "peft" else settings["options"])["rank"] = 0 if how == "config" else 2
    if host == "own":
        header["fallow"] = json.dumps({name: settings[name] for name in ("method", "options", "seed", "weights")})
    save_file(tensors, file, header)
    config.write_text(json.dumps(settings))
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(AdapterError, match=told):
        convert(tmp_path / "ours", "peft", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_line_converts_and_prints_the_error(tiny_sd, tmp_path):
    saved("dora", "own", tiny_sd, tmp_path / "ours")
    line = ["adapter", "convert", str(tmp_path / "ours"), "--to", "kohya", "-o", str(tmp_path / "k.safetensors")]
    told = CliRunner().invoke(app, [*line, "--rank", "2", "--base", str(tiny_sd), "--json"])
    assert told.exit_code == 0, told.output
    report = json.loads(told.stdout)
    assert 0.0 < report["error"] < 1.0
    assert report["from"] == "dora"
    told = CliRunner().invoke(app, [*line, "--rank", "2", "--base", str(tiny_sd), "--overwrite"])
    assert "relative error" in told.stdout
    told = CliRunner().invoke(app, [*line, "--rank", "2", "--overwrite"])
    assert told.exit_code == 2
    assert "--base" in told.output


@pytest.mark.parametrize("host", ["peft", "own"])
def test_info_names_method_options_ranks_trained_numbers_and_base(host, tiny_sd, tmp_path):
    model = adapted("lora-xs", host, EveryKind(), ["linear", "two"], patterns={"two": {"rank": 3}})
    model.save_pretrained(tmp_path / "ours") if host == "peft" else fallow.save(model, tmp_path / "ours")
    found = describe(tmp_path / "ours")
    facts = found["facts"]
    assert facts["method"] == "lora-xs"
    assert facts["options"]["rank"] == 2
    assert facts["ranks"] == [2, 3]
    assert facts["trained"] == 2**2 + 3**2  # the frozen factors in the file are not trained
    assert facts["base"] if host == "peft" else facts["base"] == "fingerprints of 2 weights"
    assert [one["shape"] for one in found["layers"]] == ["12x16", "4x1x3x3"]
    told = CliRunner().invoke(app, ["adapter", "info", str(tmp_path / "ours")])
    assert told.exit_code == 0, told.output
    assert "lora-xs" in told.stdout
    assert "4x1x3x3" in told.stdout


# -- what the header says ----------------------------------------------------------------------------------------------


def test_a_saved_adapter_says_in_its_header_what_it_is_and_peft_loads_it(tiny_sd, tmp_path):
    model = adapted("dora", "peft", unet(tiny_sd), LAYERS)
    told = {"learning_rate": 1e-4, "steps": 10}
    fallow.save_adapter(model, tmp_path / "ours", trigger_phrase="a drawing", settings=told, notes={"ss_seed": "3"})
    with safe_open(tmp_path / "ours" / WEIGHTS, "pt") as file:
        header = file.metadata()
    said = json.loads(header["fallow"])
    assert header["modelspec.trigger_phrase"] == "a drawing"
    assert header["ss_seed"] == "3"
    assert said["metadata"]["method"] == "dora"
    assert said["metadata"]["options"]["rank"] == 2
    assert said["metadata"]["steps"] == 10
    adapted_weights = {name for name in weights(unet(tiny_sd)) if any(f"{at}.weight" in name for at in LAYERS)}
    assert {name for name in said["base"] if name.endswith(".weight")} == adapted_weights
    again = PeftModel.from_pretrained(unet(tiny_sd), tmp_path / "ours")
    alike(weights(again.merge_and_unload()), weights(model.merge_and_unload()), weights(unet(tiny_sd)), 1e-6)
    facts = describe(tmp_path / "ours")
    assert facts["facts"]["learning_rate"] == 1e-4
    assert facts["notes"]["modelspec.trigger_phrase"] == "a drawing"
    convert(tmp_path / "ours", "kohya", tmp_path / "kohya.safetensors")
    with safe_open(tmp_path / "kohya.safetensors", "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "a drawing"
        assert json.loads(file.metadata()["fallow"])["metadata"]["steps"] == 10


def test_what_cannot_be_saved_or_said_is_refused_by_name(tmp_path):
    model = adapted("lora", "peft", EveryKind(), ["linear"])
    for given, told in (
        ({"settings": {"rate": float("nan")}}, "cannot be written as JSON"),
        ({"settings": {"rate": torch.zeros(2)}}, "cannot be written as JSON"),
        ({"notes": {"ss_seed": 3}}, "ss_seed=3 must be a text"),
        ({"notes": {"fallow": "x"}}, "fallow='x' must be"),
        ({"adapter_name": "other"}, "no PEFT adapter named 'other'"),
    ):
        with pytest.raises(ConfigError, match=told):
            fallow.save_adapter(model, tmp_path / "ours", **given)
    model.merge_adapter()
    with pytest.raises(ConfigError, match="'default' is merged"):
        fallow.save_adapter(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("bonne", "of method='bonne', which this Fallow does not know.*did you mean 'bone'.*update Fallow"),
        ("sara", "holds entries of weights .sara.; fallow.to_sparse makes a sparse adapter of it"),
    ],
)
def test_what_is_no_weight_parameterization_here_says_what_to_do_instead(method, told, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "FALLOW", "method": method}))
    save_file({"base_model.model.layer.fallow_delta.values": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=told):
        convert(tmp_path, "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_difference_of_adapters_that_have_no_tensor_in_common_is_not_told_as_none(tmp_path):
    for name in ("one", "two"):
        save_file({f"{name}.lora_A.weight": torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
    result = CliRunner().invoke(app, ["adapter", "diff", *(str(tmp_path / f"{n}.safetensors") for n in ("one", "two"))])
    assert result.exit_code == 0, result.output
    assert "no tensor: they are of other methods" in " ".join(result.output.split())  # which is wrapped
    assert "relative change" not in result.output
